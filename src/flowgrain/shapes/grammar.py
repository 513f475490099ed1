"""The prompts of the shapes world: a small grammar, its parser, and the split into training, validation and held-out prompts."""

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import product

NUMBERS = ("one", "two", "three", "four")
COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta")
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("above", "below", "left of", "right of")

_LINKS = ("and", "above", "below", "left", "right", "of")
VOCABULARY = ("<pad>", *NUMBERS, *COLOURS, *SHAPES, *(s + "s" for s in SHAPES), *_LINKS)
MAX_WORDS = 6


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: `objects` as (colour, shape) indices, and how the first stands to the second, if it says."""

    objects: tuple[tuple[int, int], ...]
    relation: str | None = None


@cache
def parse(prompt: str) -> Scene:
    """The scene that `prompt` describes. Raises ValueError, with an example, for a prompt outside the grammar."""
    words = prompt.split()
    numeral = words[0] if words else ""
    if numeral in NUMBERS and len(words) == 3:
        count = NUMBERS.index(numeral) + 1
        shape = words[2] if count == 1 else words[2].removesuffix("s")
        if words[1] in COLOURS and shape in SHAPES and (count == 1) == (shape == words[2]):
            return Scene(((COLOURS.index(words[1]), SHAPES.index(shape)),) * count)
    middle = " ".join(words[2:-2])
    if len(words) >= 5 and middle in ("and", *RELATIONS):
        pairs = ((words[0], words[1]), (words[-2], words[-1]))
        if all(colour in COLOURS and shape in SHAPES for colour, shape in pairs):
            objects = tuple((COLOURS.index(colour), SHAPES.index(shape)) for colour, shape in pairs)
            return Scene(objects, None if middle == "and" else middle)
    if len(words) > MAX_WORDS:
        raise ValueError(f"the prompt {prompt!r} has {len(words)} words; the shapes model reads {MAX_WORDS} at most")
    raise ValueError(
        f"the shapes model cannot read the prompt {prompt!r}; it knows prompts such as 'three green circles', "
        "'red square and blue circle' or 'yellow triangle above cyan square'"
    )


def tokenize(prompt: str) -> list[int]:
    """Word indices of `prompt`, padded with 0 to MAX_WORDS. Raises ValueError like `parse`."""
    parse(prompt)
    words = [VOCABULARY.index(word) for word in prompt.split()]
    return words + [0] * (MAX_WORDS - len(words))


@cache
def all_prompts() -> tuple[str, ...]:
    """Every prompt of the grammar, in a fixed order. Pairs name two different things."""
    counts = [
        f"{number} {colour} {shape}{'' if number == 'one' else 's'}" for number, colour, shape in product(NUMBERS, COLOURS, SHAPES)
    ]
    things = [f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]
    pairs = [f"{a} {word} {b}" for word in ("and", *RELATIONS) for a, b in product(things, things) if a != b]
    return tuple(counts + pairs)


VALIDATION = 256


@cache
def prompts(split: str) -> tuple[str, ...]:
    """The prompts of `split`: "train", "validation" (settings are chosen on these) or "held-out" (results are reported on these).

    About a third of all prompts, picked by a hash of the text, is not trained on; the first VALIDATION of them validate.
    """
    aside = [p for p in all_prompts() if hashlib.blake2b(p.encode()).digest()[0] % 3 == 0]
    chosen = sorted(set(all_prompts()) - set(aside) if split == "train" else aside, key=_shuffled)
    return tuple({"train": chosen, "validation": chosen[:VALIDATION], "held-out": chosen[VALIDATION:]}[split])


def _shuffled(prompt: str) -> bytes:
    """A hash order mixes counts, pairs and relations, so that the first n prompts are a fair sample of all."""
    return hashlib.blake2b(prompt.encode(), salt=b"order").digest()
