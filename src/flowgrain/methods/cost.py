"""Plan and cost of a method, before anything runs."""

from dataclasses import replace

from flowgrain.core.cost import Cost, cost, split_updates
from flowgrain.core.tree import Planner, Tree
from flowgrain.methods.base import Method
from flowgrain.methods.forward_process import ForwardProcess


def plan_tree(method: Method, num_steps: int, step: int = 1, seed: int = 0) -> Tree:
    """The tree of one prompt at training step `step` on a grid of `num_steps` steps."""
    planner = Planner(num_steps)
    method.plan(planner, step, seed)
    return planner.tree()


def num_updates(method: Method, tree: Tree, prompts_per_step: int) -> int:
    """Optimizer updates of a rollout of `tree` for `prompts_per_step` prompts."""
    if isinstance(method, ForwardProcess):
        return min(int(method.updates_per_rollout), len(tree.leaves))
    return len(split_updates(tree.repeat(prompts_per_step), method.updates_per_rollout))


def price(
    method: Method,
    num_steps: int,
    num_rewards: int = 1,
    prompts_per_step: int = 1,
    step: int = 1,
    seed: int = 0,
) -> Cost:
    """The cost of training step `step` per prompt, including its optimizer updates."""
    tree = plan_tree(method, num_steps, step, seed)
    counted = cost(tree, num_rewards)
    if isinstance(method, ForwardProcess):
        gradient = old = float(len(tree.leaves) * method.num_levels(num_steps))
    else:
        gradient = float(counted.train_forward_passes)
        later = split_updates(tree.repeat(prompts_per_step), method.updates_per_rollout)[1:]
        old = sum(map(len, later)) / prompts_per_step
    frozen = old + (gradient if method.kl_weight else 0)
    return replace(counted, train_forward_passes=int(gradient), frozen_forward_passes=frozen)
