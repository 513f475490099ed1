"""Calibration of the noise: a strength psi[i] for every grid step, found once on the base policy and then frozen (DenseGRPO).

Shapes: T grid steps, E stochastic edges of a round, N trajectories.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from flowgrain.methods.algorithms import densegrpo, plan_tree, psi_profile
from flowgrain.core.credit import gains
from flowgrain.core.sde import CalibratedSDE, Kernel
from flowgrain.config.schema import Settings
from flowgrain.core.tree import Cost, Tree, cost


@dataclass(frozen=True)
class Round:
    """The psi [T] a round was sampled with, and at each step the shares of trajectories that gained and that lost reward."""

    psi: list[float]
    gained: list[float]
    lost: list[float]


@dataclass(frozen=True)
class Calibration:
    """psi [T] as found, the rounds that led there, and what they cost."""

    psi: list[float]
    rounds: list[Round]
    forward_passes: int
    decodes: int

    def as_dict(self) -> dict[str, object]:
        """Plain numbers, for a file."""
        return asdict(self)


Grow = Callable[[Tree, Kernel, int], Tensor]
"""grow(tree of one prompt, kernel, round) -> rewards [I] of the leaves of calibration_samples prompts, each with its own noise."""


def calibrate(s: Settings, grow: Grow) -> Calibration:
    """Finds psi: where gains and losses of the reward balance, noise may grow by `calibration_step`, else it shrinks by it.

    N = calibration_samples trajectories a round, each of its own prompt, with a look from every state. The test of balance is
    |#gained - #lost| / N < calibration_balance: the printed |#gained - #lost| < 2 is not scale-free and drives psi to 0
    (DenseGRPO section 4.2; docs/densegrpo.md).
    """
    one = _tree(s)
    tree = one.repeat(s.calibration_samples)
    step_of_edge = tree.level[tree.parent[tree.edges]]
    psi = np.array(psi_profile(s))
    rounds = []
    for number in range(1, s.calibration_rounds + 1):
        found = gains(tree, grow(one, CalibratedSDE(tuple(psi.tolist())), number))
        gained, lost = (_share_by_step(test, step_of_edge, s.num_steps) for test in (found > 0, found < 0))
        rounds.append(Round(psi.tolist(), gained.tolist(), lost.tolist()))
        towards = np.where(np.abs(gained - lost) < s.calibration_balance, 1.0, -1.0)
        moved = np.isin(np.arange(s.num_steps), step_of_edge)
        psi = np.where(moved, np.maximum(psi + towards * s.calibration_step, s.calibration_step), psi)
    price = calibration_price(s)
    return Calibration(psi.tolist(), rounds, price.forward_passes, price.decodes)


def needs_calibration(s: Settings) -> bool:
    """Whether a run of these settings finds its psi before the first step."""
    return s.noise == "calibrated_sde" and s.psi is None


def calibration_price(s: Settings) -> Cost:
    """What the calibration of a run costs; nothing where there is none."""
    if not needs_calibration(s):
        return Cost(0, 0, 0, 0, 0)
    once, n = cost(_tree(s), len(s.rewards)), s.calibration_rounds * s.calibration_samples
    return Cost(n * once.forward_passes, 0, n * once.decodes, n * once.reward_calls, 0)


def _tree(s: Settings) -> Tree:
    """The tree of one prompt: a trajectory with a look from every state."""
    one = s.model_copy(update={"group_size": 1, "dense_reward": "gain"})
    return plan_tree(densegrpo(one), one)


def _share_by_step(test: Tensor, step_of_edge: np.ndarray, num_steps: int) -> np.ndarray:
    """The share of edges at each step for which `test` [E] holds, [T]; a failed reward counts as neither gain nor loss."""
    steps = torch.from_numpy(step_of_edge)
    held, all_of_step = (torch.zeros(num_steps).index_add_(0, steps, x) for x in (test.float(), torch.ones(len(steps))))
    return (held / all_of_step.clamp(min=1)).numpy()
