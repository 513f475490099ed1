"""Stepwise-Flow-GRPO (arXiv 2603.28718)."""

from typing import Literal

from flowgrain.core.credit import ComparisonGroup
from flowgrain.methods.base import register
from flowgrain.methods.densegrpo import DenseGRPO
from flowgrain.methods.policy_gradient import SdeType


@register
class StepwiseFlowGRPO(DenseGRPO):
    """Stepwise-Flow-GRPO: DenseGRPO with one-step completions, and all gains of a prompt compared.

    The noise is not calibrated.
    """

    name = "stepwise_flow_grpo"
    title = "Stepwise-Flow-GRPO"
    paper = "2603.28718"
    summary = (
        "Every state of a trajectory is completed by one ODE step. The reward of a step is the "
        "gain between the completions before and after it. All steps of a prompt are compared."
    )

    sde_type: SdeType = "flow_sde"  # own choice: the paper's own step is not available
    completion_steps: int | Literal["all"] = 1  # own choice; paper: 5 ODE steps
    comparison: ComparisonGroup = "prompt"  # paper: gains normalized over steps and samples
