"""Prompt files, and the prompts and noise of a training step.

The prompts and the noise of a step are functions of the seed and the step number, so a resumed run
needs only its step number.
"""

import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrain.core.rollout import Noise
from flowgrain.core.tree import Ints
from flowgrain.settings import SettingsError, nearest, one_line, printable

TEXT_FIELDS = ("prompt", "text", "caption", "prompt_en")
"""Column names that may hold the text of a prompt. The first name that a file has is used."""


@dataclass(frozen=True)
class Prompt:
    """A prompt: its text, and the other columns of its prompt file, which some rewards need."""

    text: str
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)


def as_prompts(prompts: Sequence[str | Prompt]) -> list[Prompt]:
    """`prompts` with plain strings wrapped as `Prompt`."""
    return [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def existing_file(setting: str, value: str, kind: str = "text file") -> Path:
    """`value` as the path of an existing file. `kind`: what it should be, for messages.

    Raises:
        SettingsError: there is no such file. The message contains `setting` and the file with the
            nearest name.
    """
    path, value = Path(value), printable(value)
    try:
        path = path.expanduser()
        if path.is_file():
            return path
        if path.is_dir():
            raise SettingsError(f"{setting}={value}: is a directory. Give the path of a {kind}.")
        if path.exists():
            raise SettingsError(f"{setting}={value}: not a regular file. Use a {kind}.")
    except (OSError, RuntimeError) as error:  # a name that is too long, an unknown user
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{setting}={value}: not the path of a file ({reason}).") from None
    siblings: list[str] = []
    with contextlib.suppress(OSError):  # a directory that cannot be listed
        siblings = [p.name for p in path.parent.iterdir()]
    close = nearest(path.name, siblings)
    hint = f"Did you mean {path.parent / close}?" if close else f"Give the path of a {kind}."
    raise SettingsError(f"{setting}={value}: there is no such file. {hint}")


def read_prompts(setting: str, path: str) -> list[Prompt]:
    """The prompts of a file in order, including repeats, with their other columns.

    .jsonl, .json (a list), .csv and .parquet files contain the text in a column named `prompt`,
    `text`, `caption` or `prompt_en`. Any other file is a text file with one prompt per line.

    Raises:
        SettingsError: the file is missing, empty or unreadable, or a prompt is blank. The message
            names the line.
    """
    file = existing_file(setting, path)
    readers: dict[str, Callable[[str], Iterator[tuple[int, Prompt]]]]
    readers = {".jsonl": _from_jsonl, ".json": _from_json, ".csv": _from_csv}
    try:
        if file.suffix.lower() == ".parquet":
            numbered = list(_from_parquet(file))
        else:  # bytes, because read_text also ends lines at a bare carriage return
            text = file.read_bytes().decode("utf-8-sig")
            numbered = list(readers.get(file.suffix.lower(), _from_lines)(text))
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{setting}={path}: not UTF-8 text ({error.reason} at byte {error.start}). "
            "Save it as UTF-8."
        ) from None
    except RecursionError:
        raise SettingsError(f"{setting}={path}: too deeply nested. Write a flat list.") from None
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{setting}={path}: cannot be read: {reason}") from None
    if not numbered:
        raise SettingsError(f"{setting}={path}: the file is empty. Write one prompt per line.")
    for number, prompt in numbered:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt.text):
            raise SettingsError(
                f"{setting}={path}: line {number} contains a lone surrogate. "
                "Replace this character."
            )
        if not prompt.text.strip():
            raise SettingsError(
                f"{setting}={path}: line {number} is blank. Write a prompt or delete the line."
            )
    return [Prompt(prompt.text.strip(), prompt.fields) for _, prompt in numbered]


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines, which also ends lines at rare characters that a prompt may contain.
    yield from enumerate(text.rstrip().split("\n") if text.strip() else (), 1)


def _from_lines(text: str) -> Iterator[tuple[int, Prompt]]:
    for number, line in _lines(text):
        yield number, Prompt(line)


def _from_jsonl(text: str) -> Iterator[tuple[int, Prompt]]:
    for number, line in _lines(text):
        try:
            yield number, _prompt(json.loads(line), number)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number} is not JSON ({error.msg}). "
                "Write one object with a `prompt` field per line."
            ) from None


def _from_json(text: str) -> Iterator[tuple[int, Prompt]]:
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError(
            "not a list. Write a list of prompts, or of objects with a `prompt` field."
        )
    for number, row in enumerate(rows, 1):
        yield number, Prompt(row) if isinstance(row, str) else _prompt(row, number)


def _from_csv(text: str) -> Iterator[tuple[int, Prompt]]:
    rows = csv.DictReader(io.StringIO(text), strict=True)
    for row in rows:
        yield rows.line_num, _prompt(row, rows.line_num)


def _from_parquet(file: Path) -> Iterator[tuple[int, Prompt]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"not a Parquet file ({one_line(error)})") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield number, _prompt(row, number)


def _prompt(row: Any, number: int) -> Prompt:
    name = next((name for name in TEXT_FIELDS if isinstance(row, dict) and name in row), None)
    if name is None or not isinstance(row[name], str):
        raise ValueError(
            f"line {number} has no `prompt` field with text. "
            f"Write the text in one of the fields {', '.join(TEXT_FIELDS)}."
        )
    return Prompt(row[name], {key: value for key, value in row.items() if key != name})


def prompts_of_step(prompts: Sequence[Prompt], step: int, count: int, seed: int) -> list[Prompt]:
    """The `count` prompts of training step `step` (from 1).

    Every epoch visits all prompts once, in a new random order.
    """
    orders: dict[int, NDArray[np.int64]] = {}
    chosen = []
    for position in range((step - 1) * count, step * count):
        epoch, place = divmod(position, len(prompts))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(prompts))
        chosen.append(prompts[orders[epoch][place]])
    return chosen


def latent_noise(shape: Sequence[int], *key: int | str) -> Tensor:
    """Standard normal noise of `shape`, determined by `key`.

    It is drawn on the CPU, so it is the same on every device.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(tuple(shape), generator=generator)


def keyed_noise(shape: Sequence[int], *key: int | str) -> Noise:
    """The noise source of a tree, determined by `key`.

    A sample depends on `key`, the position of the prompt in the batch, and the number of the draw
    in the plan.
    """

    def noise(prompt: Ints, draw: Ints) -> Tensor:
        pairs = zip(prompt, draw, strict=True)
        return torch.stack([latent_noise(shape, *key, int(p), int(d)) for p, d in pairs])

    return noise
