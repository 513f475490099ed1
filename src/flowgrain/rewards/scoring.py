"""Scoring of images by rewards. An error in a reward does not end a run. The scores are NaN.

Letters: I images.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from flowgrain.core.tree import Ints
from flowgrain.data import Prompt, as_prompts
from flowgrain.registry import describe
from flowgrain.rewards.base import Explains, Explanation, GroupReward, Reward, Unscored
from flowgrain.rewards.workers import Workers

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
        reason: reason of the first failure, or None. An error of the reward goes before scores
            that are not finite.
        gave_up: the reward is not called again in the same step.
    """

    values: Tensor
    failed: int
    reason: str | None
    gave_up: bool = False

    @classmethod
    def concatenate(cls, parts: "Sequence[Scores]") -> "Scores":
        """The scores of consecutive batches of images as one object."""
        reasons = [part.reason for part in parts if part.reason]
        reason = next((reason for reason in reasons if reason != NOT_FINITE), None)
        values = torch.cat([part.values for part in parts]) if parts else torch.empty(0)
        failed, gave_up = sum(part.failed for part in parts), any(part.gave_up for part in parts)
        return cls(values, failed, reason or next(iter(reasons), None), gave_up)


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
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str | Prompt],
    batch_size: int = BATCH_SIZE,
    groups: Sequence[int] | Ints | None = None,
) -> Scores:
    """Scores of images by a reward.

    After an exception or a result with a wrong shape, all images of this call have the score NaN.
    A non-finite score becomes NaN. A failure never becomes 0. Every call gets a copy of its images,
    so that a reward that changes them in place does not change the images of other rewards.

    Args:
        reward: the reward.
        images: images [I, 3, H, W] in 0..1.
        prompts: prompt of each image.
        batch_size: images in one call of the reward. A `GroupReward` gets one group in a call.
        groups: number [I] of the group of each image, for a `GroupReward`. Default: images of the
            same prompt.
    """
    prompts = as_prompts(prompts)
    if isinstance(reward, GroupReward):
        return _score_groups(reward, images, prompts, groups)
    return Scores.concatenate(
        [scores for scores, _ in _batches(reward, images, prompts, batch_size, False)]
    )


def score_with_parts(
    reward: Reward, images: Tensor, prompts: Sequence[str | Prompt], batch_size: int = BATCH_SIZE
) -> PartScores:
    """Like `score`, with the parts of the scores if the reward implements `Explains`."""
    prompts = as_prompts(prompts)
    if not isinstance(reward, Explains):
        return PartScores(score(reward, images, prompts, batch_size), {}, {})
    batches = list(_batches(reward, images, prompts, batch_size, True))
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
    same time. Use it as a context manager, which ends the threads. After an exception it does not
    wait for them: a reward that hangs keeps neither the caller nor the process alive.

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
        self.threads = {name: Workers(1) for name in rewards} if background else {}
        self.chunks: dict[str, list[Scores | Future[Scores]]] = {name: [] for name in rewards}
        self.given_up: dict[str, str] = {}

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for thread in self.threads.values():
            thread.close(wait=kind is None)

    def submit(
        self,
        images: Tensor,
        prompts: Sequence[str | Prompt],
        groups: Sequence[int] | Ints | None = None,
    ) -> None:
        """Score `images` [I, 3, H, W] now, or start scoring in the background.

        A chunk contains whole groups. `groups` [I] are their numbers, see `score`.
        """
        for name in self.rewards:
            if self.threads:
                future = self.threads[name].submit(self._score, name, images, prompts, groups)
                self.chunks[name].append(future)
            else:
                self.chunks[name].append(self._score(name, images, prompts, groups))

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

    def _score(
        self,
        name: str,
        images: Tensor,
        prompts: Sequence[str | Prompt],
        groups: Sequence[int] | Ints | None,
    ) -> Scores:
        """The scores of a chunk. A reward that gave up is not called again."""
        if name in self.given_up:
            return _failed(len(images), self.given_up[name], gave_up=True)
        size = self.batch_sizes.get(name, BATCH_SIZE)
        scores = score(self.rewards[name], images, prompts, size, groups)
        if scores.gave_up:
            self.given_up[name] = str(scores.reason)
        return scores


def _batches(
    reward: Reward, images: Tensor, prompts: list[Prompt], batch_size: int, explain: bool
) -> Iterator[tuple[Scores, Explanation | None]]:
    """Scores of all batches, up to the end or until the reward gives up."""
    reason = None
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        if reason is not None:
            yield _failed(len(batch), reason, gave_up=True), None
            continue
        scores, explanation = _call(reward, batch, prompts[first : first + batch_size], explain)
        reason = scores.reason if scores.gave_up else None
        yield scores, explanation


def _score_groups(
    reward: GroupReward,
    images: Tensor,
    prompts: list[Prompt],
    groups: Sequence[int] | Ints | None,
) -> Scores:
    """Scores by a reward that gets one group in a call. After it gives up it is not called."""
    if groups is None:
        groups = [prompts.index(prompt) for prompt in prompts]
    values, parts = torch.full((len(images),), torch.nan), list[Scores]()
    for group in dict.fromkeys(map(int, groups)):
        places = torch.tensor([i for i, number in enumerate(groups) if number == group])
        prompt = prompts[int(places[0])]
        if parts and parts[-1].gave_up:
            parts.append(_failed(len(places), str(parts[-1].reason), gave_up=True))
            continue

        def compare(of_group: Tensor, _: Sequence[Prompt], prompt: Prompt = prompt) -> Any:
            return reward.score_group(of_group, prompt)

        parts.append(_call(compare, images[places], [prompt] * len(places), False)[0])
        values[places] = parts[-1].values
    return replace(Scores.concatenate(parts), values=values)


def _call(
    reward: Reward, images: Tensor, prompts: list[Prompt], explain: bool
) -> tuple[Scores, Explanation | None]:
    """The result of one call of a reward, on a copy of the images."""
    failure: Unscored | None = None
    result: Any = None
    try:
        if explain:
            assert isinstance(reward, Explains)
            result = reward.explain(images.clone(), prompts)
        else:
            assert not isinstance(reward, GroupReward)  # see `score`
            result = reward(images.clone(), prompts)
    except Unscored as error:
        failure, result = error, error.result
    except (Exception, SystemExit) as error:  # user code may raise anything
        return _failed(len(images), describe(error)), None
    explanation = None
    if explain or isinstance(result, Explanation):
        try:
            explanation = _checked_parts(result, len(images))
        except (Exception, SystemExit) as error:  # user code may return anything
            return _failed(len(images), describe(error)), None
        result = explanation.scores
    scores = _checked(result, images)
    if failure is not None:
        scores = Scores(scores.values, scores.failed, str(failure), failure.gave_up)
    return scores, explanation


def _checked_parts(explanation: Any, count: int) -> Explanation:
    for name, values in (*explanation.parts.items(), *explanation.part_weights.items()):
        if len(values) != count:
            raise ValueError(f"part {name!r} has {len(values)} values for {count} images")
    return cast(Explanation, explanation)


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


def _failed(count: int, reason: str, gave_up: bool = False) -> Scores:
    return Scores(torch.full((count,), torch.nan), count, reason, gave_up)


def _checked(returned: Any, images: Tensor) -> Scores:
    """The result of a reward as float32 scores. NaN for non-finite scores and non-finite images."""
    if returned is None:
        return _failed(len(images), "the reward returned None. Add a return statement")
    try:
        if isinstance(returned, Tensor):
            values = returned.detach().cpu().float()
        else:
            values = torch.from_numpy(np.array(returned, dtype=np.float32))
    # numpy calls methods of the returned object, which may raise anything
    except (Exception, SystemExit) as error:
        texts = [returned, *returned] if isinstance(returned, list | tuple | str) else []
        text = next((value for value in texts if isinstance(value, str)), None)
        reason = f"{type(returned).__name__}, not a list of numbers ({error})"
        if text is not None:
            reason = f"texts such as {text[:20]!r}, not numbers"
        return _failed(len(images), f"the reward returned {reason}")
    if values.ndim == 0:
        return _failed(
            len(images),
            f"the reward returned one number for {len(images)} images. Return one per image, "
            "for example images.mean((1, 2, 3))",
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
