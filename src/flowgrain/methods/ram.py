"""RAM, reinforce adjoint matching (arXiv 2605.10759)."""

from typing import Any, Literal

from torch import Tensor

from flowgrain.core.credit import RewardMix, Scope
from flowgrain.core.regression import Noised, ram_loss
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.forward_process import OF_DECAY, Draws, Levels, SlowPolicy
from flowgrain.settings import Setting

RUN: dict[str, dict[str, Any]] = {"sampling": {"num_steps": 20}, "lora": {"rank": 32}}


@register
class RAM(SlowPolicy, Draws):
    """RAM: the target is the reference's velocity, moved by the advantage.

    The velocity moves along the residual u - v of the old policy, or of the trained policy.
    """

    name = "ram"
    title = "RAM"
    paper = "2605.10759"
    config_defaults = RUN  # reports; the rank is an own choice
    learning_rates = LearningRates(lora=3e-4)  # a port by others

    # The published code was not read. "Reports": descriptions and ports by others, which agree.
    group_size: int = 24  # reports
    std_scope: Scope = "global"  # reports
    reward_mix: RewardMix = "reward"  # own choice
    advantage_clip: float = 1e6  # reports: not clipped
    draws: int = 8  # reports
    levels: Levels = "toward_noise"  # reports
    max_decay: float = 0.9  # reports: min(0.01 n, 0.9) after n rollouts
    decay_rate: float = 0.01  # reports
    eta: float = Setting(
        100.0, "Distance by which an advantage of 1 moves the target.", gt=0, le=1e6
    )  # reports, for GenEval and OCR
    residual: Literal["old", "trained"] = Setting(
        "old", "Policy of the residual u - v. With old, the slowly moving policy also samples."
    )  # reports; eq. 17 has the trained policy

    @property
    def needs_old(self) -> bool:
        return self.residual == "old"

    @property
    def needs_reference(self) -> bool:
        return True

    def loss(self, x: Noised) -> Tensor:
        return ram_loss(x, self.eta)

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        if not self.needs_old:
            self.check_unused(OF_DECAY, f"method.residual={self.residual}")
