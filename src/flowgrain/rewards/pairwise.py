"""The reward `pairwise`: the share of comparisons that an image wins against images of its prompt.

This is the reward of Pref-GRPO (arXiv 2508.20751). A judge decides which of two images is better.

Letters: G images of a group, K pairs.
"""

import hashlib
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from flowgrain.core.tree import Ints
from flowgrain.data import Prompt
from flowgrain.registry import Registry, describe
from flowgrain.rewards.base import Unscored, build_registered
from flowgrain.rewards.options import OptionError
from flowgrain.settings import SettingsError

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Callable[..., Any])

PairJudge = Callable[[Tensor, Ints, Prompt], "Tensor | ArrayLike"]
"""judge(images [G, 3, H, W] in 0..1, pairs [K, 2], prompt) -> preferences [K] in 0..1.

A preference is the probability that image pairs[k, 0] is better than image pairs[k, 1]. 0.5 is a
tie, and NaN marks a failed comparison. All calls for a group get the same `images` object.
"""

PAIR_JUDGES: Registry[Callable[..., Any]] = Registry(
    "pairwise judge",
    "flowgrain.pair_judges",
    {
        "score": "flowgrain.rewards.pair_judges:ScoreDifference",
        "chat": "flowgrain.rewards.pair_judges:ChatJudge",
    },
)
"""Classes and functions of pairwise judges by name. Options work as for rewards."""


def register_pair_judge(name: str) -> Callable[[T], T]:
    """Decorator that registers a class or a function as the pairwise judge `name`.

    Example:
        >>> @register_pair_judge("brighter")
        ... def brighter(images, pairs, prompt, *, margin: float = 0.0):
        ...     light = images.mean((1, 2, 3))
        ...     return (light[pairs[:, 0]] > light[pairs[:, 1]] + margin).float()

    Raises:
        SettingsError: another pairwise judge has this name.
    """

    def add(judge: T) -> T:
        PAIR_JUDGES.register(name)(judge)
        return judge

    return add


class Pairwise:
    """Wins / comparisons of each image of a prompt, in 0..1. A tie is half a win.

    A failed comparison counts neither as a win nor as a loss. An image without a valid comparison
    has no score (NaN). The pairs depend only on `seed`, the prompt and the number of images.

    Args:
        judge: name of a pairwise judge, or a mapping with its name and its options.
        comparisons: opponents of each image, or "all" other images of the group. An odd number in a
            group of odd size is rounded up.
        both_orders: show each pair in both orders, which cancels a preference for a position. An
            image wins a pair if the mean of the two preferences is in its favor.
        pairs_per_call: largest number of pairs in one call of the judge.
        seed: seed of the opponents and of the order of the images in a pair.
    """

    def __init__(
        self,
        judge: str | dict[str, Any],
        comparisons: PositiveInt | Literal["all"] = "all",
        both_orders: bool = False,
        pairs_per_call: PositiveInt = 64,
        seed: NonNegativeInt = 0,
    ) -> None:
        self.judge = build_pair_judge(judge)
        self.comparisons, self.both_orders = comparisons, both_orders
        self.pairs_per_call, self.seed = pairs_per_call, seed
        self._failed, self._next_notice = 0, 1

    def score_group(self, images: Tensor, prompt: Prompt) -> Tensor:
        """Win rates [G] of the images [G, 3, H, W] in 0..1 of a prompt.

        Raises:
            Unscored: a comparison failed, or there is only one image.
        """
        count = len(images)
        if count < 2:
            reason = "the group has only one image, so there is nothing to compare it with"
            raise Unscored(reason, torch.full((count,), torch.nan))
        opponents = count - 1 if self.comparisons == "all" else self.comparisons
        pairs = drawn_pairs(count, opponents, _generator(self.seed, prompt.text))
        finite = images.isfinite().flatten(1).all(1).cpu().numpy()
        pairs = pairs[finite[pairs].all(1)]
        if self.both_orders:
            answers = self._compare(images, np.concatenate([pairs, pairs[:, ::-1]]), prompt)
            margin = answers.preferences[: len(pairs)] - answers.preferences[len(pairs) :]
        else:
            answers = self._compare(images, pairs, prompt)
            margin = answers.preferences - 0.5
        rates = win_rates(count, pairs, margin)
        if answers.reason is not None:
            self._report(int(margin.isnan().sum()), len(pairs), answers.reason)
            raise Unscored(answers.reason, rates, answers.gave_up)
        return rates

    def _compare(self, images: Tensor, pairs: Ints, prompt: Prompt) -> "_Answers":
        """The answers of the judge, `pairs_per_call` pairs at a time, until it gives up."""
        parts = [_Answers(torch.empty(0, dtype=torch.float64))]
        for first in range(0, len(pairs), self.pairs_per_call):
            batch = pairs[first : first + self.pairs_per_call]
            if parts[-1].gave_up:
                parts.append(parts[-1]._replace(preferences=_unknown(len(batch))))
            else:
                parts.append(_answers(self.judge, images, batch, prompt))
        preferences = torch.cat([part.preferences for part in parts])
        reason = next((part.reason for part in parts if part.reason), None)
        return _Answers(preferences, reason, parts[-1].gave_up)

    def _report(self, failed: int, count: int, reason: str) -> None:
        """Log failed comparisons: the first time, and when their number has doubled."""
        self._failed += failed
        if failed and self._failed >= self._next_notice:
            self._next_notice = 2 * self._failed
            log.warning(
                "%d of %d comparisons of a prompt failed and are not counted, %d so far: %s",
                failed,
                count,
                self._failed,
                reason,
            )


class _Answers(NamedTuple):
    """Preferences [K], NaN for failed comparisons, the first reason, and whether to stop."""

    preferences: Tensor
    reason: str | None = None
    gave_up: bool = False


def build_pair_judge(value: str | dict[str, Any]) -> PairJudge:
    """The pairwise judge of a name, or of a mapping with a name and options.

    Raises:
        OptionError: there is no such judge, or it cannot be loaded.
    """
    options = {"name": value} if isinstance(value, str) else dict(value)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise OptionError(f"judge={value}: has no name. Write a mapping such as {{name: score}}.")
    try:
        judge: PairJudge = build_registered(PAIR_JUDGES, "judge", name, options, ("name",))
    except OptionError:
        raise
    except SettingsError as error:
        raise OptionError(str(error)) from error
    if not callable(judge):
        raise OptionError(
            f"judge={name}: an object of type {type(judge).__name__} is not callable. A judge is a "
            "function (images, pairs, prompt), or a class with such a __call__ method."
        )
    return judge


def drawn_pairs(count: int, opponents: int, generator: np.random.Generator) -> Ints:
    """Pairs [K, 2] of `count` images, in which every image has `opponents` different opponents.

    The images stand on a circle in random order. Each distance on the circle pairs every image with
    two others, half of the circle with one. Every image is therefore first in about half of its
    pairs. Distance 1 is used, so that all images are connected by comparisons. Only with
    one opponent and an even `count`, the pairs have no image in common.

    Args:
        count: number of images, at least 2.
        opponents: opponents of each image. At most `count` - 1 are used. If both numbers are odd,
            every image has one opponent more.
        generator: source of the order and the distances.
    """
    opponents = min(opponents, count - 1)
    order = generator.permutation(count)
    others = 2 + generator.permutation(max((count - 1) // 2 - 1, 0))
    distances = np.concatenate([np.arange(1, min(2, (count + 1) // 2)), others])
    place, halves = np.arange(count), count % 2 == 0 and opponents % 2 == 1
    whole = distances[: opponents // 2 if halves else -(-opponents // 2)]
    pairs = [np.stack([place, (place + distance) % count], 1) for distance in whole]
    if halves:
        pairs.append(np.stack([place[: count // 2], place[count // 2 :]], 1))
    drawn: Ints = order[np.concatenate(pairs)].astype(np.int64)
    return drawn


def win_rates(count: int, pairs: Ints, margin: Tensor) -> Tensor:
    """Wins / comparisons [G] of `count` images. NaN for an image without a comparison.

    Args:
        count: G.
        pairs: compared images [K, 2].
        margin: [K], positive if the first image wins, 0 for a tie, NaN for a failed comparison.
    """
    known = margin.isfinite()
    outcome = (1 + margin[known].sign()) / 2
    first, second = torch.from_numpy(pairs)[known].T
    zeros = torch.zeros(count, dtype=torch.float64)
    wins = zeros.index_add(0, first, outcome).index_add(0, second, 1 - outcome)
    ones = torch.ones_like(outcome)
    compared = zeros.index_add(0, first, ones).index_add(0, second, ones)
    return wins / compared  # 0 / 0 gives NaN


def _answers(judge: PairJudge, images: Tensor, pairs: Ints, prompt: Prompt) -> _Answers:
    """The result of one call of a judge."""
    reason, gave_up = None, False
    try:
        try:
            result = judge(images, pairs, prompt)
        except Unscored as error:
            result, reason, gave_up = cast(Any, error.result), str(error), error.gave_up
        preferences = torch.as_tensor(result, dtype=torch.float64).detach().cpu()
        if preferences.shape != (len(pairs),):
            raise ValueError(
                f"the judge returned shape {list(preferences.shape)} for {len(pairs)} pairs, "
                f"not [{len(pairs)}]"
            )
    except Exception as error:  # user code may raise and return anything
        return _Answers(_unknown(len(pairs)), describe(error))
    valid = (preferences >= 0) & (preferences <= 1)
    if not valid.all():
        reason = reason or "the judge returned NaN or a preference outside of 0..1"
    return _Answers(torch.where(valid, preferences, torch.nan), reason, gave_up)


def _unknown(count: int) -> Tensor:
    return torch.full((count,), torch.nan, dtype=torch.float64)


def _generator(seed: int, text: str) -> np.random.Generator:
    digest = hashlib.blake2b(repr(("pairwise", seed, text)).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
