"""Credit: rewards at the leaves of a tree become one advantage for every trained edge.

Shapes: I images (leaves), E trained edges, N rows, C channels, M rewards. Everything here is fp32 or better, on the CPU:
a group lives in one process, so credit needs no communication.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowgrain.core.tree import ROOT, Ints, Tree

Scope = Literal["group", "global"]
Mix = Literal["advantage", "reward"]
Peers = Literal["step", "prompt"]


@dataclass(frozen=True)
class Normalisation:
    """How values become advantages: (value - mean of the group) / (std + epsilon).

    scope: whose std, the group's own or that of all edges in the batch; unbiased: divide by n - 1 or by n;
    peers: a group is a prompt's edges at one step, or all its edges jointly (Stepwise-Flow-GRPO).
    """

    scope: Scope = "group"
    unbiased: bool = True
    epsilon: float = 1e-8
    peers: Peers = "step"

    def groups(self, tree: Tree) -> Tensor:
        """Group number [E] of every trained edge of `tree`."""
        return torch.from_numpy(tree.peers if self.peers == "step" else tree.prompt[tree.edges])


def row_values(tree: Tree, rewards: Tensor) -> Tensor:
    """The value [N, C] of every row: in each channel the mean reward of the leaves at or below it.

    rewards [I] in the order of `tree.leaves`, NaN where a sample could not be scored: such a leaf does not count, and a
    row without a scored leaf has the value NaN.
    """
    reward_of_row = torch.full((len(tree),), torch.nan, dtype=torch.float64)
    reward_of_row[torch.from_numpy(tree.leaves)] = rewards.double().cpu()
    image, channel = torch.from_numpy(tree.image), torch.from_numpy(tree.channel)
    scored = reward_of_row[image].isfinite()
    total = torch.zeros(len(tree), tree.num_channels, 2, dtype=torch.float64)  # sum and number of the leaves below
    pair = torch.stack([reward_of_row[image].nan_to_num(), torch.ones(len(image), dtype=torch.float64)], 1)
    total.index_put_((image, channel), pair * scored[:, None], accumulate=True)
    parent, level = torch.from_numpy(tree.parent), torch.from_numpy(tree.level)
    for deepest in range(tree.num_steps, 0, -1):  # a child always stands at a later level than its parent
        rows = ((level == deepest) & (parent != ROOT)).nonzero().squeeze(1)
        total.index_add_(0, parent[rows], total[rows])
    return total[..., 0] / total[..., 1]  # 0 / 0 is the NaN that masks


def edge_values(tree: Tree, rewards: Tensor) -> Tensor:
    """The value [E, C] of every trained edge: that of the row it leads to."""
    return row_values(tree, rewards)[torch.from_numpy(tree.edges)]


def normalise(values: Tensor, peers: Tensor, how: Normalisation) -> Tensor:
    """Advantages [E] of values [E] among the edges that share a number in `peers` [E].

    A masked (NaN) value gets 0, as does a whole group with fewer than two values or without spread beyond fp32 rounding:
    dividing rounding noise by epsilon would train on nothing.
    """
    known = values.isfinite()
    v = values.double().nan_to_num()
    groups = int(peers.max()) + 1 if len(peers) else 0

    def total(of: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float64).index_add_(0, peers, of)

    count = total(known.double())
    mean = total(v * known) / count.clamp(min=1)
    centred = (v - mean[peers]) * known
    largest = torch.zeros(groups, dtype=torch.float64).scatter_reduce_(0, peers, centred.abs(), "amax")
    scale = torch.zeros(groups, dtype=torch.float64).scatter_reduce_(0, peers, (v * known).abs(), "amax")
    spread = (count >= 2) & (largest > 1e-6 * scale)
    if how.scope == "group":
        std = (total(centred.square()) / (count - int(how.unbiased)).clamp(min=1)).sqrt()
    else:
        everyone = v[known]
        std = everyone.std(correction=int(how.unbiased)) if len(everyone) > 1 else torch.zeros(())
        std = std.expand(groups)
    advantage = centred / (std + how.epsilon)[peers]
    return torch.where(spread[peers] & known, advantage, torch.zeros_like(advantage)).float()


def granular(tree: Tree, rewards: Tensor, how: Normalisation) -> Tensor:
    """G2RPO's credit (eq. 12): the value in each channel (granularity) is normalised among peers, then the channels add up. [E]"""
    return torch.stack([normalise(channel, how.groups(tree), how) for channel in edge_values(tree, rewards).T]).sum(0)


def outcome(tree: Tree, rewards: Tensor, how: Normalisation) -> Tensor:
    """Flow-GRPO's credit (eq. 4): the mean reward of all images below the edge, normalised among peers. [E]"""
    return normalise(edge_values(tree, rewards).nanmean(1), how.groups(tree), how)


def _looks(tree: Tree, rewards: Tensor, rows: Ints) -> Tensor:
    """The reward of the look from each of `rows`: the image in the channel that bears the number of the row's level."""
    return row_values(tree, rewards)[torch.from_numpy(rows), torch.from_numpy(tree.level[rows])]


def gains(tree: Tree, rewards: Tensor) -> Tensor:
    """What every trained edge gained, R_{i+1} - R_i: its look is worth more than the look before it (DenseGRPO eq. 6). [E]"""
    edges = tree.edges
    return _looks(tree, rewards, edges) - _looks(tree, rewards, tree.parent[edges])


def gain(tree: Tree, rewards: Tensor, how: Normalisation) -> Tensor:
    """DenseGRPO's credit: the gain of every edge, normalised among peers. [E]"""
    return normalise(gains(tree, rewards), how.groups(tree), how)


def state(tree: Tree, rewards: Tensor, how: Normalisation) -> Tensor:
    """DenseGRPO's baseline: the look R_{i+1} from the state that the step reached, normalised among peers. [E]"""
    return normalise(_looks(tree, rewards, tree.edges), how.groups(tree), how)


def per_image(tree: Tree, rewards: Tensor, how: Normalisation) -> Tensor:
    """One advantage for every leaf, [I], among those of its prompt: for a method that trains on images and not on steps."""
    return normalise(rewards, torch.from_numpy(tree.prompt[tree.leaves]), how)


def extremes(advantage: Tensor, groups: Tensor, kept: int) -> Tensor:
    """Weights [E] with which only the `kept` / 2 highest and lowest of every group count, mean 1 (DanceGRPO's best-of-N)."""
    weights = torch.zeros_like(advantage)
    for group in groups.unique():
        places = (groups == group).nonzero().squeeze(1)
        ranked = places[advantage[places].argsort(stable=True)]
        half = min(kept // 2, len(ranked) // 2)
        chosen = torch.cat([ranked[:half], ranked[len(ranked) - half :]])
        weights[chosen] = len(ranked) / max(len(chosen), 1)
    return weights


Credit = Callable[[Tree, Tensor, Normalisation], Tensor]


def mix(
    credit: Credit,
    tree: Tree,
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    how: Normalisation,
    by: Mix = "advantage",
    clip: float | None = None,
) -> Tensor:
    """Advantages [E] of several rewards, each [I]: a weighted sum of their advantages, or the advantage of their weighted sum.

    In a sum of rewards a leaf that one of them could not score is masked; in a sum of advantages only that one's share is.
    """
    if by == "reward":
        advantage = credit(tree, torch.stack([weights[name] * rewards[name] for name in rewards]).sum(0), how)
    else:
        advantage = torch.stack([weights[name] * credit(tree, rewards[name], how) for name in rewards]).sum(0)
    return advantage if clip is None else advantage.clamp(-clip, clip)
