"""Plan and cost of a method, before anything runs."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from flowgrain.core.cost import Cost, cost, count_updates
from flowgrain.core.tree import Planner, Tree, TreeTooLarge
from flowgrain.methods.base import Method
from flowgrain.methods.forward_process import ForwardProcess
from flowgrain.methods.repair import Repair
from flowgrain.methods.reward_gradient import RewardGradient
from flowgrain.settings import SettingsError


def plan_tree(
    method: Method,
    num_steps: int,
    step: int = 1,
    seed: int = 0,
    sigmas: Sequence[float] | None = None,
) -> Tree:
    """The tree of one prompt at training step `step` on a grid of `num_steps` steps.

    Args:
        method: its plan.
        num_steps: T.
        step: training step, from 1.
        seed: seed of the run.
        sigmas: [T + 1] noise levels of the grid. Default: evenly spaced. No cost depends on them.

    Raises:
        SettingsError: the tree has more than `core.tree.MAX_ROWS` rows.
    """
    planner = Planner(num_steps, sigmas)
    try:
        method.plan(planner, step, seed)
    except TreeTooLarge as error:
        group, steps = f"method.group_size={method.group_size}", f"sampling.num_steps={num_steps}"
        first, second = (steps, group) if num_steps > method.group_size else (group, steps)
        raise SettingsError(f"{first}: {error} with {second}. Use smaller values.") from None
    return planner.tree()


def num_updates(method: Method, tree: Tree, prompts_per_step: int) -> int:
    """Optimizer updates of a rollout of `tree` for `prompts_per_step` prompts."""
    if isinstance(method, ForwardProcess | RewardGradient):
        return min(int(method.updates_per_rollout), len(tree.leaves))
    return count_updates(tree, method.updates_per_rollout, prompts_per_step)[0]


def price(
    method: Method,
    num_steps: int,
    num_rewards: int = 1,
    prompts_per_step: int = 1,
    step: int = 1,
    seed: int = 0,
    tree: Tree | None = None,
) -> Cost:
    """The cost of training step `step` per prompt, including its optimizer updates.

    Args:
        method: the method.
        num_steps: T, steps of the sampling grid.
        num_rewards: rewards that score an image.
        prompts_per_step: prompts of a training step.
        step: training step, from 1.
        seed: seed of the run.
        tree: tree of one prompt. Default: the plan of the method.
    """
    tree = plan_tree(method, num_steps, step, seed) if tree is None else tree
    counted = cost(tree, num_rewards)
    if isinstance(method, ForwardProcess):
        prompt = torch.from_numpy(tree.prompt[tree.leaves])
        # The number of selected images does not depend on the advantages.
        images = int(method.selected(torch.zeros(len(prompt)), prompt).sum())
        levels = method.num_levels(num_steps)
        gradient = images * levels
        updates = num_updates(method, tree, prompts_per_step)
        first = len(np.array_split(np.arange(images), updates)[0])
        frozen = float(method.frozen_passes(gradient, (images - first) * levels))
        if isinstance(method, Repair):  # at most: every image may get candidates
            decodes = images * (1 + method.num_candidates)
            counted = replace(counted, decodes=decodes, reward_calls=decodes * num_rewards)
    elif isinstance(method, RewardGradient):
        gradient = len(tree.leaves) * method.passes_per_image
        frozen = float(gradient if method.kl_weight else 0)
    else:
        gradient = int(counted.train_forward_passes)
        later = count_updates(tree, method.updates_per_rollout, prompts_per_step)[1]
        frozen = later / prompts_per_step + (gradient if method.kl_weight else 0)
    return replace(counted, train_forward_passes=gradient, frozen_forward_passes=frozen)
