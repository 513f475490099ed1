"""Credit: rewards at the leaves of a tree become one advantage per trained edge.

Shapes: I images (leaves), E trained edges, N rows, C channels, M rewards. Everything runs on the CPU in fp32 or fp64. A
comparison group lives on one rank, so credit needs no communication.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowgrain.core.tree import ROOT, Ints, Tree

Scope = Literal["group", "global"]
RewardMix = Literal["advantage", "reward"]
Comparison = Literal["step", "prompt"]


@dataclass(frozen=True)
class Normalization:
    """How values become advantages: (value - mean of the comparison group) / (std + epsilon).

    Attributes:
        scope: whose std: "group" for the comparison group, "global" for all edges of the batch.
        unbiased: divide by n - 1 instead of n.
        epsilon: added to the std.
        comparison: a comparison group is a prompt's edges at one grid step ("step"), or all edges
            of a prompt ("prompt", Stepwise-Flow-GRPO).
    """

    scope: Scope = "group"
    unbiased: bool = True
    epsilon: float = 1e-8
    comparison: Comparison = "step"

    def groups(self, tree: Tree) -> Tensor:
        """Comparison group [E] of every trained edge of `tree`."""
        by_step = self.comparison == "step"
        return torch.from_numpy(tree.comparison_groups if by_step else tree.prompt[tree.edges])


def row_values(tree: Tree, rewards: Tensor) -> Tensor:
    """The value [N, C] of every row: for each channel, the mean reward of the leaves at or below the row.

    Args:
        tree: N rows.
        rewards: [I] in the order of `tree.leaves`. NaN marks an image without a score. It does not
            count, and a row without a scored leaf has the value NaN.
    """
    reward_of_row = torch.full((len(tree),), torch.nan, dtype=torch.float64)
    reward_of_row[torch.from_numpy(tree.leaves)] = rewards.double().cpu()
    image, channel = torch.from_numpy(tree.image), torch.from_numpy(tree.channel)
    scored = reward_of_row[image].isfinite()
    # Sum and number of the leaves below each row.
    total = torch.zeros(len(tree), tree.num_channels, 2, dtype=torch.float64)
    ones = torch.ones(len(image), dtype=torch.float64)
    pair = torch.stack([reward_of_row[image].nan_to_num(), ones], 1)
    total.index_put_((image, channel), pair * scored[:, None], accumulate=True)
    parent, grid_index = torch.from_numpy(tree.parent), torch.from_numpy(tree.grid_index)
    for index in range(tree.num_steps, 0, -1):  # a child always has a larger index than its parent
        rows = ((grid_index == index) & (parent != ROOT)).nonzero().squeeze(1)
        total.index_add_(0, parent[rows], total[rows])
    return total[..., 0] / total[..., 1]  # 0 / 0 gives the NaN of a row without scores


def edge_values(tree: Tree, rewards: Tensor) -> Tensor:
    """The value [E, C] of every trained edge: the value of the row it leads to."""
    return row_values(tree, rewards)[torch.from_numpy(tree.edges)]


def normalize(values: Tensor, groups: Tensor, how: Normalization) -> Tensor:
    """Advantages [E] of values [E], compared within the edges that share a number in `groups` [E].

    A NaN value gets advantage 0. So does a whole group with fewer than two values, or whose spread
    is only fp32 rounding: dividing rounding noise by epsilon would train on nothing.
    """
    known = values.isfinite()
    v = values.double().nan_to_num()
    num_groups = int(groups.max()) + 1 if len(groups) else 0

    def total(of: Tensor) -> Tensor:
        return torch.zeros(num_groups, dtype=torch.float64).index_add_(0, groups, of)

    def largest(of: Tensor) -> Tensor:
        zeros = torch.zeros(num_groups, dtype=torch.float64)
        return zeros.scatter_reduce_(0, groups, of.abs(), "amax")

    count = total(known.double())
    mean = total(v * known) / count.clamp(min=1)
    centered = (v - mean[groups]) * known
    spread = (count >= 2) & (largest(centered) > 1e-6 * largest(v * known))
    if how.scope == "group":
        std = (total(centered.square()) / (count - int(how.unbiased)).clamp(min=1)).sqrt()
    else:
        scored = v[known]
        std = scored.std(correction=int(how.unbiased)) if len(scored) > 1 else torch.zeros(())
        std = std.expand(num_groups)
    advantage = centered / (std + how.epsilon)[groups]
    return torch.where(spread[groups] & known, advantage, torch.zeros_like(advantage)).float()


def granular(tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
    """G2RPO's credit [E] (eq.

    12): values are normalized per channel (granularity), then the channels are summed.
    """
    channels = edge_values(tree, rewards).T
    return torch.stack([normalize(values, how.groups(tree), how) for values in channels]).sum(0)


def outcome(tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
    """Flow-GRPO's credit [E] (eq. 4): the mean reward of all images below the edge, normalized."""
    return normalize(edge_values(tree, rewards).nanmean(1), how.groups(tree), how)


def _completion_rewards(tree: Tree, rewards: Tensor, rows: Ints) -> Tensor:
    """The reward of the ODE completion of each of `rows`: the image in the channel numbered by the row's grid index."""
    index = tree.grid_index[rows]
    return row_values(tree, rewards)[torch.from_numpy(rows), torch.from_numpy(index)]


def gains(tree: Tree, rewards: Tensor) -> Tensor:
    """The reward gain R_{i+1} - R_i [E] of every trained edge, between ODE completions (DenseGRPO eq. 6)."""
    edges = tree.edges
    after = _completion_rewards(tree, rewards, edges)
    return after - _completion_rewards(tree, rewards, tree.parent[edges])


def gain(tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
    """DenseGRPO's credit [E]: the reward gain of every edge, normalized."""
    return normalize(gains(tree, rewards), how.groups(tree), how)


def state(tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
    """DenseGRPO's baseline [E]: the reward R_{i+1} of the state that the step reached, normalized."""
    return normalize(_completion_rewards(tree, rewards, tree.edges), how.groups(tree), how)


def per_image(tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
    """One advantage per leaf, [I], within its prompt: for methods that train on images instead of steps."""
    return normalize(rewards, torch.from_numpy(tree.prompt[tree.leaves]), how)


def extremes(advantage: Tensor, groups: Tensor, kept: int) -> Tensor:
    """Edge weights [E] that keep the `kept` / 2 highest and lowest of every group, with mean 1 (DanceGRPO's best-of-N)."""
    edge_weight = torch.zeros_like(advantage)
    for group in torch.unique(groups):
        places = (groups == group).nonzero().squeeze(1)
        ranked = places[advantage[places].argsort(stable=True)]
        half = min(kept // 2, len(ranked) // 2)
        chosen = torch.cat([ranked[:half], ranked[len(ranked) - half :]])
        edge_weight[chosen] = len(ranked) / max(len(chosen), 1)
    return edge_weight


Credit = Callable[[Tree, Tensor, Normalization], Tensor]
"""credit(tree, rewards [I], normalization) -> advantages [E], or [I] for methods that train on images."""


def combine(
    credit: Credit,
    tree: Tree,
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    how: Normalization,
    by: RewardMix = "advantage",
    clip: float | None = None,
) -> Tensor:
    """Advantages [E] of several rewards.

    Args:
        credit: credit of one reward.
        tree: tree of all prompts.
        rewards: by name, [I] each.
        weights: by name, the weight of the reward.
        how: normalization.
        by: "advantage" sums weighted advantages; "reward" takes the advantage of the weighted sum
            of rewards. A missing score masks the image in a sum of rewards, but only its own term
            in a sum of advantages.
        clip: advantages are clamped to -clip ... clip.
    """
    if by == "reward":
        total = torch.stack([weights[name] * rewards[name] for name in rewards]).sum(0)
        advantage = credit(tree, total, how)
    else:
        terms = [weights[name] * credit(tree, rewards[name], how) for name in rewards]
        advantage = torch.stack(terms).sum(0)
    return advantage if clip is None else advantage.clamp(-clip, clip)
