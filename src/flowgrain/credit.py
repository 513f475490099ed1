"""Credit: rewards at the leaves of a tree become one advantage for every trained edge.

Shapes: I images (leaves), E trained edges, N rows, C channels, M rewards. Everything here is fp32 or better, on the CPU:
a group lives in one process, so credit needs no communication.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowgrain.tree import ROOT, Tree

Scope = Literal["group", "global"]
Mix = Literal["advantage", "reward"]


@dataclass(frozen=True)
class Normalisation:
    """How values become advantages: (value - mean of the group) / (std + epsilon).

    scope: whose std, the group's own or that of all edges in the batch; unbiased: divide by n - 1 or by n.
    """

    scope: Scope = "group"
    unbiased: bool = True
    epsilon: float = 1e-8


def edge_values(tree: Tree, rewards: Tensor) -> Tensor:
    """The value [E, C] of every trained edge: in each channel the mean reward of the leaves below it.

    rewards [I] in the order of `tree.leaves`, NaN where a sample could not be scored: such a leaf does not count, and an
    edge without a scored leaf has the value NaN.
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
    total = total[torch.from_numpy(tree.edges)]
    return total[..., 0] / total[..., 1]  # 0 / 0 is the NaN that masks


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
    values, peers = edge_values(tree, rewards), torch.from_numpy(tree.peers)
    return torch.stack([normalise(channel, peers, how) for channel in values.T]).sum(0)


def outcome(tree: Tree, rewards: Tensor, how: Normalisation) -> Tensor:
    """Flow-GRPO's credit (eq. 4): the mean reward of all images below the edge, normalised among peers. [E]"""
    values, peers = edge_values(tree, rewards), torch.from_numpy(tree.peers)
    return normalise(values.nanmean(1), peers, how)


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
