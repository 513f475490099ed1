"""Which prompts and which noise a step takes: functions of (seed, step, ...) alone, so that a resume is a step number."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrain.rollout import Noise
from flowgrain.settings import SettingsError, existing_file
from flowgrain.tree import Ints


def read_prompts(setting: str, path: str) -> list[str]:
    """The prompts of a text file, a line each. Raises SettingsError for a file that is missing or empty, or a blank line."""
    file: Path = existing_file(setting, path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SettingsError(f"{setting}={path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    if not lines:
        raise SettingsError(f"{setting}={path}: the file is empty; write a prompt on each line")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise SettingsError(f"{setting}={path}: line {number} is blank; write a prompt there or delete the line")
    return [line.strip() for line in lines]


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
