"""Which prompts and which noise a step takes: functions of (seed, step, ...) alone, so that a resume is a step number."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrain.rewards import Prompt, fields_of
from flowgrain.core.rollout import Noise
from flowgrain.config.schema import SettingsError, existing_file
from flowgrain.core.tree import Ints

TEXT_FIELDS = ("prompt", "text", "caption", "prompt_en")
"""Names under which files keep a prompt's text, the first that is there counts."""


def read_prompts(setting: str, path: str) -> list[Prompt]:
    """The prompts of a file, in its order, repeats included, with whatever other fields stand beside them.

    .jsonl, .json (a list), .csv and .parquet hold the text in a field `prompt`, `text`, `caption` or `prompt_en`; any other
    name is read as text, a line each. Raises SettingsError for a file that is missing, empty or not readable, and for a
    blank prompt, with its line.
    """
    file = existing_file(setting, path)
    try:
        if file.suffix.lower() == ".parquet":
            numbered = list(_from_parquet(file))
        else:
            kind = {".jsonl": _from_jsonl, ".json": _from_json, ".csv": _from_csv}.get(file.suffix.lower(), _from_lines)
            numbered = list(kind(file.read_bytes().decode("utf-8-sig")))  # not read_text, which ends lines at a bare CR too
    except UnicodeDecodeError as error:
        raise SettingsError(f"{setting}={path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (ValueError, csv.Error) as error:
        raise SettingsError(f"{setting}={path}: {error}") from None
    if not numbered:
        raise SettingsError(f"{setting}={path}: the file is empty; write a prompt on each line")
    for number, prompt in numbered:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise SettingsError(f"{setting}={path}: line {number} holds half a character (a lone surrogate); mend it")
        if not prompt.strip():
            raise SettingsError(f"{setting}={path}: line {number} is blank; write a prompt there or delete the line")
    return [Prompt(prompt.strip(), fields_of(prompt)) for _, prompt in numbered]


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines: a prompt may hold one of the rarer characters that it takes for the end of a line.
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
                f"line {number} is no JSON ({error.msg}); write an object with a field `prompt` on each line"
            ) from None


def _from_json(text: str) -> Iterator[tuple[int, Prompt]]:
    found = json.loads(text)
    if not isinstance(found, list):
        raise ValueError("holds no list; write a list of prompts, or of objects with a field `prompt`")
    for number, row in enumerate(found, 1):
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
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"is no Parquet file ({error})") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield number, _prompt(row, number)


def _prompt(row: Any, number: int) -> Prompt:
    name = next((name for name in TEXT_FIELDS if isinstance(row, dict) and name in row), None)
    if name is None or not isinstance(row[name], str):
        raise ValueError(f"line {number} has no field `prompt` with a text in it (nor {', '.join(TEXT_FIELDS[1:])})")
    return Prompt(row[name], {key: value for key, value in row.items() if key != name})


def prompts_of_step(prompts: Sequence[str], step: int, count: int, seed: int) -> list[str]:
    """The `count` prompts of training step `step` (from 1): every epoch goes once through all of them, in its own order."""
    positions = range((step - 1) * count, step * count)
    orders: dict[int, NDArray[np.int64]] = {}
    chosen = []
    for position in positions:
        epoch, place = divmod(position, len(prompts))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(prompts))
        chosen.append(prompts[orders[epoch][place]])
    return chosen


def latent_noise(shape: Sequence[int], *key: int | str) -> Tensor:
    """Standard normal noise of `shape`, a function of `key` alone, drawn on the CPU: the same on any device and any layout."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(tuple(shape), generator=generator)


def keyed_noise(shape: Sequence[int], *key: int | str) -> Noise:
    """The noise of a tree under `key`. A prompt is known by its place in the tree, a draw by its place in the plan."""

    def noise(prompt: Ints, draw: Ints) -> Tensor:
        return torch.stack([latent_noise(shape, *key, int(p), int(d)) for p, d in zip(prompt, draw, strict=True)])

    return noise
