"""GRPO-Guard (arXiv 2510.22319)."""

from torch import Tensor

from flowgrain.core import objective
from flowgrain.core.objective import Objective
from flowgrain.methods.base import register
from flowgrain.methods.flow_grpo import FlowGRPO


@register
class GRPOGuard(FlowGRPO):
    """Flow-GRPO with a ratio that has the same mean and spread at every step."""

    name = "grpo_guard"
    title = "GRPO-Guard"
    paper = "2510.22319"

    def objective(self, sigmas: Tensor) -> Objective:
        return objective.guarded(self.clip_range, self.kl_weight, self.kl_form)
