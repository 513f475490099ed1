"""DenseGRPO (arXiv 2601.20218)."""

from collections.abc import Collection
from typing import Literal

from torch import Tensor

from flowgrain.core import credit
from flowgrain.core.credit import Normalization, Scope
from flowgrain.core.tree import Tree
from flowgrain.methods.base import register
from flowgrain.methods.completions import CompletedTrajectories
from flowgrain.methods.policy_gradient import SdeType
from flowgrain.settings import Setting


@register
class DenseGRPO(CompletedTrajectories):
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
    dense_reward: Literal["gain", "state"] = Setting(
        "gain", "Reward of a step: the gain R_next - R, or R_next (state, the paper's baseline)."
    )

    def completed_states(self, steps: Collection[int]) -> set[int]:
        before = (0, 1) if self.dense_reward == "gain" else (1,)
        return {k + after for k in steps for after in before}

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        return (credit.gain if self.dense_reward == "gain" else credit.state)(tree, rewards, how)

    def published_passes(self, num_steps: int) -> int:
        if self.completion_steps != "all":
            return 0
        return self.group_size * num_steps * (num_steps + 3) // 2
