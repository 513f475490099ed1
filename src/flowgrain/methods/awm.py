"""AWM, advantage weighted matching (arXiv 2509.25050)."""

from typing import Any, Literal

from torch import Tensor

from flowgrain.core.credit import RewardMix, Scope
from flowgrain.core.objective import surrogate
from flowgrain.core.regression import (
    AwmWeighting,
    Noised,
    Quantities,
    awm_weighted,
    clipped_ratio_loss,
    squared_error,
)
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.forward_process import OF_DECAY, Draws, Levels, Range, SlowAnchor
from flowgrain.settings import Setting

KlWeighting = Literal["uniform", "elbo"]

RUN: dict[str, dict[str, Any]] = {
    "sampling": {"num_steps": 14},
    "lora": {"rank": 32},  # alpha 64: twice the rank
}


@register
class AWM(SlowAnchor, Draws):
    """AWM: PPO with a ratio of weighted matching errors in place of transition probabilities.

    The matching error of a noised image bounds its negative log-likelihood. A slowly moving copy of
    the policy is a second anchor beside the reference. The trained policy samples.
    """

    name = "awm"
    title = "AWM"
    paper = "2509.25050"
    config_defaults = RUN  # published code
    learning_rates = LearningRates(lora=3e-4)  # published code

    group_size: int = 24  # published code
    kl_weight: float = 0.003  # published code, for GenEval and OCR
    std_scope: Scope = "global"  # published code
    std_unbiased: bool = False  # published code
    std_epsilon: float = 1e-4  # published code
    reward_mix: RewardMix = "reward"  # published code
    draws: int = 6  # published code
    levels: Levels = "binned_grid"  # published code: 6 bins of the levels 1 to 11 of 14
    level_range: Range = (0.072, 0.9)  # published code: the first level is not used
    max_decay: float = 0.3  # published code
    weighting: AwmWeighting = Setting(
        "generalized_huber", "Weight of the matching error l of a draw at noise level t."
    )  # published code
    power: float = Setting(0.25, "Exponent of generalized_huber.", gt=0, le=2)  # published code
    ratio: Literal["draw", "image"] = Setting(
        "draw", "A ratio for every draw, or one for the mean error of an image."
    )  # published code
    clip_range: float = Setting(1.0, "PPO clip range of the ratio.", gt=0, le=1000)
    advantage_scale: float = Setting(
        1.0, "Largest advantage after scaling. Advantages are clipped first.", gt=0, le=1e6
    )  # published code
    ema_weight: float = Setting(
        1.0, "Weight of the distance to the slowly moving policy. 0: none.", ge=0, le=1000
    )  # published code
    kl_weighting: KlWeighting = Setting(
        "uniform", "Weight of the distances: 1, or 1 / (2 std^2) of Flow-SDE(0.7) (elbo)."
    )  # published code

    @property
    def needs_old(self) -> bool:
        return self.ema_weight > 0

    @property
    def needs_quantity(self) -> bool:
        return True

    @property
    def regularizes_old(self) -> bool:
        return self.ema_weight > 0

    @property
    def reduces(self) -> bool:
        # Before the first update every ratio is 1, and the mean over draws can be taken later.
        return self.ratio == "image" and self.updates_per_rollout != 1

    def quantity(self, x: Noised) -> Tensor:
        error = squared_error(x.v, x.target)
        return awm_weighted(error, x.sigma, self.weighting, self.power)

    def loss(self, x: Noised) -> Tensor:
        advantage = self._scaled(x.advantage)
        return clipped_ratio_loss(self.quantity(x), x.old_quantity, advantage, self.clip_range)

    def group_loss(self, q: Quantities) -> Tensor:
        ratio = (q.old - q.trained).mean(1).exp()
        loss = surrogate(ratio, self._scaled(q.advantage), self.clip_range)[0]
        return loss[:, None].expand_as(q.trained)

    def regularizer(self, x: Noised) -> Tensor | None:
        anchors = ((self.kl_weight, x.reference), (self.ema_weight, x.old))
        terms = [
            weight * squared_error(x.v, anchor)
            for weight, anchor in anchors
            if weight and anchor is not None
        ]
        if not terms:
            return None
        total = sum(terms[1:], terms[0])
        if self.kl_weighting == "uniform":
            return total
        # Both clamps bound the weight. It is infinite at t = 0.
        std = 0.7 * (x.sigma.clamp(min=0.01) / (1 - x.sigma.clamp(max=0.99))).sqrt()
        return total / (2 * std.square())

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        if not self.ema_weight:
            self.check_unused(OF_DECAY, "method.ema_weight=0")
            if not self.kl_weight:
                self.check_unused(("kl_weighting",), "method.kl_weight=0 and method.ema_weight=0")
        if self.weighting != "generalized_huber":
            self.check_unused(("power",), f"method.weighting={self.weighting}")

    def _scaled(self, advantage: Tensor) -> Tensor:
        return advantage / self.advantage_clip * self.advantage_scale
