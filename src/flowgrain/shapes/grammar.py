"""Prompts of the shapes world: a grammar, its parser, and the train, validation and held-out split.

Examples: "three green circles", "red square and blue circle", "yellow triangle above cyan square".
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import product

NUMBERS = ("one", "two", "three", "four")
COLORS = ("red", "green", "blue", "yellow", "cyan", "magenta")
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("above", "below", "left of", "right of")

_LINKS = ("and", "above", "below", "left", "right", "of")
VOCABULARY = ("<pad>", *NUMBERS, *COLORS, *SHAPES, *(s + "s" for s in SHAPES), *_LINKS)
MAX_WORDS = 6
_SHOWN = 100
"""Characters of a prompt in an error message."""
NUM_VALIDATION = 256
"""Number of validation prompts."""


@dataclass(frozen=True)
class Scene:
    """The scene that a prompt describes.

    Attributes:
        objects: (color, shape) of each object, as indices into `COLORS` and `SHAPES`.
        relation: position of the first object relative to the second, from `RELATIONS`, or None.
    """

    objects: tuple[tuple[int, int], ...]
    relation: str | None = None


@cache
def parse(prompt: str) -> Scene:
    """Return the scene that `prompt` describes.

    Raises:
        ValueError: the grammar does not contain the prompt. The message has valid examples.
    """
    words = prompt.split()
    numeral = words[0] if words else ""
    if numeral in NUMBERS and len(words) == 3:
        count = NUMBERS.index(numeral) + 1
        shape = words[2] if count == 1 else words[2].removesuffix("s")
        if words[1] in COLORS and shape in SHAPES and (count == 1) == (shape == words[2]):
            return Scene(((COLORS.index(words[1]), SHAPES.index(shape)),) * count)
    middle = " ".join(words[2:-2])
    if len(words) >= 5 and middle in ("and", *RELATIONS):
        pairs = ((words[0], words[1]), (words[-2], words[-1]))
        if all(color in COLORS and shape in SHAPES for color, shape in pairs):
            objects = tuple((COLORS.index(color), SHAPES.index(shape)) for color, shape in pairs)
            return Scene(objects, None if middle == "and" else middle)
    prompt = prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}..."
    if len(words) > MAX_WORDS:
        raise ValueError(
            f"the prompt {prompt!r} has {len(words)} words. The maximum of the shapes model is "
            f"{MAX_WORDS}."
        )
    raise ValueError(
        f"the shapes model cannot read the prompt {prompt!r}. Use prompts such as "
        "'three green circles', 'red square and blue circle' or "
        "'yellow triangle above cyan square': a number and one kind of shape, or two shapes."
    )


def tokenize(prompt: str) -> list[int]:
    """Return the indices of the words of `prompt` in `VOCABULARY`, padded with 0 to `MAX_WORDS`.

    Raises:
        ValueError: the grammar does not contain the prompt.
    """
    parse(prompt)
    words = [VOCABULARY.index(word) for word in prompt.split()]
    return words + [0] * (MAX_WORDS - len(words))


@cache
def all_prompts() -> tuple[str, ...]:
    """Return all prompts of the grammar in a fixed order. The two objects of a pair differ."""
    counts = [
        f"{number} {color} {shape}{'' if number == 'one' else 's'}"
        for number, color, shape in product(NUMBERS, COLORS, SHAPES)
    ]
    objects = [f"{color} {shape}" for color, shape in product(COLORS, SHAPES)]
    pairs = [
        f"{a} {link} {b}"
        for link in ("and", *RELATIONS)
        for a, b in product(objects, objects)
        if a != b
    ]
    return tuple(counts + pairs)


@cache
def prompts(split: str) -> tuple[str, ...]:
    """Return the prompts of a split, in a shuffled but fixed order.

    A hash of the text selects about a third of all prompts, which are not trained on. The first
    `NUM_VALIDATION` of them are the validation prompts.

    Args:
        split: "train", "validation" (to choose settings) or "held-out" (to report results).
    """
    unseen = [p for p in all_prompts() if hashlib.blake2b(p.encode()).digest()[0] % 3 == 0]
    if split == "train":
        return tuple(sorted(set(all_prompts()) - set(unseen), key=_shuffled))
    ordered = sorted(unseen, key=_shuffled)
    splits = {"validation": ordered[:NUM_VALIDATION], "held-out": ordered[NUM_VALIDATION:]}
    return tuple(splits[split])


def _shuffled(prompt: str) -> bytes:
    """Sort key that mixes all kinds of prompts: the first n prompts represent the whole split."""
    return hashlib.blake2b(prompt.encode(), salt=b"order").digest()
