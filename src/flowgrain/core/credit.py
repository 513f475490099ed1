"""Credit: rewards at the leaves of a tree become one advantage per trained edge.

Shapes: I images (leaves), E trained edges, N rows, C channels. Everything runs on the CPU in
float32 or float64.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowgrain.core.tree import ROOT, Ints, Tree

Scope = Literal["group", "global"]
RewardMix = Literal["advantage", "reward"]
ComparisonGroup = Literal["step", "prompt", "parent"]


@dataclass(frozen=True)
class Normalization:
    """Normalization of values to advantages: (value - mean of comparison group) / (std + epsilon).

    Attributes:
        scope: "group" uses the std of the comparison group, "global" the std of all edges of the
            batch.
        unbiased: whether the std divides by n - 1 instead of n.
        epsilon: constant added to the std.
        comparison: "step" compares the edges of a prompt at the same grid step, "prompt" all edges
            of a prompt (Stepwise-Flow-GRPO), "parent" the edges that start from the same state
            (TempFlow-GRPO).
    """

    scope: Scope = "group"
    unbiased: bool = True
    epsilon: float = 1e-8
    comparison: ComparisonGroup = "step"

    def groups(self, tree: Tree) -> Tensor:
        """Comparison group [E] of every trained edge of `tree`."""
        if self.comparison == "step":
            return torch.from_numpy(tree.comparison_groups)
        of_row = tree.prompt if self.comparison == "prompt" else tree.parent
        return torch.from_numpy(np.unique(of_row[tree.edges], return_inverse=True)[1])


def leaf_groups(tree: Tree) -> Ints:
    """Group [I] of every leaf, for rewards that compare images: its prompt and its channel.

    A leaf with several channels belongs to the group of its lowest channel. In G2RPO, images of
    different granularities are therefore not compared with each other.
    """
    lowest = np.full(len(tree), tree.num_channels)
    np.minimum.at(lowest, tree.image, tree.channel)
    groups: Ints = tree.prompt[tree.leaves] * tree.num_channels + lowest[tree.leaves]
    return groups


def row_values(tree: Tree, rewards: Tensor) -> Tensor:
    """Values [N, C] of all rows: the mean reward, per channel, of the leaves at or below the row.

    Args:
        tree: N rows.
        rewards: [I] in the order of `tree.leaves`. NaN marks an image without a score, which is
            left out of the mean. A row without a scored leaf has the value NaN.
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


def softmax_values(tree: Tree, rewards: Tensor, log_prob: Tensor) -> Tensor:
    """Values [N, C] of all rows: the mean of the children's values, weighted by probability.

    The weights of the children of a row are the softmax of their log-probabilities (published code
    of BranchGRPO). With equal log-probabilities and full subtrees the values are `row_values`.

    Args:
        tree: N rows.
        rewards: [I] in the order of `tree.leaves`. A child without a scored leaf is left out.
        log_prob: [N] log-probability of the step to each row. Only differences between the
            children of the same row matter.
    """
    values = row_values(tree, rewards)  # those of the leaves stay
    parent, weight = torch.from_numpy(tree.parent), log_prob.double().cpu()
    below = parent != ROOT
    largest = torch.full_like(weight, -torch.inf)
    largest.scatter_reduce_(0, parent[below], weight[below], "amax")
    weight = (weight - largest[parent]).exp()[:, None]
    # Weighted sum and weight of the children of each row.
    total = torch.zeros(*values.shape, 2, dtype=torch.float64)
    grid_index, inner = torch.from_numpy(tree.grid_index), torch.from_numpy(tree.evaluated)
    for index in range(tree.num_steps, -1, -1):  # a child has a larger index than its parent
        done = inner[grid_index[inner] == index]
        values[done] = total[done, :, 0] / total[done, :, 1]
        rows = ((grid_index == index) & below).nonzero().squeeze(1)
        scored = values[rows].isfinite()
        terms = torch.stack([values[rows].nan_to_num(), torch.ones_like(values[rows])], -1)
        total.index_add_(0, parent[rows], terms * (weight[rows] * scored)[..., None])
    return values


def edge_values(tree: Tree, rewards: Tensor) -> Tensor:
    """The value [E, C] of every trained edge: the value of the row it leads to."""
    return row_values(tree, rewards)[torch.from_numpy(tree.edges)]


def normalize(values: Tensor, groups: Tensor, how: Normalization) -> Tensor:
    """Advantages [E] of values [E]. `groups` [E] is the number of the comparison group.

    The advantage of a NaN value is 0. All advantages of a group are 0 if it has fewer than two
    values, or if the values differ only by float32 rounding: rounding errors divided by epsilon
    would be large and meaningless.
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
    """G2RPO's credit [E]: values normalized per channel (granularity), then summed (eq. 12)."""
    channels = edge_values(tree, rewards).T
    return torch.stack([normalize(values, how.groups(tree), how) for values in channels]).sum(0)


def outcome(tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
    """Flow-GRPO's credit [E] (eq. 4): the mean reward of all images below the edge, normalized."""
    return normalize(edge_values(tree, rewards).nanmean(1), how.groups(tree), how)


def standardize(tree: Tree, rewards: Tensor, baseline: Tensor, how: Normalization) -> Tensor:
    """DDPO's credit [E]: the reward of the image, normalized by given statistics of the prompt.

    The advantage of a NaN value is 0. So are the advantages of a prompt whose std is only float32
    rounding.

    Args:
        tree: tree of P prompts.
        rewards: [I] rewards of the leaves.
        baseline: [P, 2] mean and std of every prompt.
        how: normalization. Only its epsilon is used.
    """
    values = edge_values(tree, rewards).nanmean(1)
    mean, std = baseline.double()[torch.from_numpy(tree.prompt[tree.edges])].T
    known = values.isfinite() & (std > 1e-6 * mean.abs())
    advantage = (values - mean) / (std + how.epsilon)
    return torch.where(known, advantage, torch.zeros_like(advantage)).float()


def softmax_outcome(tree: Tree, rewards: Tensor, how: Normalization, log_prob: Tensor) -> Tensor:
    """BranchGRPO's credit [E] with `softmax_values` of the rows that the edges lead to."""
    values = softmax_values(tree, rewards, log_prob)[torch.from_numpy(tree.edges)]
    return normalize(values.nanmean(1), how.groups(tree), how)


def completion_rewards(
    tree: Tree, rewards: Tensor, rows: Ints, channel: int | None = None
) -> Tensor:
    """Rewards [len(rows)] of the ODE completions of `rows`.

    Args:
        tree: a tree whose states are completed (DenseGRPO).
        rewards: [I] rewards of the leaves.
        rows: rows of the tree.
        channel: channel of the completion. Default: the row's grid index.
    """
    index = tree.grid_index[rows] if channel is None else np.full(len(rows), channel)
    return row_values(tree, rewards)[torch.from_numpy(rows), torch.from_numpy(index)]


def gains(tree: Tree, rewards: Tensor) -> Tensor:
    """Reward gains R_{i+1} - R_i [E] of the trained edges (DenseGRPO eq. 6).

    R_i is the reward of the ODE completion of the state at grid index i.
    """
    edges = tree.edges
    after = completion_rewards(tree, rewards, edges)
    return after - completion_rewards(tree, rewards, tree.parent[edges])


def gain(tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
    """DenseGRPO's credit [E]: the reward gain of every edge, normalized."""
    return normalize(gains(tree, rewards), how.groups(tree), how)


def state(tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
    """DenseGRPO's baseline [E]: the reward R_{i+1} of the state after the step, normalized."""
    return normalize(completion_rewards(tree, rewards, tree.edges), how.groups(tree), how)


def per_image(tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
    """One advantage per leaf [I], normalized per prompt, for methods that train on images."""
    return normalize(rewards, torch.from_numpy(tree.prompt[tree.leaves]), how)


def best_of_prompt(tree: Tree, rewards: Tensor) -> Tensor:
    """Weights [I]: 1 for the leaves with the highest reward of their prompt, 0 for the others.

    A leaf without a score, which is NaN, has weight 0.
    """
    prompt = torch.from_numpy(np.unique(tree.prompt[tree.leaves], return_inverse=True)[1])
    scored = rewards.nan_to_num(-torch.inf)
    best = torch.full((int(prompt.max()) + 1,), -torch.inf).to(scored)
    best = best.scatter_reduce(0, prompt, scored, "amax")
    return ((scored == best[prompt]) & rewards.isfinite()).float()


def extremes(advantage: Tensor, groups: Tensor, kept: int) -> Tensor:
    """Edge weights [E] that keep the best and the worst edges of every group (DanceGRPO).

    The `kept` / 2 highest and the `kept` / 2 lowest advantages of a group have the same weight. All
    other edges have weight 0. The mean weight of a group is 1.
    """
    edge_weight = torch.zeros_like(advantage)
    for group in torch.unique(groups):
        places = (groups == group).nonzero().squeeze(1)
        ranked = places[advantage[places].argsort(stable=True)]
        half = min(kept // 2, len(ranked) // 2)
        chosen = torch.cat([ranked[:half], ranked[len(ranked) - half :]])
        edge_weight[chosen] = len(ranked) / max(len(chosen), 1)
    return edge_weight


Credit = Callable[[Tree, Tensor, Normalization], Tensor]
"""credit(tree, rewards [I], normalization) -> advantages [E].

For methods that train on images the advantages are [I].
"""


def weighted_sum(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Weighted sum [I] of rewards [I] by name. NaN where a score is missing."""
    return torch.stack([weights[name] * rewards[name] for name in rewards]).sum(0)


def known(rewards: Mapping[str, Tensor], by: RewardMix) -> Tensor:
    """Whether each image [I] has the scores that its advantage needs: see `combine`."""
    scored = torch.stack([values.isfinite() for values in rewards.values()])
    return scored.all(0) if by == "reward" else scored.any(0)


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
        rewards: rewards [I] by name.
        weights: weight of each reward by name.
        how: normalization of values to advantages.
        by: "advantage" sums weighted advantages. "reward" sums weighted rewards and takes the
            advantage of the sum. A missing score masks the image in a sum of rewards, but only its
            own term in a sum of advantages.
        clip: advantages are clamped to [-clip, clip]. None: they are not clamped.
    """
    if by == "reward":
        advantage = credit(tree, weighted_sum(rewards, weights), how)
    else:
        terms = [weights[name] * credit(tree, rewards[name], how) for name in rewards]
        advantage = torch.stack(terms).sum(0)
    return advantage if clip is None else advantage.clamp(-clip, clip)
