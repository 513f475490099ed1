"""The contract of a reward, the names of the bundled ones, and the guard around every call."""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

Reward = Callable[[Tensor, list[str]], "Tensor | ArrayLike"]
"""reward(images [I, 3, H, W] in 0..1, prompts of length I) -> I scores, NaN where an image could not be scored."""


@runtime_checkable
class Explains(Protocol):
    """A reward that can also say what is wrong with an image."""

    def failures(self, images: Tensor, prompts: list[str]) -> dict[str, np.ndarray]:
        """For each kind of failure, which of the I images show it, [I] booleans."""
        ...


REWARDS = {
    "oracle": "flowgrain.rewards.shapes:Oracle",
    "towers": "flowgrain.rewards.shapes:Towers",
    "preference": "flowgrain.rewards.shapes:Preference",
    "clip": "flowgrain.rewards.clip:ClipScore",
    "pickscore": "flowgrain.rewards.clip:PickScore",
    "hps": "flowgrain.rewards.clip:HPS",
    "aesthetic": "flowgrain.rewards.clip:Aesthetic",
    "geneval": "flowgrain.rewards.geneval:GenEval",
    "judge": "flowgrain.rewards.judge:Judge",
    "remote": "flowgrain.rewards.service:Remote",
}
"""Known rewards: a class each, whose docstring says range, source and licence."""

OF_SHAPES = ("oracle", "towers", "preference")
"""Those of the bundled world, which take no weights but their own."""


@dataclass(frozen=True)
class RewardSource:
    """Where a reward's weights are (a folder or hub name, and behind # a checkpoint file) and where it runs."""

    model: str | None = None
    device: str = "cpu"
    allow_pickle: bool = False


def load_reward(name: str, source: RewardSource | None = None) -> Reward:
    """The known reward `name`, or one's own as package.module:name (a function, or a class to be called without arguments).

    Raises ValueError for a name that leads nowhere, or weights that are not there.
    """
    path = REWARDS.get(name, name)
    module, _, attribute = path.partition(":")
    if not attribute:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(REWARDS)}; your own: package.module:function"
        raise ValueError(f"rewards={name}: there is no such reward; {hint}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # one's own reward lies beside the recipe as a rule
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"rewards={name}: cannot be loaded ({error}); write it as package.module:function") from error
    if name in REWARDS and name not in OF_SHAPES:
        found = found(source or RewardSource())
    reward: Reward = found() if isinstance(found, type) else found
    if not callable(reward):
        raise ValueError(f"rewards={name}: is {type(reward).__name__} and cannot be called; name a function (images, prompts)")
    return reward


@dataclass(frozen=True)
class Scores:
    """values [I] in fp32, NaN where a sample failed; the number of failures, and what the first one was."""

    values: Tensor
    failed: int
    reason: str | None


def score(reward: Reward, images: Tensor, prompts: Sequence[str], batch: int = 256) -> Scores:
    """Calls `reward` on `batch` images at a time. A failure is a NaN for the images of its call and a count, never a 0."""
    parts = [
        _score_once(reward, images[first : first + batch], list(prompts[first : first + batch]))
        for first in range(0, len(images), batch)
    ]
    return Scores(
        values=torch.cat([part.values for part in parts]),
        failed=sum(part.failed for part in parts),
        reason=next((part.reason for part in parts if part.reason), None),
    )


def _score_once(reward: Reward, images: Tensor, prompts: list[str]) -> Scores:
    def lost(reason: str) -> Scores:
        return Scores(torch.full((len(images),), torch.nan), len(images), reason)

    try:
        given = reward(images, prompts)
    except Exception as error:  # a reward is foreign code: whatever it raises must not end the run
        return lost(f"{type(error).__name__}: {error}")
    try:
        values = given.detach().cpu().float() if isinstance(given, Tensor) else torch.from_numpy(np.array(given, dtype=np.float32))
    except Exception as error:  # numpy asks foreign objects, which may raise anything too
        return lost(f"returned {type(given).__name__}, which is no list of numbers ({error})")
    if values.shape != (len(images),):
        return lost(f"returned shape {list(values.shape)} for {len(images)} images; one number an image is expected")
    whole = images.isfinite().flatten(1).all(1).cpu()  # no reward is asked to notice a broken image
    values = torch.where(values.isfinite() & whole, values, torch.nan)
    failed = int(values.isnan().sum())
    return Scores(values, failed, "NaN or infinity in the scores or the images" if failed else None)
