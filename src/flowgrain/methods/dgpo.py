"""DGPO, direct group preference optimization (arXiv 2510.08425)."""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from flowgrain.core.credit import RewardMix
from flowgrain.core.regression import (
    Noised,
    Quantities,
    dgpo_loss,
    left_trust_region,
    squared_error,
)
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.forward_process import Draws, Range, SlowAnchor
from flowgrain.settings import Setting

RUN: dict[str, dict[str, Any]] = {
    "sampling": {"num_steps": 10},
    "lora": {"rank": 64},  # alpha 128: twice the rank
}


@register
class DGPO(SlowAnchor, Draws):
    """DGPO: preference optimization of whole groups, with draws that the group shares.

    The trained policy samples. The slowly moving policy is the old policy of the clip.
    """

    name = "dgpo"
    title = "DGPO"
    paper = "2510.08425"
    config_defaults = RUN  # published code
    learning_rates = LearningRates(lora=3e-4)  # published code

    group_size: int = 24  # published code, in a comment; its configurations for 4 GPUs use 16
    kl_weight: float = 0.02  # published code
    std_unbiased: bool = False  # published code
    std_epsilon: float = 1e-4  # published code
    reward_mix: RewardMix = "reward"  # published code
    tail_order: Literal[1, 2] = 2  # published code
    draws: int = 4  # published code
    level_range: Range = (0.0, 0.5)  # published code: levels 0 to 4 of 10 for GenEval
    shared_draws: bool = True  # published code
    max_decay: float = 0.3  # published code
    beta: float = Setting(
        100.0, "Scale of the preference of a group.", gt=0, le=1e6
    )  # published code
    clip_range: float | None = Setting(
        0.01,
        "An image is not trained once its likelihood ratio has left 1 +- this value in the "
        "direction of its advantage. Null: no clip.",
        gt=0,
        le=1000,
    )  # published code, with guidance
    clip_kl: bool = Setting(False, "Clip the KL of such an image too.")  # published code
    anchor: Literal["reference", "slow"] = Setting(
        "reference", "Policy that the preference compares with: the reference or the slow policy."
    )  # published code

    @property
    def compares_slow(self) -> bool:
        return True

    @property
    def reduces(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0 or self.anchor == "reference"

    @property
    def reduces_reference(self) -> bool:
        return self.anchor == "reference"

    def group_loss(self, q: Quantities) -> Tensor:
        if self.anchor == "slow":
            q = replace(q, reference=q.old)
        return dgpo_loss(q, self.beta, self.clip_range)

    def regularizer(self, x: Noised) -> Tensor | None:
        kl = super().regularizer(x)
        if kl is None or not self.clip_kl or self.clip_range is None:
            return kl
        assert x.old_quantity is not None
        error = squared_error(x.v.detach(), x.target)
        left = left_trust_region(error, x.old_quantity, x.advantage, self.clip_range)
        return kl.where(~left, kl.detach())

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        if self.clip_range is None:
            self.check_unused(("clip_kl",), "method.clip_range=null")
        if not self.kl_weight:
            self.check_unused(("clip_kl",), "method.kl_weight=0")
