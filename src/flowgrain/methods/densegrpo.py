"""DenseGRPO (arXiv 2601.20218)."""

from collections.abc import Collection
from typing import Literal

from pydantic import field_validator
from torch import Tensor

from flowgrain.core import credit
from flowgrain.core.credit import Normalization, Scope
from flowgrain.core.tree import Ints, Planner, Tree
from flowgrain.methods.base import register
from flowgrain.methods.flow_grpo import FlowGRPODefaults
from flowgrain.methods.options import SharedNoise
from flowgrain.methods.plans import completed_trajectory
from flowgrain.methods.policy_gradient import SdeType
from flowgrain.settings import Setting


@register
class DenseGRPO(FlowGRPODefaults, SharedNoise):
    """DenseGRPO: trajectories with an ODE completion of every state.

    The reward of a step is the gain between the completions before and after it.
    """

    name = "densegrpo"
    title = "DenseGRPO"
    paper = "2601.20218"
    summary = (
        "Every state of a trajectory is completed by the ODE. The reward of a step is the gain "
        "between the completions before and after it. The image is the completion after the step."
    )

    sde_type: SdeType = "calibrated_sde"  # section 4.2
    std_scope: Scope = "group"  # eq. 7
    std_unbiased: bool = True  # own choice
    updates_per_rollout: int | Literal["per_step"] = 1  # section 5.1: 8 batches of 144 accumulated
    completion_steps: int | Literal["all"] = Setting(
        "all", "ODE steps of a completion: all remaining grid steps, or a number.", unit="ODE steps"
    )  # section 4.1
    dense_reward: Literal["gain", "state"] = Setting(
        "gain", "Reward of a step: the gain R_next - R, or R_next (state, the paper's baseline)."
    )

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        steps = self._steps(tree.num_steps)
        before = (0, 1) if self.dense_reward == "gain" else (1,)
        completed = {k + after for k in steps for after in before}
        for node in self.roots(tree):
            self._complete(tree, node, steps, completed)

    def calibration_plan(self, tree: Planner) -> None:
        steps = self._steps(tree.num_steps)
        self._complete(tree, tree.root(), steps, {k + after for k in steps for after in (0, 1)})

    def _complete(
        self, tree: Planner, node: int, steps: Collection[int], completed: Collection[int]
    ) -> None:
        completed_trajectory(tree, node, steps, completed, self.completion_steps, self.tail_order)

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        return (credit.gain if self.dense_reward == "gain" else credit.state)(tree, rewards, how)

    def leaf_groups(self, tree: Tree) -> Ints:
        # A gain is a difference of two channels, so their images are compared with each other.
        return tree.prompt[tree.leaves]

    def last_possible_step(self, num_steps: int) -> int:
        # The step into sigma = 0 is also stochastic, except with CPS, which adds no noise there.
        return num_steps - 2 if self.sde_type == "cps" else num_steps - 1

    def _steps(self, num_steps: int) -> tuple[int, ...]:
        return self.steps(self.last_possible_step(num_steps) + 1)

    def published_passes(self, num_steps: int) -> int:
        if self.completion_steps != "all":
            return 0
        return self.group_size * num_steps * (num_steps + 3) // 2

    @field_validator("completion_steps")
    @classmethod
    def _at_least_one_step(cls, value: int | str) -> int | str:
        if value != "all" and int(value) < 1:
            raise ValueError("must be at least 1, or all")
        return value
