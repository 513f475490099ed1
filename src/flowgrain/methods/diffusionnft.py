"""DiffusionNFT (arXiv 2509.16117)."""

from typing import Literal

from torch import Tensor

from flowgrain.core.credit import RewardMix, Scope
from flowgrain.core.objective import nft_loss
from flowgrain.core.tree import Planner
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.flow_grpo import FLOW_GRPO_RUN
from flowgrain.methods.forward_process import ForwardProcess
from flowgrain.methods.options import CompressedTail
from flowgrain.methods.plans import initial_noise
from flowgrain.settings import Setting


@register
class DiffusionNFT(ForwardProcess, CompressedTail):
    """DiffusionNFT: images by the ODE, and a loss on noised images.

    The loss evaluates two velocities on either side of the old policy's velocity.
    """

    name = "diffusionnft"
    title = "DiffusionNFT"
    paper = "2509.16117"
    summary = (
        "The images of a group are compared with each other. No step of the sampler is trained."
    )
    config_defaults = FLOW_GRPO_RUN  # published code
    learning_rates = LearningRates(lora=3e-4)  # published code

    group_size: int = 24  # section 5
    kl_weight: float = 1e-4  # published code
    std_scope: Scope = "global"  # published code
    std_unbiased: bool = False  # published code
    std_epsilon: float = 1e-4  # published code
    reward_mix: RewardMix = "reward"  # published code
    tail_order: Literal[1, 2] = 2  # published code
    timestep_fraction: float = Setting(
        0.99, "Share of the grid's noise levels to train on, drawn for every image.", gt=0, le=1
    )  # published code
    beta: float = Setting(
        1.0, "Scale of the difference between v+ or v- and the old velocity.", gt=0, le=1000
    )  # published code
    max_decay: float = Setting(
        0.5, "Largest share of its parameters that the old policy keeps per rollout.", ge=0, lt=1
    )  # published code, decay type 1
    decay_rate: float = Setting(
        0.001, "Growth of the kept share per optimizer update, up to max_decay.", ge=0, le=1
    )  # published code, decay type 1
    decay_start: int = Setting(
        0,
        "Optimizer updates after which the kept share starts to grow. Before, it is 0.",
        unit="updates",
        ge=0,
        le=10_000_000,
    )  # published code, decay type 1; type 2 (OCR): 75

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        for root in initial_noise(tree, self.group_size, shared=False):
            self.finish(tree, root, 0)

    def loss(
        self, v: Tensor, v_old: Tensor, target: Tensor, sigma: Tensor, advantage: Tensor
    ) -> Tensor:
        return nft_loss(v, v_old, target, sigma, advantage, self.beta, self.advantage_clip)

    def num_levels(self, num_steps: int) -> int:
        return max(1, int(num_steps * self.timestep_fraction))

    def decay(self, updates: int) -> float:
        return min(self.decay_rate * max(updates - self.decay_start, 0), self.max_decay)

    def published_passes(self, num_steps: int) -> int:
        return num_steps * self.group_size
