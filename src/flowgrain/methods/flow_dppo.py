"""Flow-DPPO (arXiv 2606.11025)."""

from torch import Tensor

from flowgrain.core import objective
from flowgrain.core.objective import Objective
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.flow_grpo import FlowGRPO
from flowgrain.methods.options import without_clip_range
from flowgrain.settings import Setting


@register
class FlowDPPO(FlowGRPO):
    """Flow-GRPO with a limit on the divergence of a step in place of the clip of its ratio."""

    name = "flow_dppo"
    title = "Flow-DPPO"
    paper = "2606.11025"
    summary = (
        "The trajectories of a group are compared by their final images. A step is dropped from "
        "the loss when it has left the trust region in the direction of its advantage."
    )
    learning_rates = LearningRates(lora=3e-4)  # published code

    group_size: int = 16  # published code
    kl_weight: float = 0.0  # published code
    trust_region: float = Setting(
        1e-5,
        "Divergence of a step from the old policy, ||mean - mean_old||^2 / (2 std^2), from which "
        "on it is dropped if its ratio has moved in the direction of the advantage.",
        gt=0,
        le=1000,
    )  # published code, eq. 18; paper: 1e-7

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        without_clip_range(self, "method.trust_region")

    def objective(self, sigmas: Tensor) -> Objective:
        return objective.divergence_masked(
            self.trust_region, self.kl_weight, self.kl_form_of_kernel
        )
