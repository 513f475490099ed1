"""Diffusion-DPO on flow-matching models (arXiv 2311.12908)."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from flowgrain.core.regression import Quantities, dpo_loss
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.forward_process import Draws, Levels
from flowgrain.settings import Setting

RUN: dict[str, dict[str, Any]] = {
    "sampling": {"num_steps": 40},
    "lora": {"rank": 32},  # alpha 64: twice the rank
}


@register
class DiffusionDPO(Draws):
    """Diffusion-DPO: the best image of a prompt is preferred to its worst image.

    The reference samples the images. It is the slowly moving policy: it stays unchanged, except
    that it is replaced by the trained policy after every `reference_every` updates.
    """

    name = "diffusion_dpo"
    title = "Diffusion-DPO"
    paper = "2311.12908"
    trains_on = "pairs"
    unused_on_data = ("group_size", "reward_mix", "tail_order", "reference_every")
    summary = (
        "Only the best and the worst image of a prompt are trained. No step of the sampler is "
        "trained."
    )
    config_defaults = RUN  # published code
    learning_rates = LearningRates(lora=3e-4)  # published code

    group_size: int = 24  # published code
    std_unbiased: bool = False  # own choice: the loss depends on the order of the rewards only
    advantage_clip: float = 1e6  # own choice: a clip could make the best images equal
    tail_order: Literal[1, 2] = 1  # published code
    draws: int = 39  # published code
    levels: Levels = "logit_normal"  # published code
    shared_draws: bool = True  # published code
    beta: float = Setting(100.0, "Scale of the preference.", gt=0, le=1e6)  # published code
    reference_every: int | None = Setting(
        40,
        "Optimizer updates after which the trained policy becomes the reference, which also "
        "samples. Null, and with data.pairs: the reference stays the model before training.",
        unit="updates",
        ge=1,
        le=10_000_000,
    )  # published code

    @property
    def needs_old(self) -> bool:
        return True

    @property
    def trains_guided(self) -> bool:
        return False  # published code

    @property
    def reduces(self) -> bool:
        return True

    def decay(self, updates: int) -> float:
        replaced = self.reference_every is not None and updates % self.reference_every == 0
        return 0.0 if replaced else 1.0

    def selected(self, advantage: Tensor, group: Tensor) -> Tensor:
        """Two images of every group: the best, and the worst of the others."""
        chosen = torch.zeros_like(advantage, dtype=torch.bool)
        for number in torch.unique(group):
            places = (group == number).nonzero().squeeze(1)
            ranked = places[advantage[places].argsort(stable=True)]
            chosen[ranked[[0, -1]]] = True
        return chosen

    def group_loss(self, q: Quantities) -> Tensor:
        return dpo_loss(replace(q, reference=q.old), self.beta)

    def check(self, num_steps: int) -> None:
        if self.updates_per_rollout != 1:
            raise ValueError(
                f"updates_per_rollout={self.updates_per_rollout}: method {self.name!r} trains one "
                "pair per prompt, which cannot be divided. Use 1."
            )
        if not self.shared_draws:
            raise ValueError(
                f"shared_draws={self.shared_draws}: the loss compares the images of a pair under "
                "the same noise level and noise. Use true."
            )
        self.check_unused(("std_epsilon", "advantage_clip"))  # the loss uses an order
        super().check(num_steps)
