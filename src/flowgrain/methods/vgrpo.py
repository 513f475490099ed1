"""V-GRPO (arXiv 2604.23380)."""

from typing import Any, Literal

from torch import Tensor

from flowgrain.core.regression import Noised, Quantities, likelihood_ratio, normalized, x0_error
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.forward_process import Draws, Levels
from flowgrain.settings import Setting

RUN: dict[str, dict[str, Any]] = {
    "sampling": {"num_steps": 40},
    "lora": {"rank": 32},  # alpha 64: twice the rank
}


@register
class VGRPO(Draws):
    """V-GRPO: the ratio of a variational bound, averaged over draws that a group shares."""

    name = "vgrpo"
    title = "V-GRPO"
    paper = "2604.23380"
    config_defaults = RUN  # paper
    learning_rates = LearningRates(lora=3e-4)  # paper

    group_size: int = 24  # paper
    draws: int = 4  # paper
    levels: Levels = "binned_grid"  # paper: one level in each part of the grid
    shared_draws: bool = True  # paper
    tail_order: Literal[1, 2] = 2  # paper: DPM-Solver++
    soft_clip: float = Setting(
        3.0, "Advantages become eta tanh(A / eta) with this eta.", gt=0, le=1e6
    )  # paper

    @property
    def needs_quantity(self) -> bool:
        return True

    @property
    def reduces(self) -> bool:
        # Before the first update every ratio is 1, and the mean over draws can be taken later.
        return self.updates_per_rollout != 1

    def quantity(self, x: Noised) -> Tensor:
        return normalized(x0_error(x.v, x.target, x.sigma))

    def loss(self, x: Noised) -> Tensor:
        ratio = likelihood_ratio(self.quantity(x), x.old_quantity)
        return -ratio * self._clipped(x.advantage)

    def group_loss(self, q: Quantities) -> Tensor:
        ratio = (q.old - q.trained).mean(1).exp()
        return (-ratio * self._clipped(q.advantage))[:, None].expand_as(q.trained)

    def _clipped(self, advantage: Tensor) -> Tensor:
        return self.soft_clip * (advantage / self.soft_clip).tanh()
