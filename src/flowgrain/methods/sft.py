"""Fine-tuning on given images, or on the best samples of every prompt (arXiv 2304.06767)."""

from typing import Any

from torch import Tensor

from flowgrain.core import credit
from flowgrain.core.credit import Normalization, RewardMix
from flowgrain.core.regression import Noised, squared_error
from flowgrain.core.tree import Tree
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.forward_process import Draws, Levels
from flowgrain.methods.reward_gradient import OF_ADVANTAGES
from flowgrain.settings import Setting

RUN: dict[str, dict[str, Any]] = {
    "sampling": {"num_steps": 40},
    "lora": {"rank": 32},  # alpha 64: twice the rank
}


@register
class SFT(Draws):
    """Supervised fine-tuning: the plain flow-matching loss ||v - u||^2.

    It trains on the images of a data set. Without a data set it samples images, and trains on the
    images with the highest reward of their prompt.
    """

    name = "sft"
    title = "SFT"
    paper = "2304.06767"
    trains_on = "images"
    unused_on_data = ("group_size", "reward_mix", "tail_order")
    summary = "Only the best images of a prompt are trained. No step of the sampler is trained."
    config_defaults = RUN  # published code
    learning_rates = LearningRates(lora=3e-4)  # published code
    not_compared = "it trains on the best image of every prompt only"

    # The published code is the rejection fine-tuning of Flow-GRPO.
    group_size: int = Setting(
        24, "Samples per prompt. Not used with data.images.", unit="samples", ge=1, le=10_000
    )  # published code
    reward_mix: RewardMix = "reward"  # own choice
    advantage_clip: float = 1e6  # own choice: weights are not clipped
    draws: int = 1  # published code
    levels: Levels = "logit_normal"  # published code

    @property
    def trains_guided(self) -> bool:
        return False  # published code

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        """Weight 1 of all images with the highest reward of their prompt, 0 of the others."""
        return credit.best_of_prompt(tree, rewards)

    def loss(self, x: Noised) -> Tensor:
        return x.advantage * squared_error(x.v, x.target)

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        self.check_unused([name for name in OF_ADVANTAGES if name != "reward_mix"])
