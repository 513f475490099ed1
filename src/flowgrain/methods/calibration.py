"""Calibration of the noise strength psi[i] of every grid step on the base policy (DenseGRPO).

Shapes: T grid steps, E stochastic edges of a round, N trajectories.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrain.core.cost import Cost, cost
from flowgrain.core.credit import gains
from flowgrain.core.sde import CalibratedSDE, Kernel
from flowgrain.core.tree import Planner, Tree, TreeTooLarge
from flowgrain.methods.base import Method
from flowgrain.methods.policy_gradient import PolicyGradient
from flowgrain.settings import SettingsError


@dataclass(frozen=True)
class Round:
    """A calibration round.

    Attributes:
        psi: [T] noise strengths of the round.
        gained: [T] share of trajectories that gained reward at each step.
        lost: [T] share of trajectories that lost reward at each step.
    """

    psi: list[float]
    gained: list[float]
    lost: list[float]


@dataclass(frozen=True)
class CalibrationResult:
    """The calibrated psi [T], the rounds of the calibration, and their cost."""

    psi: list[float]
    rounds: list[Round]
    forward_passes: int
    decodes: int

    def as_dict(self) -> dict[str, object]:
        """Plain numbers for a JSON file."""
        return asdict(self)


ScoreTree = Callable[[Tree, Kernel, int], Tensor]
"""score_tree(tree of one prompt, kernel, round) -> rewards [I] of the leaves of N prompts.

Every prompt has its own noise.
"""


def calibrate(method: PolicyGradient, sigmas: Tensor, score_tree: ScoreTree) -> CalibrationResult:
    """Calibrate psi (DenseGRPO section 4.2).

    A round samples N = `calibration.samples` trajectories, each with its own prompt and with an ODE
    completion of every state. A step is balanced if |#gained - #lost| / N < `calibration.balance`.
    The paper prints |#gained - #lost| < 2, which depends on N and reduces psi to 0. psi of a
    balanced step grows by `calibration.step`, psi of any other step shrinks by it.
    """
    settings, num_steps = method.calibration, len(sigmas) - 1
    prompt_tree = calibration_tree(method, num_steps)
    tree = prompt_tree.repeat(settings.samples)
    step_of_edge = tree.grid_index[tree.parent[tree.edges]]
    psi = np.array(method.initial_psi(sigmas))
    rounds = []
    for number in range(1, settings.rounds + 1):
        gain = gains(tree, score_tree(prompt_tree, CalibratedSDE(tuple(psi.tolist())), number))
        gained = _share_by_step(gain > 0, step_of_edge, num_steps)
        lost = _share_by_step(gain < 0, step_of_edge, num_steps)
        rounds.append(Round(psi.tolist(), gained.tolist(), lost.tolist()))
        direction = np.where(np.abs(gained - lost) < settings.balance, 1.0, -1.0)
        moved = np.isin(np.arange(num_steps), step_of_edge)
        psi = np.where(moved, np.maximum(psi + direction * settings.step, settings.step), psi)
    total = calibration_cost(method, num_steps)
    return CalibrationResult(psi.tolist(), rounds, total.forward_passes, total.decodes)


def calibration_cost(method: Method, num_steps: int, num_rewards: int = 1) -> Cost:
    """The cost of a run's calibration. 0 if the method needs no calibration."""
    if not isinstance(method, PolicyGradient) or not method.needs_calibration:
        return Cost(0, 0, 0, 0, 0)
    per_tree = cost(calibration_tree(method, num_steps), num_rewards)
    n = method.calibration.rounds * method.calibration.samples
    return Cost(n * per_tree.forward_passes, 0, n * per_tree.decodes, n * per_tree.reward_calls, 0)


def calibration_tree(method: PolicyGradient, num_steps: int) -> Tree:
    """The tree that a calibration round samples for one prompt.

    Raises:
        SettingsError: the tree has more than `core.tree.MAX_ROWS` rows.
    """
    planner = Planner(num_steps)
    try:
        method.calibration_plan(planner)
    except TreeTooLarge as error:
        raise SettingsError(
            f"sampling.num_steps={num_steps}: in the calibration of psi, {error}. "
            "Use a smaller value, or set method.psi."
        ) from None
    return planner.tree()


def _share_by_step(
    holds: Tensor, step_of_edge: NDArray[np.int64], num_steps: int
) -> NDArray[np.float32]:
    """Share of the edges of each step for which `holds` [E] is true, [T].

    An edge without a score counts as neither a gain nor a loss.
    """
    steps = torch.from_numpy(step_of_edge)
    zeros = torch.zeros(num_steps)
    held = zeros.index_add(0, steps, holds.float())
    count = zeros.index_add(0, steps, torch.ones(len(steps)))
    shares: NDArray[np.float32] = (held / count.clamp(min=1)).numpy()
    return shares
