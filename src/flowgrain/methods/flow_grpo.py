"""Flow-GRPO (arXiv 2505.05470)."""

from typing import Any, Literal

from flowgrain.core.credit import RewardMix, Scope
from flowgrain.core.objective import KLForm
from flowgrain.core.tree import Planner
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.options import CompressedTail, SharedNoise, StepChoice
from flowgrain.methods.plans import trajectory

# Section 5: T = 10 in training, LoRA.
FLOW_GRPO_RUN: dict[str, dict[str, Any]] = {
    "sampling": {"num_steps": 10},
    "lora": {"rank": 32},  # alpha 64: twice the rank
}


class FlowGRPODefaults(StepChoice):
    """Values of Flow-GRPO, shared by the methods that are derived from it.

    The source is section 5 of the paper, or its published code.
    """

    config_defaults = FLOW_GRPO_RUN  # section 5
    learning_rates = LearningRates(lora=3e-4)  # published code

    group_size: int = 24  # section 5
    updates_per_rollout: int | Literal["per_step"] = 2  # published code
    kl_weight: float = 0.04  # section 5, for GenEval and OCR
    kl_form: KLForm = "published"  # published code, to which the weight belongs
    std_scope: Scope = "global"  # published code
    std_unbiased: bool = False  # published code
    std_epsilon: float = 1e-4  # published code
    reward_mix: RewardMix = "reward"  # published code


@register
class FlowGRPO(FlowGRPODefaults, SharedNoise, CompressedTail):
    """Flow-GRPO: trajectories with noise at every step, and one reward for all of these steps."""

    name = "flow_grpo"
    title = "Flow-GRPO"
    paper = "2505.05470"
    summary = (
        "The trajectories of a group are compared by their final images. "
        "Every trained step of a trajectory has the same advantage."
    )

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        steps = self.steps(tree.num_steps - 1)
        end = max(steps) + 1
        for root in self.roots(tree):
            self.finish(tree, trajectory(tree, root, end, steps, steps), end)

    def published_passes(self, num_steps: int) -> int:
        return num_steps * self.group_size

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        self.check_tail(num_steps, max(self.steps(num_steps - 1)))
