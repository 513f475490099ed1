"""Cost of a tree, and the division of its trained rows among optimizer updates."""

from dataclasses import dataclass

import numpy as np

from flowgrain.core.tree import ROOT, Ints, Tree


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
        reused_forward_passes: forward passes of sampling whose graphs the update uses. They replace
            forward passes with gradient.
    """

    forward_passes: int
    train_forward_passes: int
    decodes: int
    reward_calls: int
    trained_edges: int
    frozen_forward_passes: float = 0
    reused_forward_passes: int = 0

    @property
    def passes(self) -> float:
        """All forward passes. A backward pass counts as two."""
        update = 3 * self.train_forward_passes + 2 * self.reused_forward_passes
        return self.forward_passes + update + self.frozen_forward_passes

    @property
    def units(self) -> float:
        """Total cost, to compare methods: passes + decodes + reward calls."""
        return self.passes + self.decodes + self.reward_calls


def cost(tree: Tree, num_rewards: int = 1) -> Cost:
    """The cost of `tree`, if `num_rewards` rewards score its images.

    An image without a parent is given. It is neither decoded nor scored.
    """
    sampled = int((tree.parent[tree.leaves] != ROOT).sum())
    return Cost(
        forward_passes=len(tree.evaluated),
        train_forward_passes=len(tree.trained_parents),
        decodes=sampled,
        reward_calls=sampled * num_rewards,
        trained_edges=len(tree.edges),
    )


def tail_length(tree: Tree) -> int:
    """The largest number of consecutive model calls after the last stochastic step."""
    length = np.zeros(len(tree), dtype=np.int64)
    has_child = np.isin(np.arange(len(tree)), tree.evaluated)
    for row in range(len(tree)):
        parent = tree.parent[row]
        if tree.tail[row] and has_child[row]:
            length[row] = 1 + (length[parent] if parent != ROOT else 0)
    return int(length.max(initial=0))


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
    number, parents = int(updates), tree.trained_parents
    samples = len(np.unique(_first_images(tree)[parents]))
    if samples >= number:
        first = int((_shares(_first_images(tree)[parents], number, 0) == 0).sum()) * prompts
        return number, rows - first
    # Parent j of prompt p is in update (j + p) mod number.
    prompt = -np.arange(len(parents)) % number
    first = int(np.maximum((prompts - 1 - prompt) // number + 1, 0).sum())
    return min(number, len(parents) + prompts - 1), rows - first


def split_updates(tree: Tree, updates: int | str) -> list[Ints]:
    """Divide the trained parents of `tree` among the optimizer updates of a rollout.

    Every update has an equal share of the samples of every prompt, so that all ranks work on all
    updates. A parent belongs to the sample of its first image. With fewer samples than updates, an
    update has every n-th parent of a prompt.

    Args:
        tree: tree of all prompts.
        updates: number of updates, or "per_step" for one update per grid step.

    Returns:
        The rows of each update.
    """
    parents = tree.trained_parents
    if updates == "per_step":
        update = tree.grid_index[parents]
    else:
        update = np.zeros(len(parents), dtype=np.int64)
        first_image = _first_images(tree)[parents]
        for prompt in np.unique(tree.prompt[parents]):
            of_prompt = tree.prompt[parents] == prompt
            update[of_prompt] = _shares(first_image[of_prompt], int(updates), int(prompt))
    return [parents[update == number] for number in np.unique(update)]


def _shares(sample: Ints, updates: int, prompt: int) -> Ints:
    """Update of each parent of a prompt. `sample` [parents] is the sample of each parent."""
    samples, number = np.unique(sample, return_inverse=True)
    if len(samples) >= updates:
        shares: Ints = number * updates // len(samples)
        return shares
    return (np.arange(len(sample)) + prompt) % updates


def _first_images(tree: Tree) -> Ints:
    """Number of the first image at or below each row."""
    first = np.full(len(tree), len(tree.leaves), dtype=np.int64)
    first[tree.leaves] = np.arange(len(tree.leaves))
    for index in range(tree.num_steps, 0, -1):  # a child always has a larger index than its parent
        rows = np.flatnonzero((tree.grid_index == index) & (tree.parent != ROOT))
        np.minimum.at(first, tree.parent[rows], first[rows])
    return first


def split_images(tree: Tree, updates: int) -> list[Ints]:
    """The leaves of every optimizer update: equal shares of the images of every prompt.

    Args:
        tree: tree of all prompts.
        updates: number of updates. With fewer images, there are fewer updates.

    Returns:
        The leaves of each update, in rising order.
    """
    prompt = tree.prompt[tree.leaves]
    of_prompt = [tree.leaves[prompt == p] for p in np.unique(prompt)]
    parts = zip(*(np.array_split(leaves, updates) for leaves in of_prompt), strict=True)
    shares = [np.sort(np.concatenate(part)) for part in parts]
    return [share for share in shares if len(share)]
