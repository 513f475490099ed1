"""Cost of a tree, and the division of its trained rows among optimizer updates."""

from dataclasses import dataclass

import numpy as np

from flowgrain.core.tree import Ints, Tree


@dataclass(frozen=True)
class Cost:
    """Cost of a tree, as counts of operations.

    A forward pass evaluates the model on one row. With true CFG it evaluates two rows.

    Attributes:
        forward_passes: forward passes of sampling.
        train_forward_passes: forward passes with gradient.
        decodes: decoded images.
        reward_calls: scored images times rewards.
        trained_edges: edges with a loss.
        frozen_forward_passes: forward passes of the old policy and the reference during the
            update, without gradient. They depend on the method, see `methods.cost.price`.
    """

    forward_passes: int
    train_forward_passes: int
    decodes: int
    reward_calls: int
    trained_edges: int
    frozen_forward_passes: float = 0

    @property
    def passes(self) -> float:
        """All forward passes. A pass with gradient counts as three because of its backward pass."""
        return self.forward_passes + 3 * self.train_forward_passes + self.frozen_forward_passes

    @property
    def units(self) -> float:
        """Total cost, to compare methods: passes + decodes + reward calls."""
        return self.passes + self.decodes + self.reward_calls


def cost(tree: Tree, num_rewards: int = 1) -> Cost:
    """The cost of `tree`, if `num_rewards` rewards score its images."""
    return Cost(
        forward_passes=len(tree.evaluated),
        train_forward_passes=len(tree.trained_parents),
        decodes=len(tree.leaves),
        reward_calls=len(tree.leaves) * num_rewards,
        trained_edges=len(tree.edges),
    )


def count_updates(tree: Tree, updates: int | str, prompts: int) -> tuple[int, int]:
    """The result of `split_updates` in numbers, without the tree of all prompts.

    Args:
        tree: tree of one prompt.
        updates: see `split_updates`.
        prompts: number of prompts.

    Returns:
        The number of updates, and the number of rows in all updates but the first.
    """
    indices = tree.grid_index[tree.trained_parents]
    rows = len(indices) * prompts
    if not rows:
        return 0, 0
    if updates == "per_step":
        distinct, counts = np.unique(indices, return_counts=True)
        return len(distinct), rows - int(counts[0]) * prompts
    number = int(updates)
    if number > prompts:
        return min(number, rows), rows - -(-rows // number)
    return number, (prompts - -(-prompts // number)) * len(indices)


def split_updates(tree: Tree, updates: int | str) -> list[Ints]:
    """Divide the trained parents of `tree` among the optimizer updates of a rollout.

    Args:
        tree: tree of all prompts.
        updates: number of updates, each with an equal share of the prompts, or "per_step" for one
            update per grid step. With fewer prompts than updates, an update has every n-th parent.

    Returns:
        The rows of each update.
    """
    parents = tree.trained_parents
    if updates == "per_step":
        indices = tree.grid_index[parents]
        return [parents[indices == index] for index in np.unique(indices)]
    shares = np.array_split(np.unique(tree.prompt[parents]), int(updates))
    if any(len(share) == 0 for share in shares):  # fewer prompts than updates
        return [parents[start :: int(updates)] for start in range(min(int(updates), len(parents)))]
    return [parents[np.isin(tree.prompt[parents], share)] for share in shares]
