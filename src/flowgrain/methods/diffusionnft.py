"""DiffusionNFT (arXiv 2509.16117)."""

from typing import Literal

from torch import Tensor

from flowgrain.core.credit import RewardMix, Scope
from flowgrain.core.regression import Noised, nft_loss
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.flow_grpo import FLOW_GRPO_RUN
from flowgrain.methods.forward_process import FractionOfGrid, SlowPolicy
from flowgrain.settings import Setting


@register
class DiffusionNFT(SlowPolicy, FractionOfGrid):
    """DiffusionNFT: images by the ODE, and a loss on noised images.

    The loss evaluates two velocities on either side of the old policy's velocity.
    """

    name = "diffusionnft"
    title = "DiffusionNFT"
    paper = "2509.16117"
    config_defaults = FLOW_GRPO_RUN  # published code
    learning_rates = LearningRates(lora=3e-4)  # published code
    # timestep_fraction 0.99, decay type 1 (max_decay 0.5, decay_rate 0.001, decay_start 0; type 2
    # of the OCR run starts at 75): published code

    group_size: int = 24  # section 5
    kl_weight: float = 1e-4  # published code
    std_scope: Scope = "global"  # published code
    std_unbiased: bool = False  # published code
    std_epsilon: float = 1e-4  # published code
    reward_mix: RewardMix = "reward"  # published code
    tail_order: Literal[1, 2] = 2  # published code
    beta: float = Setting(
        1.0, "Scale of the difference between v+ or v- and the old velocity.", gt=0, le=1000
    )  # published code

    def loss(self, x: Noised) -> Tensor:
        return nft_loss(x, self.beta, self.advantage_clip)
