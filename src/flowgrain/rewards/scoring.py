"""Scoring of images by rewards. An error in a reward does not end a run. The scores are NaN.

Letters: I images.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowgrain.data import Prompt, as_prompts
from flowgrain.rewards.base import Explains, Explanation, Reward

BATCH_SIZE = 256
"""Default number of images in one call of a reward."""

NOT_FINITE = "NaN or infinity in the scores or the images"
"""Reason of a failure without an exception: NaN from the reward, or NaN in the image."""


@dataclass(frozen=True)
class Scores:
    """Scores of images by one reward.

    Attributes:
        values: scores [I] in float32, NaN where scoring failed.
        failed: number of images without a score.
        reason: reason of the first failure, or None.
    """

    values: Tensor
    failed: int
    reason: str | None

    @classmethod
    def concatenate(cls, parts: "Sequence[Scores]") -> "Scores":
        """The scores of consecutive batches of images as one object."""
        reason = next((part.reason for part in parts if part.reason), None)
        values = torch.cat([part.values for part in parts])
        return cls(values, sum(part.failed for part in parts), reason)


class PartScores(NamedTuple):
    """Scores of images, with the parts that the reward explains.

    Attributes:
        scores: the scores.
        parts: values [I] by part. NaN: no score, or the image does not have this part.
        part_weights: weights [I] in the mean of a part, for parts that have weights.
    """

    scores: Scores
    parts: dict[str, Tensor]
    part_weights: dict[str, Tensor]


def score(
    reward: Reward, images: Tensor, prompts: Sequence[str | Prompt], batch_size: int = BATCH_SIZE
) -> Scores:
    """Scores of images by a reward.

    After an exception or a result with a wrong shape, all images of this call have the score NaN.
    A non-finite score becomes NaN. A failure never becomes 0.

    Args:
        reward: the reward.
        images: images [I, 3, H, W] in 0..1.
        prompts: prompt of each image.
        batch_size: images in one call of the reward.
    """
    prompts = as_prompts(prompts)
    return Scores.concatenate(
        [
            _score_batch(reward, images[i : i + batch_size], prompts[i : i + batch_size])
            for i in range(0, len(images), batch_size)
        ]
    )


def score_with_parts(
    reward: Reward, images: Tensor, prompts: Sequence[str | Prompt], batch_size: int = BATCH_SIZE
) -> PartScores:
    """Like `score`, with the parts of the scores if the reward implements `Explains`."""
    prompts = as_prompts(prompts)
    if not isinstance(reward, Explains):
        return PartScores(score(reward, images, prompts, batch_size), {}, {})
    batches = [
        _explain_batch(reward, images[i : i + batch_size], prompts[i : i + batch_size])
        for i in range(0, len(images), batch_size)
    ]
    scores = Scores.concatenate([batch for batch, _ in batches])
    parts = _columns([(len(b.values), e.parts if e else {}) for b, e in batches], torch.nan)
    weights = _columns([(len(b.values), e.part_weights if e else {}) for b, e in batches], 0.0)
    missing = scores.values.isnan()
    return PartScores(
        scores,
        {name: values.masked_fill(missing, torch.nan) for name, values in parts.items()},
        {name: weights[name] for name in parts if name in weights},
    )


class Scorer:
    """Scores images that arrive in chunks, by several rewards.

    In the background, each reward has one thread. A reward is therefore never called twice at the
    same time. Use it as a context manager, which ends the threads.

    Args:
        rewards: rewards by name.
        batch_sizes: images in one call of a reward, by name. Default: 256.
        background: score in threads while the caller continues. Otherwise score in `submit`.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        batch_sizes: Mapping[str, int] | None = None,
        background: bool = True,
    ) -> None:
        self.rewards, self.batch_sizes = rewards, dict(batch_sizes or {})
        self.threads = {name: ThreadPoolExecutor(1) for name in rewards} if background else {}
        self.chunks: dict[str, list[Scores | Future[Scores]]] = {name: [] for name in rewards}

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self.threads.values():
            thread.shutdown(cancel_futures=True)

    def submit(self, images: Tensor, prompts: Sequence[str | Prompt]) -> None:
        """Score `images` [I, 3, H, W] now, or start scoring in the background."""
        for name, reward in self.rewards.items():
            batch_size = self.batch_sizes.get(name, BATCH_SIZE)
            if self.threads:
                future = self.threads[name].submit(score, reward, images, prompts, batch_size)
                self.chunks[name].append(future)
            else:
                self.chunks[name].append(score(reward, images, prompts, batch_size))

    def results(self) -> dict[str, Scores]:
        """The scores of all submitted images by reward, in the order of submission.

        Waits for the threads.
        """
        return {
            name: Scores.concatenate(
                [chunk.result() if isinstance(chunk, Future) else chunk for chunk in chunks]
            )
            for name, chunks in self.chunks.items()
        }


def _score_batch(reward: Reward, images: Tensor, prompts: list[Prompt]) -> Scores:
    try:
        values = reward(images, prompts)
    except Exception as error:  # user code may raise anything
        return _failed(len(images), f"{type(error).__name__}: {error}")
    return _checked(values, images)


def _explain_batch(
    reward: Explains, images: Tensor, prompts: list[Prompt]
) -> tuple[Scores, Explanation | None]:
    try:
        explanation = reward.explain(images, prompts)
        for name, values in (*explanation.parts.items(), *explanation.part_weights.items()):
            if len(values) != len(images):
                raise ValueError(f"part {name!r} has {len(values)} values for {len(images)} images")
        scores = explanation.scores
    except Exception as error:  # user code may raise anything
        return _failed(len(images), f"{type(error).__name__}: {error}"), None
    return _checked(scores, images), explanation


def _columns(batches: list[tuple[int, Mapping[str, Tensor]]], missing: float) -> dict[str, Tensor]:
    """Concatenated columns of batches (size, columns by name). `missing` fills missing columns."""
    names = dict.fromkeys(name for _, columns in batches for name in columns)
    return {
        name: torch.cat(
            [
                torch.as_tensor(columns[name]).cpu().float()
                if name in columns
                else torch.full((size,), missing)
                for size, columns in batches
            ]
        )
        for name in names
    }


def _failed(count: int, reason: str) -> Scores:
    return Scores(torch.full((count,), torch.nan), count, reason)


def _checked(returned: Any, images: Tensor) -> Scores:
    """The result of a reward as float32 scores. NaN for non-finite scores and non-finite images."""
    try:
        if isinstance(returned, Tensor):
            values = returned.detach().cpu().float()
        else:
            values = torch.from_numpy(np.array(returned, dtype=np.float32))
    except (
        Exception
    ) as error:  # numpy calls methods of the returned object, which may raise anything
        return _failed(
            len(images),
            f"the reward returned {type(returned).__name__}, not a list of numbers ({error})",
        )
    if values.shape != (len(images),):
        return _failed(
            len(images),
            f"the reward returned shape {list(values.shape)} for {len(images)} images, "
            f"not [{len(images)}]",
        )
    finite = values.isfinite() & images.isfinite().flatten(1).all(1).cpu()
    values = torch.where(finite, values, torch.nan)
    failed = int(values.isnan().sum())
    return Scores(values, failed, NOT_FINITE if failed else None)
