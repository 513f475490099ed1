"""The contract of a reward, the names of the bundled ones, and the guard around every call."""

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


class Prompt(str):
    """A prompt's text and, in `fields`, what else its file says of it, for rewards that need that."""

    fields: Mapping[str, Any]

    def __new__(cls, text: str, fields: Mapping[str, Any] | None = None) -> "Prompt":
        prompt = super().__new__(cls, text)
        prompt.fields = fields or {}
        return prompt


def fields_of(prompt: str) -> Mapping[str, Any]:
    """What the prompt file says of `prompt` beside its text; nothing for a bare text."""
    return prompt.fields if isinstance(prompt, Prompt) else {}


Reward = Callable[[Tensor, list[str]], "Tensor | ArrayLike"]
"""reward(images [I, 3, H, W] in 0..1, prompts of length I) -> I scores, NaN where an image could not be scored."""


@dataclass(frozen=True)
class Explained:
    """scores [I], and by part (a task, a dimension, a kind of failure) values [I], NaN where an image has no such part.

    weights: by part [I], how much an image counts in the part's mean; 1 where it is not given.
    """

    scores: "Tensor | ArrayLike"
    parts: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Explains(Protocol):
    """A reward that can also take its scores apart."""

    mean_of_parts: bool
    """Whether the benchmark's overall result is the mean over its parts, and not over images."""

    def explain(self, images: Tensor, prompts: list[str]) -> Explained:
        """What a call gives, and its parts."""
        ...


REWARDS = {
    "oracle": "flowgrain.rewards.shapes:Oracle",
    "towers": "flowgrain.rewards.shapes:Towers",
    "preference": "flowgrain.rewards.shapes:Preference",
    "clip": "flowgrain.rewards.clip:ClipScore",
    "pickscore": "flowgrain.rewards.clip:PickScore",
    "hps": "flowgrain.rewards.clip:HPS",
    "aesthetic": "flowgrain.rewards.clip:Aesthetic",
    "imagereward": "flowgrain.rewards.imagereward:ImageReward",
    "ocr": "flowgrain.rewards.ocr:OCR",
    "geneval": "flowgrain.rewards.geneval:GenEval",
    "judge": "flowgrain.rewards.judge:Judge",
    "unifiedreward": "flowgrain.rewards.judge:UnifiedReward",
    "unigenbench": "flowgrain.rewards.judge:UniGenBench",
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
    template: str | None = None
    """Of a judge: the file with the question."""


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

    @classmethod
    def joined(cls, parts: "Sequence[Scores]") -> "Scores":
        """The scores of consecutive images as one."""
        reason = next((part.reason for part in parts if part.reason), None)
        return cls(torch.cat([part.values for part in parts]), sum(part.failed for part in parts), reason)


MASKED = "NaN or infinity in the scores or the images"
"""The reason of a sample that the reward itself, or a broken image, left without a score."""


def score(reward: Reward, images: Tensor, prompts: Sequence[str], batch: int = 256) -> Scores:
    """Calls `reward` on `batch` images at a time. A failure is a NaN for the images of its call and a count, never a 0."""
    return Scores.joined(
        [
            _score_once(reward, images[first : first + batch], list(prompts[first : first + batch]))
            for first in range(0, len(images), batch)
        ]
    )


class Scoring:
    """Asks rewards about images that come part by part; in the background a thread a reward, which never sees two calls at once."""

    def __init__(self, rewards: Mapping[str, Reward], batch: int, background: bool) -> None:
        self.rewards, self.batch = rewards, batch
        self.threads = {name: ThreadPoolExecutor(1) for name in rewards} if background else {}
        self.asked: dict[str, list[Scores | Future[Scores]]] = {name: [] for name in rewards}

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self.threads.values():
            thread.shutdown(cancel_futures=True)

    def ask(self, images: Tensor, prompts: list[str]) -> None:
        """Has `images` [I, 3, H, W] scored, now or while the caller goes on."""
        for name, reward in self.rewards.items():
            call = (score, reward, images, prompts, self.batch)
            self.asked[name].append(self.threads[name].submit(*call) if self.threads else score(*call[1:]))

    def answers(self) -> dict[str, Scores]:
        """The scores of all images asked about, by reward, in the order of the questions. Waits for those under way."""
        return {
            name: Scores.joined([one.result() if isinstance(one, Future) else one for one in parts])
            for name, parts in self.asked.items()
        }


def explained(
    reward: Reward, images: Tensor, prompts: Sequence[str], batch: int = 256
) -> tuple[Scores, dict[str, Tensor], dict[str, Tensor]]:
    """Like `score`, with the parts [I] and their weights [I] of a reward that has them; an image that failed has none."""
    if not isinstance(reward, Explains):
        return score(reward, images, prompts, batch), {}, {}
    whole, calls = reward, []

    def remember(images: Tensor, prompts: list[str]) -> Any:
        calls.append((len(images), None))
        found = whole.explain(images, prompts)
        for name, values in (*found.parts.items(), *found.weights.items()):
            if len(values) != len(images):
                raise ValueError(f"its part {name} has {len(values)} values for {len(images)} images")
        calls[-1] = (len(images), found)
        return found.scores

    scores = score(remember, images, prompts, batch)
    names = list(dict.fromkeys(name for _, found in calls if found is not None for name in found.parts))

    def joined(kind: str, name: str, otherwise: float) -> Tensor:
        pieces = [(count, getattr(found, kind).get(name) if found is not None else None) for count, found in calls]
        return torch.cat([torch.as_tensor(p).cpu().float() if p is not None else torch.full((n,), otherwise) for n, p in pieces])

    lost = scores.values.isnan()
    parts = {name: joined("parts", name, torch.nan).masked_fill(lost, torch.nan) for name in names}
    weighted = {name for _, found in calls if found is not None for name in found.weights}
    return scores, parts, {name: joined("weights", name, 0.0) for name in names if name in weighted}


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
    return Scores(values, failed, MASKED if failed else None)
