"""Parts of plans that several methods share: initial noise, trajectories, tails, completions."""

from collections.abc import Collection
from typing import Literal

import numpy as np

from flowgrain.core.tree import Planner


def initial_noise(tree: Planner, count: int, shared: bool) -> list[int]:
    """Rows of `count` initial noise samples. If `shared`, all of them are the same row."""
    return [tree.root()] * count if shared else [tree.root() for _ in range(count)]


def trajectory(
    tree: Planner, node: int, stop: int, stochastic: Collection[int], trained: Collection[int]
) -> int:
    """Add a trajectory from `node` at grid index 0 to `stop`, with noise at the steps `stochastic`.

    Trajectories that start from the same node share their first ODE steps.

    Returns:
        The last row.
    """
    stochastic, trained = set(stochastic), set(trained)
    for k in range(stop):
        node = (
            tree.sde(node, train=k in trained)[0] if k in stochastic else tree.ode(node, to=k + 1)
        )
    return node


def spread(start: int, stop: int, steps: int) -> list[int]:
    """`steps` grid indices after `start`, evenly spread and ending at `stop`."""
    return [round(index) for index in np.linspace(start, stop, steps + 1)[1:].tolist()]


def tail_indices(index: int, num_steps: int, ratio: float = 1.0) -> list[int]:
    """Grid indices of an ODE tail from `index`. `ratio`: share of the grid steps that it takes."""
    return spread(index, num_steps, max(1, int((num_steps - index) * ratio)))


def completed_trajectory(
    tree: Planner,
    node: int,
    steps: Collection[int],
    completed: Collection[int],
    completion_steps: int | Literal["all"] = "all",
    order: int = 1,
) -> None:
    """Add a trajectory from `node` to sigma = 0 with ODE completions of its states (DenseGRPO).

    Args:
        tree: planner.
        node: initial noise.
        steps: grid indices with a stochastic step.
        completed: grid indices whose states are completed. The channel of the image is this index.
        completion_steps: ODE steps of a completion: all remaining grid steps, or a number.
        order: order of the ODE steps.
    """
    num_steps = tree.num_steps
    for k in range(num_steps):
        if k in completed:
            remaining = num_steps - k
            count = remaining if completion_steps == "all" else min(completion_steps, remaining)
            leaf = tree.ode(node, via=spread(k, num_steps, count), order=order)
            tree.image(leaf, channel=k)
        node = tree.sde(node)[0] if k in steps else tree.ode(node, to=k + 1)
    tree.image(node, channel=num_steps)
