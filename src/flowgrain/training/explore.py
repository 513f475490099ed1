"""Exploration: candidates of a training step are sampled cheaply, and the best and worst chosen.

Shapes: P prompts, K groups of a prompt, C candidates of a group, G members of a group, I images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.core.cost import cost
from flowgrain.core.credit import RewardMix, leaf_groups, row_values
from flowgrain.core.explore import (
    Candidates,
    candidates_of,
    choose,
    draw_table,
    one_score,
    replace_draws,
)
from flowgrain.core.rollout import Noise
from flowgrain.core.tree import Ints, Tree
from flowgrain.rewards import Scores
from flowgrain.training.rollout_batch import Metrics


@dataclass(frozen=True)
class Exploration:
    """The candidates of a training step that were chosen.

    Attributes:
        candidates: candidates of a prompt.
        chosen: positions of the chosen candidates by prompt and group.
        score: [P, K, C] cheap scores.
        noise: noise of the exact tree. It has the chosen draws.
        forward_passes: forward passes of this rank.
        decodes: decoded and scored images of all ranks.
        failed: candidates without a score.
    """

    candidates: Candidates
    chosen: Sequence[Sequence[Ints]]
    score: Tensor
    noise: Noise
    forward_passes: int
    decodes: int
    failed: int

    def metrics(self, tree: Tree, total: Tensor, ranks: int) -> Metrics:
        """How well the cheap scores rank the kept candidates, and what they cost.

        Args:
            tree: exact tree of all prompts.
            total: [I] exact scores of its leaves.
            ranks: number of ranks.
        """
        values = row_values(tree, total).nanmean(1)
        rows_per_prompt = len(tree) // tree.num_prompts
        cheap, exact = list[list[float]](), list[list[float]]()
        for prompt, of_prompt in enumerate(self.chosen):
            for number, places in enumerate(of_prompt):
                rows = self.candidates.groups[number] + prompt * rows_per_prompt
                cheap.append(self.score[prompt, number, torch.from_numpy(places)].tolist())
                exact.append(values[torch.from_numpy(rows)].tolist())
        found = ranking(cheap, exact)
        return {
            "explore/spearman": found.spearman,
            "explore/best_above_median": found.best_above_median,
            "explore/forward_passes": self.forward_passes * ranks,
            "explore/decodes": self.decodes,
            "explore/failed": self.failed,
        }


def cheap_config(config: Config) -> Config:
    """The settings that sample candidates, with the approximate tails of the exploration.

    `config` itself, if they do not differ or there is no exploration.
    """
    sampling, settings = config.sampling, config.sampling.explore
    tails = {"tail_cache": settings.tail_cache, "tail_weights": settings.tail_weights}
    if not settings.candidates or all(getattr(sampling, key) == tails[key] for key in tails):
        return config
    off = {"explore": type(settings)()}
    return config.model_copy(update={"sampling": sampling.model_copy(update={**tails, **off})})


def explore(
    config: Config,
    plan: Tree,
    num_prompts: int,
    noise: Noise,
    sample: Callable[[Tree, Noise], tuple[Mapping[str, Scores], int]],
    weights: Mapping[str, float],
) -> Exploration:
    """Sample and score the candidates of a training step, and choose the best and the worst.

    The result is a function of the policy, the noise and the prompts. It is the same on all ranks.

    Args:
        config: settings of the run.
        plan: exact tree of one prompt.
        num_prompts: P, prompts of all ranks.
        noise: noise of the training step.
        sample: scores of all images of a tree of candidates, and the forward passes of this rank.
        weights: weight of each reward by name.
    """
    settings = config.sampling.explore
    candidates = candidates_of(plan, settings.candidates, settings.num_steps)
    scores, passes = sample(candidates.tree, noise)
    values = {name: of_reward.values for name, of_reward in scores.items()}
    numbers = np.arange(num_prompts).repeat(len(candidates.tree.leaves)) * len(candidates.draw)
    groups = numbers + np.tile(candidates.image_groups, num_prompts)
    score = one_score(values, weights, groups, config.method.reward_mix)
    score = score.reshape(num_prompts, *candidates.draw.shape)
    chosen = choose(candidates, score)
    table = draw_table(plan, candidates, chosen)
    decodes = cost(candidates.tree).decodes * num_prompts
    failed = int(score.isnan().sum())
    return Exploration(
        candidates, chosen, score, replace_draws(noise, table), passes, decodes, failed
    )


def exact_score(
    tree: Tree, values: Mapping[str, Tensor], weights: Mapping[str, float], by: RewardMix
) -> Tensor:
    """One score [I] of the images of the exact tree, like the cheap scores of the candidates."""
    return one_score(values, weights, leaf_groups(tree), by)


@dataclass(frozen=True)
class Ranking:
    """How well the cheap scores rank the kept candidates, means over groups. NaN: unknown.

    Attributes:
        spearman: Spearman's rank correlation of cheap and exact scores.
        best_above_median: share of the candidates that were kept as the best whose exact score is
            above the median of the group.
    """

    spearman: float
    best_above_median: float


def ranking(cheap: Sequence[Sequence[float]], exact: Sequence[Sequence[float]]) -> Ranking:
    """Compare the cheap and the exact scores of the kept candidates, one list per group.

    A member without one of the scores is left out. So is a group in which one of the scores is the
    same for all members.
    """
    correlations, shares = [], []
    for of_cheap, of_exact in zip(cheap, exact, strict=True):
        pair = np.array([of_cheap, of_exact], dtype=np.float64)
        a, b = pair[:, ~np.isnan(pair).any(0)]
        if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
            continue
        correlations.append(float(stats.spearmanr(a, b).statistic))
        best = np.argsort(a, kind="stable")[len(a) // 2 :]
        shares.append(float((b[best] > np.median(b)).mean()))
    if not correlations:
        return Ranking(float("nan"), float("nan"))
    return Ranking(float(np.mean(correlations)), float(np.mean(shares)))
