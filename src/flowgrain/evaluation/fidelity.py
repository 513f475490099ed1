"""How well a cheaper rollout ranks a group, compared with the full one, and what it saves: `flowgrain fidelity`."""

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from flowgrain.methods import algorithms
from flowgrain.core.credit import Normalisation
from flowgrain.training.rollout_batch import Sampled
from flowgrain.config.schema import Settings, SettingsError
from flowgrain.training.trainer import Run

_OF_THE_POLICY = (
    "model",
    "weights",
    "revision",
    "dtype",
    "lora_rank",
    "compile",
    "height",
    "width",
    "method",
)
"""What another rollout of the same policy cannot change; the method, because its plan must train the same edges."""


@dataclass(frozen=True)
class Fidelity:
    """correlation: Spearman's of the advantages of each group [K]; flipped: share of edges whose advantage has the other sign.

    seconds and passes of the cheap rollout as shares of the full one's: medians over the steps, and of one prompt.
    """

    correlation: np.ndarray
    flipped: float
    seconds: float
    passes: float


def fidelity(full: Settings, cheap: Settings, steps: int = 3) -> Fidelity:
    """Samples the groups of `steps` steps in both ways, by turns, from the same noise and without training.

    Raises SettingsError if the two do not train the same edges, or differ in more than how they sample.
    """
    for name in _OF_THE_POLICY:
        of_both = getattr(full, name), getattr(cheap, name)
        flash = name == "method" and all(one.startswith("mixgrpo") for one in of_both)
        if of_both[0] != of_both[1] and not flash:
            raise SettingsError(
                f"--cheap {name}={of_both[1]}: a cheaper rollout is of the same policy and method, {name}={of_both[0]}"
            )
    run = Run(full)
    other = copy.copy(run)
    other.settings, other.method, other.sigmas = (
        cheap,
        algorithms.build(cheap),
        cheap.grid().to(run.device),
    )
    other.policy = run.policy.with_tails(cheap)
    how = Normalisation(full.std_scope, full.std_unbiased, full.std_epsilon, full.peers)
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    shares = []
    for step in range(1, steps + 1):
        (whole, slow), (quick, fast) = (_timed(one, step) for one in (run, other))
        if not all(np.array_equal(a, b) for a, b in zip(_edges(whole), _edges(quick), strict=True)):
            raise SettingsError(
                "--cheap: the two rollouts do not train the same edges; change how images are finished, not what is trained"
            )
        found.append((how.groups(whole.whole), whole.advantage, quick.advantage))
        shares.append(fast / slow)
    correlations, flips = [], []
    for groups, a, b in found:
        for group in groups.unique():
            of_group = groups == group
            if a[of_group].std() > 0 and b[of_group].std() > 0:
                correlations.append(stats.spearmanr(a[of_group], b[of_group]).statistic)
        known = (a != 0) & (b != 0)
        flips.append((a.sign() != b.sign())[known].float().mean())
    price = [algorithms.price(one.method, one.settings).forward_passes for one in (run, other)]
    return Fidelity(
        np.array(correlations),
        float(torch.stack(flips).mean()),
        float(np.median(shares)),
        price[1] / price[0],
    )


def _edges(sampled: Sampled) -> tuple[np.ndarray, ...]:
    """What tells the trained edges of a step: prompt, grid step and noise."""
    tree = sampled.whole
    return tree.prompt[tree.edges], tree.level[tree.edges], tree.draw[tree.edges]


def _timed(run: Run, step: int) -> tuple[Sampled, float]:
    begin = time.perf_counter()
    return run.sample_tree(step), time.perf_counter() - begin
