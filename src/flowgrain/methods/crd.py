"""CRD, centered reward distillation (arXiv 2603.14128)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowgrain.core.credit import RewardMix, Scope
from flowgrain.core.regression import (
    Matching,
    Noised,
    Quantities,
    crd_loss,
    normalized,
    squared_error,
)
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.flow_grpo import FLOW_GRPO_RUN
from flowgrain.methods.forward_process import Draws, Levels, NoiseLevels, Range, SlowAnchor
from flowgrain.settings import Setting


@register
class CRD(SlowAnchor, Draws):
    """CRD: the implicit rewards of a group, centered, are matched to its centered rewards.

    The implicit reward of an image is the error of the slowly moving policy minus the error of the
    trained policy. The trained policy samples.
    """

    name = "crd"
    title = "CRD"
    paper = "2603.14128"
    config_defaults = FLOW_GRPO_RUN  # Flow-Factory
    learning_rates = LearningRates(lora=3e-4)  # Flow-Factory

    group_size: int = 24  # Flow-Factory
    updates_per_rollout: int | Literal["per_step"] = 2  # Flow-Factory
    kl_weight: float = 0.1  # Flow-Factory
    std_scope: Scope = "global"  # Flow-Factory
    std_unbiased: bool = False  # own choice
    std_epsilon: float = 1e-4  # own choice
    reward_mix: RewardMix = "reward"  # own choice
    draws: int = 9  # own choice: every level of the grid but the last
    levels: Levels = "binned_grid"  # Flow-Factory
    level_range: Range = (0.0, 0.99)  # Flow-Factory
    decay_rate: float = 0.005  # Flow-Factory: min(0.25 + 0.005 n, 0.999)
    decay_start: int = -50  # Flow-Factory
    max_decay: float = 0.999  # Flow-Factory
    beta: float = Setting(1.0, "Scale of the implicit reward.", gt=0, le=1e6)  # Flow-Factory
    temperature: float | None = Setting(
        None,
        "Temperature of the softmax weights of the centers, in two directions. Null: plain means.",
        gt=0,
        le=1000,
    )  # Flow-Factory
    matching: Matching = Setting(
        "mse", "Squared difference of the centered rewards, or a cross entropy."
    )  # Flow-Factory
    normalized_error: bool = Setting(
        True, "Divide the squared error of the velocity by its mean absolute error."
    )  # Flow-Factory
    adaptive_kl: bool = Setting(
        True, "Images with a low reward have a smaller KL weight, down to 1e-4."
    )  # Flow-Factory

    def draw_levels(
        self, random: np.random.Generator, count: int, sigmas: NDArray[np.float32]
    ) -> NoiseLevels:
        """The images of a group have the same noise levels, as a mean compares them at one level.

        Without `shared_draws`, their noises are different.
        """
        images = 1 if self.shares_draws else self.group_size
        drawn = super().draw_levels(random, count // images, sigmas)
        return NoiseLevels(drawn.sigma.repeat(images, axis=0), drawn.number.repeat(images, axis=0))

    @property
    def compares_slow(self) -> bool:
        return True

    @property
    def reduces(self) -> bool:
        return True

    def quantity(self, x: Noised) -> Tensor:
        if self.normalized_error:
            return normalized(x.v - x.target)
        return squared_error(x.v, x.target)

    def group_loss(self, q: Quantities) -> Tensor:
        reward = self._reward(q.advantage)
        loss = crd_loss(q, reward, self.beta, self.temperature, self.matching)
        return self.advantage_clip / self.beta * loss

    def regularizer(self, x: Noised) -> Tensor | None:
        kl = super().regularizer(x)
        if kl is None or not self.adaptive_kl:
            return kl
        least = 1e-4 / self.kl_weight
        return (least + self._reward(x.advantage) * (1 - least)) * kl

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        if not self.kl_weight:
            self.check_unused(("adaptive_kl",), "method.kl_weight=0")

    def _reward(self, advantage: Tensor) -> Tensor:
        """Rewards in 0..1."""
        return (advantage / self.advantage_clip / 2 + 0.5).clamp(0, 1)
