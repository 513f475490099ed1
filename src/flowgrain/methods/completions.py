"""Options of methods whose trajectories have an ODE completion of every state."""

from collections.abc import Collection
from typing import Literal

from pydantic import field_validator

from flowgrain.core.tree import Ints, Planner, Tree
from flowgrain.methods.flow_grpo import FlowGRPODefaults
from flowgrain.methods.options import SharedNoise
from flowgrain.methods.plans import completed_trajectory
from flowgrain.settings import Setting


class CompletedTrajectories(FlowGRPODefaults, SharedNoise):
    """Trajectories with an ODE completion of every state."""

    completion_steps: int | Literal["all"] = Setting(
        "all", "ODE steps of a completion: all remaining grid steps, or a number.", unit="ODE steps"
    )  # DenseGRPO section 4.1

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        """See `Method.plan`."""
        steps = self.steps(self.last_possible_step(tree.num_steps) + 1)
        completed = self.completed_states(steps)
        for node in self.roots(tree):
            self._complete(tree, node, steps, completed)

    def completed_states(self, steps: Collection[int]) -> set[int]:
        """Grid indices of the completed states: before and after every stochastic step."""
        return {k + after for k in steps for after in (0, 1)}

    def leaf_groups(self, tree: Tree) -> Ints:
        """All images of a prompt: a gain is a difference of images of two channels."""
        return tree.prompt[tree.leaves]

    def calibration_plan(self, tree: Planner) -> None:
        """See `PolicyGradient.calibration_plan`."""
        steps = self.steps(self.last_possible_step(tree.num_steps) + 1)
        # A subclass may complete fewer states. The gain of every step needs all of them.
        completed = CompletedTrajectories.completed_states(self, steps)
        self._complete(tree, tree.root(), steps, completed)

    def _complete(
        self, tree: Planner, node: int, steps: Collection[int], completed: Collection[int]
    ) -> None:
        completed_trajectory(tree, node, steps, completed, self.completion_steps, self.tail_order)

    def last_possible_step(self, num_steps: int) -> int:
        """The last grid index that may be stochastic."""
        # The step into sigma = 0 is also stochastic, except with CPS, which adds no noise there.
        return num_steps - 2 if self.sde_type == "cps" else num_steps - 1

    @field_validator("completion_steps")
    @classmethod
    def _at_least_one_step(cls, value: int | str) -> int | str:
        if value != "all" and int(value) < 1:
            raise ValueError("must be at least 1, or all")
        return value
