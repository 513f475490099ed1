"""Parts of a tree that are sampled at different times, and the whole that they give.

Shapes: P prompts, N rows of the tree of one prompt, S slots, *L latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flowgrain.core.rollout import Rollout
from flowgrain.core.tree import ROOT, Ints, Tree


@dataclass(frozen=True)
class Subtree:
    """Some trajectories of a tree.

    Attributes:
        tree: tree of one prompt. Draw numbers are those of the whole tree.
        rows: row of the whole tree of every row.
    """

    tree: Tree
    rows: Ints


def subtree(tree: Tree, first: int, last: int) -> Subtree:
    """The trajectories from root number `first` to before root number `last` of one prompt."""
    root = np.zeros(len(tree), dtype=np.int64)
    root[tree.parent == ROOT] = np.arange(int((tree.parent == ROOT).sum()))
    for row in np.flatnonzero(tree.parent != ROOT):
        root[row] = root[tree.parent[row]]
    chosen = (root >= first) & (root < last)
    rows, number = np.flatnonzero(chosen), np.cumsum(chosen) - 1
    images = chosen[tree.image]
    part = Tree(
        num_steps=tree.num_steps,
        num_prompts=1,
        parent=np.where(tree.parent == ROOT, ROOT, number[tree.parent])[rows],
        grid_index=tree.grid_index[rows],
        stochastic=tree.stochastic[rows],
        trained=tree.trained[rows],
        multistep=tree.multistep[rows],
        kept=tree.kept[rows],
        prompt=tree.prompt[rows],
        draw=tree.draw[rows],
        image=number[tree.image[images]],
        channel=tree.channel[images],
    )
    return Subtree(part, rows)


@dataclass(frozen=True)
class SampledPart:
    """The rollout of a subtree.

    Attributes:
        subtree: subtree of one prompt.
        rollout: latents of several prompts.
        source: [P] prompt number in `rollout` of every prompt of the whole, or -1.
    """

    subtree: Subtree
    rollout: Rollout
    source: Ints


def assemble(tree: Tree, parts: Sequence[SampledPart]) -> Rollout:
    """The rollout of `tree` for P prompts, from parts that together contain all of its rows.

    Only latents that the update or the decoder needs are kept. The latents of all parts have the
    same device and dtype. Passes and batches are those of all
    parts, also of prompts that no prompt of the whole uses.

    Args:
        tree: tree of one prompt.
        parts: the parts.
    """
    prompts, size = len(parts[0].source), len(tree)
    whole = tree.repeat(prompts)
    needed = tree.kept.copy()
    needed[tree.leaves] = needed[tree.edges] = needed[tree.trained_parents] = True
    slot, latents, count = np.zeros(len(whole), dtype=np.int64), [], 0
    for part in parts:
        rows = part.subtree.rows
        local = np.flatnonzero(needed[rows])
        used = np.flatnonzero(part.source >= 0)
        sampled = (part.source[used, None] * len(rows) + local).ravel()
        latents.append(part.rollout.at(sampled))
        slot[(used[:, None] * size + rows[local]).ravel()] = np.arange(len(sampled)) + count
        count += len(sampled)
    return Rollout(
        whole,
        torch.cat(latents),
        slot,
        sum(part.rollout.forward_passes for part in parts),
        sum(part.rollout.batches for part in parts),
    )
