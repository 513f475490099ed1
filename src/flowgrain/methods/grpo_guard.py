"""GRPO-Guard (arXiv 2510.22319)."""

from torch import Tensor

from flowgrain.core import objective
from flowgrain.core.credit import Scope
from flowgrain.core.objective import Objective
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.flow_grpo import FlowGRPO


@register
class GRPOGuard(FlowGRPO):
    """Flow-GRPO with a ratio that has the same mean and spread at every step."""

    name = "grpo_guard"
    title = "GRPO-Guard"
    paper = "2510.22319"
    learning_rates = LearningRates(lora=1e-4)  # published code

    clip_range: float = 2e-6  # published code, for OCR and GenEval
    kl_weight: float = 0.0  # published code
    std_scope: Scope = "group"  # published code

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        if self.cps_log_prob == "squared_error":
            raise ValueError(
                "cps_log_prob=squared_error: the normalized ratio needs the variance. "
                "Use method.cps_log_prob=gaussian."
            )

    def objective(self, sigmas: Tensor) -> Objective:
        return objective.guarded(self.clip_range, self.kl_weight, self.kl_form_of_kernel)
