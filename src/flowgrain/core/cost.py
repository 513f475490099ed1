"""The cost of a tree, by counting, and how its trained rows are divided among optimizer updates."""

from dataclasses import dataclass

import numpy as np

from flowgrain.core.tree import Ints, Tree


@dataclass(frozen=True)
class Cost:
    """What a tree costs. A forward pass is one row through the model (two rows with true CFG).

    Attributes:
        forward_passes: forward passes of sampling.
        train_forward_passes: forward passes with gradient.
        decodes: images decoded.
        reward_calls: images scored, times rewards.
        trained_edges: edges with a loss.
        frozen_forward_passes: forward passes of the update without gradient, by the old policy and
            the reference. The tree does not determine them; see `methods.cost.price`.
    """

    forward_passes: int
    train_forward_passes: int
    decodes: int
    reward_calls: int
    trained_edges: int
    frozen_forward_passes: float = 0

    @property
    def passes(self) -> float:
        """All forward passes. A pass with gradient counts three times, for forward and backward."""
        return self.forward_passes + 3 * self.train_forward_passes + self.frozen_forward_passes

    @property
    def units(self) -> float:
        """One number to compare methods by: passes + decodes + reward calls."""
        return self.passes + self.decodes + self.reward_calls


def cost(tree: Tree, num_rewards: int = 1) -> Cost:
    """The cost of `tree`, which is scored by `num_rewards` rewards."""
    return Cost(
        forward_passes=len(tree.evaluated),
        train_forward_passes=len(tree.trained_parents),
        decodes=len(tree.leaves),
        reward_calls=len(tree.leaves) * num_rewards,
        trained_edges=len(tree.edges),
    )


def split_updates(tree: Tree, updates: int | str) -> list[Ints]:
    """Divide the trained parents of `tree` among the optimizer updates of a rollout.

    Args:
        tree: tree of all prompts.
        updates: number of updates, which get equal shares of the prompts; or "per_step", one update
            per grid step.
    """
    parents = tree.trained_parents
    if updates == "per_step":
        indices = tree.grid_index[parents]
        return [parents[indices == index] for index in np.unique(indices)]
    shares = np.array_split(np.unique(tree.prompt[parents]), int(updates))
    if any(len(share) == 0 for share in shares):  # fewer prompts than updates
        return [part for part in np.array_split(parents, int(updates)) if len(part)]
    return [parents[np.isin(tree.prompt[parents], share)] for share in shares]
