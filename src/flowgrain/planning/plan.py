"""The cost of a configuration per prompt, by counting its tree: `flowgrain plan`."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from flowgrain.config.schema import Config
from flowgrain.core.cost import Cost, cost
from flowgrain.core.explore import candidates_of
from flowgrain.core.schedule import schedule
from flowgrain.core.subtree import subtree
from flowgrain.core.tree import Tree
from flowgrain.methods import price
from flowgrain.methods.calibration import calibration_cost

_COUNTED_ROWS = 100_000
"""Rows of the trees that a plan counts. Counting them takes less than a second."""


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run. Nothing is loaded or sampled.

    Attributes:
        config: configuration of the run.
    """

    config: Config

    @cached_property
    def tree(self) -> Tree:
        """Tree of one prompt at the first training step."""
        return self.config.tree()

    @cached_property
    def cost(self) -> Cost:
        """Cost of one prompt at the first training step."""
        return prompt_cost(self.config)

    @cached_property
    def published_forward_passes(self) -> int:
        """Sampling forward passes per prompt of the method's published code. 0 if unknown."""
        if self.config.data.kind is not None:
            return 0
        return self.config.method.published_passes(self.config.sampling.num_steps)

    @cached_property
    def peak_latents(self) -> int:
        """Largest number of latents of one prompt that are held at once."""
        config = self.config
        return schedule(self.tree, config.sampling.batch_size, config.tail_schedule).num_slots

    @cached_property
    def calibration_forward_passes(self) -> int:
        """Forward passes of the calibration, once per run. 0 if the method needs none."""
        config = self.config
        calibration = calibration_cost(config.method, config.sampling.num_steps)
        return calibration.forward_passes

    @cached_property
    def forward_passes_of_steps(self) -> list[int]:
        """Sampling forward passes per prompt of the counted training steps.

        All steps are counted up to `_COUNTED_ROWS` rows of their trees. Of a longer run, evenly
        spaced steps are counted.
        """
        if not self.config.method.plan_varies:
            return [self.cost.forward_passes]
        steps = self.config.training.max_steps
        count = min(steps, max(1, _COUNTED_ROWS // len(self.tree)))
        counted = (1 + number * steps // count for number in range(count))
        return [_sampling_passes(self.config, self.config.tree(step)) for step in counted]

    @property
    def mean_forward_passes(self) -> float:
        """Sampling forward passes per prompt, mean over the training steps."""
        return sum(self.forward_passes_of_steps) / len(self.forward_passes_of_steps)

    @property
    def total_forward_passes(self) -> int:
        """Sampling forward passes of the whole run, without calibration."""
        counted, training = self.forward_passes_of_steps, self.config.training
        of_prompt = sum(counted) * training.max_steps / len(counted)
        return round(of_prompt * training.prompts_per_step)

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name, per prompt. Numbers that do not apply are left out."""
        numbers: dict[str, Any] = {"method": self.config.method.name, **vars(self.cost)}
        if not self.cost.reused_forward_passes:
            del numbers["reused_forward_passes"]
        if self.published_forward_passes:
            numbers["published_forward_passes"] = self.published_forward_passes
        if self.config.sampling.explore.candidates:
            explored = candidates_cost(self.config, self.tree)
            numbers["explore_forward_passes"] = explored.forward_passes
            numbers["explore_decodes"] = explored.decodes
        if self.config.training.adaptive_groups.probe:
            numbers["largest_wasted_forward_passes"] = largest_waste(self.config, self.tree)
        numbers["peak_latents"] = self.peak_latents
        if self.calibration_forward_passes:
            numbers["calibration_forward_passes"] = self.calibration_forward_passes
        if self.config.method.plan_varies:
            numbers["mean_forward_passes"] = self.mean_forward_passes
        return numbers


def candidates_cost(config: Config, tree: Tree) -> Cost:
    """The cost of the candidates of one prompt. `tree` is the exact tree of one prompt."""
    explore, num_rewards = config.sampling.explore, len(config.rewards)
    return cost(candidates_of(tree, explore.candidates, explore.num_steps).tree, num_rewards)


def _sampling_passes(config: Config, tree: Tree) -> int:
    """Sampling forward passes of one prompt with the exact tree `tree`."""
    explored = config.sampling.explore.candidates > 0
    return len(tree.evaluated) + (candidates_cost(config, tree).forward_passes if explored else 0)


def largest_waste(config: Config, tree: Tree) -> int:
    """The forward passes of the replaced prompts of one place in the step, at most."""
    adaptive = config.training.adaptive_groups
    return len(subtree(tree, 0, adaptive.probe).tree.evaluated) * adaptive.max_rounds


def prompt_cost(config: Config, step: int = 1, tree: Tree | None = None) -> Cost:
    """The cost of one prompt at training step `step`, with the candidates of an exploration.

    With training.graph_memory in GB, no forward pass counts as reused: the memory of a graph is
    measured when the run starts. Replaced prompts of adaptive groups are not counted: their number
    depends on the rewards. With rollout.max_staleness=1, the cost is that of the steps after the
    first.

    Args:
        config: settings of the run.
        step: training step, from 1.
        tree: tree of one prompt at this step. Default: `config.tree(step)`.
    """
    tree = config.tree(step) if tree is None else tree
    exact = price(
        config.method,
        config.sampling.num_steps,
        num_rewards=len(config.rewards),
        prompts_per_step=config.training.prompts_per_step,
        step=step,
        seed=config.runtime.seed,
        tree=tree,
    )
    if config.training.graph_memory == "all":
        reused = exact.train_forward_passes
        exact = replace(exact, train_forward_passes=0, reused_forward_passes=reused)
    if config.rollout.max_staleness:  # the old policy is not the one of the first update
        passes = exact.train_forward_passes * (1 + (config.method.kl_weight > 0))
        exact = replace(exact, frozen_forward_passes=passes)
    if not config.sampling.explore.candidates:
        return exact
    more = candidates_cost(config, tree)
    return replace(
        exact,
        forward_passes=exact.forward_passes + more.forward_passes,
        decodes=exact.decodes + more.decodes,
        reward_calls=exact.reward_calls + more.reward_calls,
    )
