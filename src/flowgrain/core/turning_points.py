"""Credit of TP-GRPO (arXiv 2602.06422): gains of steps, aggregated rewards at turning points.

Shapes: I images, E trained edges, N rows. Everything runs on the CPU in float64.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowgrain.core.credit import Normalization, completion_rewards, normalize
from flowgrain.core.tree import ROOT, Ints, Tree

TurningPoints = Literal["consistent", "all"]
"""Which steps after the first may be turning points, see `turning_points`."""


@dataclass(frozen=True)
class StepRewards:
    """Rewards around the trained edges of trajectories whose states are completed by the ODE.

    Attributes:
        before: [E] reward of the completion of the state before the step, R_{i}.
        after: [E] reward of the completion of the state after the step, R_{i+1}.
        first: [E] reward of the completion of the state before the trajectory's first step.
        last: [E] reward of the trajectory's image.
        previous: [E] number of the trajectory's previous edge. -1 for the first edge.
    """

    before: Tensor
    after: Tensor
    first: Tensor
    last: Tensor
    previous: Tensor

    @property
    def gain(self) -> Tensor:
        """Reward gain of the step [E], R_{i+1} - R_{i}."""
        return self.after - self.before

    @property
    def total_gain(self) -> Tensor:
        """Reward gain of the whole trajectory over its ODE [E]."""
        return self.last - self.first


def step_rewards(tree: Tree, rewards: Tensor) -> StepRewards:
    """The rewards around the trained edges.

    Args:
        tree: trajectories whose states are completed by the ODE, and whose image has the channel T,
            as `methods.plans.completed_trajectory` writes them.
        rewards: [I] rewards of the leaves.
    """
    edges = tree.edges
    previous = _previous_edges(tree)
    parent = tree.parent[edges]
    first = np.arange(len(edges))
    for number in range(len(edges)):  # an edge comes after the previous edge
        if previous[number] >= 0:
            first[number] = first[previous[number]]
    before = completion_rewards(tree, rewards, parent)
    return StepRewards(
        before=before,
        after=completion_rewards(tree, rewards, edges),
        first=before[torch.from_numpy(first)],
        last=completion_rewards(tree, rewards, edges, channel=tree.num_steps),
        previous=torch.from_numpy(previous),
    )


def turning_points(steps: StepRewards, kind: TurningPoints = "consistent") -> Tensor:
    """Whether each edge [E] is a turning point (published code).

    A turning point continues in the same direction: its gain has the sign of the gain that follows
    it until the image. Besides, the previous step must have gone in the other direction:

    - "consistent": this step has the sign of the gain of the whole trajectory, and the previous
      step has the opposite sign.
    - "all": this step and the previous step have opposite signs.

    The first step has no previous step, so that it only has to continue in the same direction.
    An edge with a missing score is no turning point.
    """
    gain = steps.gain
    continues = torch.sign(gain) * torch.sign(steps.last - steps.after) > 0
    before = gain[steps.previous]  # of the last edge where there is no previous edge
    if kind == "all":
        turns = gain * before < 0
    else:
        trend = torch.sign(steps.total_gain)
        turns = (torch.sign(gain) * trend > 0) & (torch.sign(before) * trend < 0)
    return continues & (turns | (steps.previous < 0))


def balanced(chosen: Tensor, value: Tensor) -> Tensor:
    """`chosen` [E] with the same number of edges of positive and of negative `value` [E].

    The larger side keeps its largest absolute values. Nothing changes if a side is empty. Of equal
    values, the first are kept.
    """
    sides = [(chosen & (side > 0)).nonzero().squeeze(1) for side in (value, -value)]
    kept = min(map(len, sides))
    if not kept:
        return chosen
    result = torch.zeros_like(chosen)
    for places in sides:
        order = value[places].abs().argsort(descending=True, stable=True)
        result[places[order[:kept]]] = True
    return result


def process_rewards(
    tree: Tree, rewards: Tensor, kind: TurningPoints = "consistent", balance: bool = True
) -> Tensor:
    """Reward of every trained edge [E]: its gain, or the aggregated reward of a turning point.

    The aggregated reward is the gain from the state before the step to the trajectory's image.

    Args:
        tree: see `step_rewards`.
        rewards: [I] rewards of the leaves.
        kind: see `turning_points`.
        balance: keep as many turning points of trajectories that gained as of trajectories that
            lost, over all prompts (`balanced`).
    """
    steps = step_rewards(tree, rewards)
    chosen = turning_points(steps, kind)
    if balance:
        chosen = balanced(chosen, steps.total_gain)
    return torch.where(chosen, steps.last - steps.before, steps.gain)


def turning_point(
    tree: Tree,
    rewards: Tensor,
    how: Normalization,
    kind: TurningPoints = "consistent",
    balance: bool = True,
) -> Tensor:
    """TP-GRPO's credit [E]: `process_rewards`, normalized."""
    values = process_rewards(tree, rewards, kind, balance)
    return normalize(values, how.groups(tree), how)


def _previous_edges(tree: Tree) -> Ints:
    """Number of the nearest trained edge [E] above each trained edge, or -1."""
    above = np.full(len(tree), ROOT)  # row of the nearest trained edge above
    for index in range(1, tree.num_steps + 1):  # a child always has a larger index than its parent
        rows = np.flatnonzero((tree.grid_index == index) & (tree.parent != ROOT))
        parent = tree.parent[rows]
        above[rows] = np.where(tree.trained[parent], parent, above[parent])
    found = above[tree.edges]
    previous: Ints = np.where(found == ROOT, -1, np.searchsorted(tree.edges, found))
    return previous
