"""Flow-GRPO-Fast (published code of arXiv 2505.05470)."""

from typing import Literal

from flowgrain.core.credit import RewardMix, Scope
from flowgrain.core.tree import Planner
from flowgrain.methods.base import register
from flowgrain.methods.flow_grpo import FLOW_GRPO_RUN, FlowGRPODefaults
from flowgrain.methods.options import CompressedTail, SharedNoise
from flowgrain.methods.plans import trajectory
from flowgrain.methods.policy_gradient import SdeType
from flowgrain.methods.window import WindowChoice, WindowSchedule


@register
class FlowGRPOFast(WindowChoice, SharedNoise, CompressedTail):
    """Flow-GRPO with noise only in a short window that is drawn in the first half of the grid."""

    name = "flow_grpo_fast"
    title = "Flow-GRPO-Fast"
    paper = "2505.05470"
    summary = (
        "The trajectories of a group differ only in the noise of a short window. They are compared "
        "by their final images, and every step of the window has the same advantage."
    )
    config_defaults = FLOW_GRPO_RUN  # section 5
    learning_rates = FlowGRPODefaults.learning_rates

    group_size: int = 24  # section 5
    sde_type: SdeType = "cps"  # published code
    eta: float = 0.8  # published code
    cps_log_prob: Literal["gaussian", "squared_error"] = "squared_error"  # published code
    clip_range: float = 1e-5  # published code, for this log-probability
    updates_per_rollout: int | Literal["per_step"] = 2  # published code
    std_scope: Scope = "global"  # published code
    std_unbiased: bool = False  # published code
    std_epsilon: float = 1e-4  # published code
    reward_mix: RewardMix = "reward"  # published code
    window_size: int = 3  # published code
    window_schedule: WindowSchedule = "random"  # published code
    window_region: Literal["all", "first_half"] = "first_half"  # published code

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        window = self.window(tree.num_steps, step, seed)
        end = max(window) + 1
        for root in self.roots(tree):
            self.finish(tree, trajectory(tree, root, end, window, window), end)

    def published_passes(self, num_steps: int) -> int:
        return num_steps * self.group_size
