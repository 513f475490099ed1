"""TP-GRPO (arXiv 2602.06422)."""

from typing import Literal

from torch import Tensor

from flowgrain.core.credit import Normalization, Scope
from flowgrain.core.objective import KLForm
from flowgrain.core.tree import Tree
from flowgrain.core.turning_points import TurningPoints, turning_point
from flowgrain.methods.base import register
from flowgrain.methods.completions import CompletedTrajectories
from flowgrain.methods.policy_gradient import SdeType
from flowgrain.settings import Setting


@register
class TPGRPO(CompletedTrajectories):
    """TP-GRPO: reward gains of the steps, and the rewards that follow turning points.

    A turning point is a step after which the reward of a trajectory changes its direction. Its
    reward is the gain from the state before it to the trajectory's image.
    """

    name = "tp_grpo"
    title = "TP-GRPO"
    paper = "2602.06422"
    summary = (
        "Every state of a trajectory is completed by the ODE. The reward of a step is its gain, or "
        "at a turning point the gain until the image. The image is the completion after the step."
    )

    sde_type: SdeType = "cps"  # published code
    cps_log_prob: Literal["gaussian", "squared_error"] = "squared_error"  # published code
    clip_range: float = 1e-5  # published code, for this log-probability
    kl_weight: float = 1e-4  # published code
    kl_form: KLForm = "gaussian"  # published code: CPS has only this form
    std_scope: Scope = "group"  # published code
    turning_points: TurningPoints = Setting(
        "consistent",
        "Steps that are turning points: with the direction of the whole trajectory after a step in "
        "the other direction (consistent), or after every change of direction (all).",
    )  # published code
    balanced: bool = Setting(
        True,
        "Keep as many turning points of trajectories that gained reward as of trajectories that "
        "lost reward.",
    )  # published code

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        return turning_point(tree, rewards, how, self.turning_points, self.balanced)
