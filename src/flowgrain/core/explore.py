"""Candidates for the noise of a tree: many are completed cheaply, the best and the worst are used.

Noise is a function of the number of its draw. A choice of candidates is therefore a table that
replaces draw numbers, and the tree stays the plan of the method.

Shapes: P prompts, K groups of a prompt, C candidates of a group, G members of a group, I images,
D draws of the plan, *L latent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flowgrain.core import credit
from flowgrain.core.credit import Normalization, RewardMix
from flowgrain.core.rollout import Noise
from flowgrain.core.tree import ROOT, Ints, Planner, Tree


def branch_groups(tree: Tree) -> list[Ints]:
    """The groups of rows of a prompt that start from one state with different noise.

    A group contains at least two stochastic children of the same row.
    """
    children = np.flatnonzero(tree.stochastic)
    parents, count = np.unique(tree.parent[children], return_counts=True)
    return [children[tree.parent[children] == parent] for parent in parents[count > 1]]


def choice_groups(tree: Tree) -> list[Ints]:
    """The rows of every group of a prompt whose noise can be chosen among candidates.

    These are the branches of every state that branches. Without branches they are the roots.

    Args:
        tree: tree of one prompt.

    Raises:
        ValueError: a branch has branches, or there is a single trajectory.
    """
    groups = branch_groups(tree)
    if groups:
        members, above = set(np.concatenate(groups).tolist()), tree.parent
        for group in groups:
            row = int(above[group[0]])
            while row != ROOT:
                if row in members:
                    raise ValueError("a branch of the tree has branches itself")
                row = int(above[row])
        return groups
    roots = np.flatnonzero(tree.parent == ROOT)
    if len(roots) < 2:
        raise ValueError("the tree has a single trajectory per prompt")
    return [roots]


def coarse_steps(start: int, num_steps: int, steps: int) -> list[int]:
    """Grid indices after `start` of a completion with `steps` steps per whole grid.

    A completion from `start` takes a proportional share of `steps`, at least one, evenly spread.
    """
    count = max(1, round(steps * (num_steps - start) / num_steps))
    return [round(i) for i in np.linspace(start, num_steps, count + 1)[1:].tolist()]


@dataclass(frozen=True)
class Candidates:
    """The candidates of a prompt.

    Attributes:
        tree: tree of the candidates of one prompt. Its leaves are the candidates, group by group.
        groups: rows of the plan by group, K groups of G members. G may differ between groups.
        draw: [K, C] draw numbers of the candidates. The first G are the draws of the plan.
    """

    tree: Tree
    groups: list[Ints]
    draw: Ints

    @property
    def image_groups(self) -> Ints:
        """Group [I] of the leaves of one prompt."""
        return np.arange(len(self.draw)).repeat(self.draw.shape[1])


def candidates_of(plan: Tree, count: int, steps: int) -> Candidates:
    """The candidates of the groups of `plan`: `count` draws each, completed by coarse ODEs.

    The rows above a group are those of the plan.

    Args:
        plan: tree of one prompt.
        count: C, at least the size of a group.
        steps: ODE steps per whole grid, see `coarse_steps`.

    Raises:
        ValueError: no noise of the plan can be chosen, or `count` is too small.
    """
    groups, size = choice_groups(plan), plan.num_steps
    largest = max(map(len, groups))
    if count < largest:
        raise ValueError(f"a group has {largest} members")
    planner, draws = Planner(size), list[int]()
    # Rows above all groups go first, so that leaves are sorted by group.
    copy = _copy_above(plan, groups, planner, draws)
    of_group, unused = [], int(plan.draw.max()) + 1
    for number, group in enumerate(groups):
        own = plan.draw[group]
        unused_here = np.arange(count - len(own), dtype=np.int64) + unused
        unused += len(unused_here)
        of_group.append(np.concatenate([own, unused_here]))
        parent, index = int(plan.parent[group[0]]), int(plan.grid_index[group[0]])
        for draw in of_group[-1].tolist():
            if parent == ROOT:
                node = planner.root()
            else:
                length = index - int(plan.grid_index[parent])
                node = planner.sde(copy[parent], train=False, length=length)[0]
            draws.append(draw)
            if index < size:
                node = planner.ode(node, via=coarse_steps(index, size, steps))
            planner.image(node, channel=number)
    tree = planner.tree()
    draw = tree.draw.copy()
    draw[draw >= 0] = draws
    return Candidates(replace(tree, draw=draw), groups, np.stack(of_group))


def _copy_above(
    plan: Tree, groups: Sequence[Ints], planner: Planner, draws: list[int]
) -> dict[int, int]:
    """Copy the rows of `plan` above `groups`, and append the draws of the copies to `draws`.

    Returns:
        The row of every copy, by row of the plan.
    """
    above = set[int]()
    for group in groups:
        row = int(plan.parent[group[0]])
        while row != ROOT:
            above.add(row)
            row = int(plan.parent[row])
    copy = dict[int, int]()
    for row in sorted(above):  # parents come before their children
        parent, index = int(plan.parent[row]), int(plan.grid_index[row])
        if parent == ROOT:
            copy[row] = planner.root()
        elif plan.stochastic[row]:
            length = index - int(plan.grid_index[parent])
            copy[row] = planner.sde(copy[parent], train=False, length=length)[0]
        else:
            order = 2 if plan.multistep[row] else 1
            copy[row] = planner.ode(copy[parent], via=[index], order=order)
        if plan.draw[row] >= 0:
            draws.append(int(plan.draw[row]))
    return copy


def extremes(score: Sequence[float], keep: int) -> Ints:
    """Positions [keep] of the best and the worst of `score` [C], in rising order.

    The best are `keep` / 2, rounded up. Of equal scores, the earlier counts as the worse. Positions
    without a score (NaN) are only used if there are too few others.
    """
    values = np.asarray(score, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(values))
    if len(known) <= keep:
        failed = np.flatnonzero(np.isnan(values))
        chosen: Ints = np.concatenate([known, failed[: keep - len(known)]])
        return np.sort(chosen)
    ranked = known[np.argsort(values[known], kind="stable")]
    worst = keep // 2
    chosen = np.concatenate([ranked[:worst], ranked[len(ranked) - (keep - worst) :]])
    return np.sort(chosen)


def one_score(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], groups: Ints, by: RewardMix
) -> Tensor:
    """One score [I] of several rewards.

    NaN for an image without any score. With "reward", also if one of several scores is missing.

    Args:
        rewards: rewards [I] by name.
        weights: weight of each reward by name.
        groups: [I] number of the group of every image.
        by: "reward" sums weighted rewards. "advantage" sums weighted rewards, each of which is
            normalized within its group.
    """
    if by == "reward" or len(rewards) == 1:
        return credit.weighted_sum(rewards, weights).double()
    number = torch.from_numpy(np.unique(groups, return_inverse=True)[1])
    terms = {name: credit.normalize(v, number, Normalization()) for name, v in rewards.items()}
    total = credit.weighted_sum(terms, weights).double()
    return torch.where(credit.known(rewards, by), total, torch.nan)


def choose(candidates: Candidates, score: Tensor) -> list[list[Ints]]:
    """Positions of the chosen candidates of every prompt and group, in rising order.

    Args:
        candidates: K groups of C candidates.
        score: [P, K, C] scores of the candidates.
    """
    sizes = [len(group) for group in candidates.groups]
    return [
        [extremes(of_group, keep) for of_group, keep in zip(of_prompt, sizes, strict=True)]
        for of_prompt in score.tolist()
    ]


def draw_table(plan: Tree, candidates: Candidates, chosen: Sequence[Sequence[Ints]]) -> Ints:
    """Draw numbers [P, D] that replace the draw numbers 0 to D - 1 of `plan`, by prompt."""
    table = np.tile(np.arange(int(plan.draw.max()) + 1), (len(chosen), 1))
    for prompt, of_prompt in enumerate(chosen):
        for number, places in enumerate(of_prompt):
            rows = candidates.groups[number]
            table[prompt, plan.draw[rows]] = candidates.draw[number, places]
    return table


def replace_draws(noise: Noise, table: Ints) -> Noise:
    """`noise` with the draw numbers replaced by `table` [P, D].

    Prompt numbers of P or more belong to prompts that are repeated.
    """
    return lambda prompt, draw: noise(prompt, table[prompt % len(table), draw])
