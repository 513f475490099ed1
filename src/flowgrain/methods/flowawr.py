"""FlowAWR, advantage weighted regression of flow models (arXiv 2606.30376)."""

from typing import Literal

import torch
from torch import Tensor

from flowgrain.core import credit
from flowgrain.core.credit import Normalization, RewardMix, Scope
from flowgrain.core.regression import Noised, flow_awr_energy, flow_awr_loss
from flowgrain.core.tree import Tree
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.flow_grpo import FLOW_GRPO_RUN
from flowgrain.methods.forward_process import FractionOfGrid, SlowPolicy
from flowgrain.settings import Setting


@register
class FlowAWR(SlowPolicy, FractionOfGrid):
    """FlowAWR: regression toward images that are moved by the softmax of the advantages.

    The advantage of an image is its energy e: the softmax of the normalized rewards of the group,
    minus its mean. The target lies at x0_old + e (x0 - x0_old).
    """

    name = "flowawr"
    title = "FlowAWR"
    paper = "2606.30376"
    config_defaults = FLOW_GRPO_RUN  # published code
    learning_rates = LearningRates(lora=3e-4)  # published code
    # timestep_fraction and decay as DiffusionNFT: published code

    group_size: int = 24  # published code
    kl_weight: float = 1e-4  # published code
    std_scope: Scope = "global"  # published code
    std_unbiased: bool = False  # published code
    std_epsilon: float = 1e-4  # published code
    reward_mix: RewardMix = "reward"  # published code
    tail_order: Literal[1, 2] = 2  # published code
    advantage_clip: float = 3.0  # published code: clip of the energy
    logit_clip: float = Setting(
        5.0,
        "Normalized rewards are clamped to this absolute value before the softmax.",
        gt=0,
        le=1e3,
    )  # published code
    gating: Literal["soft", "hard"] = Setting(
        "soft", "Scale of the energy: G (soft), or 1 / std of the group (hard, GenEval and OCR)."
    )  # published code

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        """The energy of every image. 0 without a score."""
        advantage = credit.per_image(tree, rewards, how).clamp(-self.logit_clip, self.logit_clip)
        known = rewards.isfinite().cpu()
        prompt = torch.from_numpy(tree.prompt[tree.leaves])[known]
        energy = torch.zeros_like(advantage)
        group = torch.unique(prompt, return_inverse=True)[1]
        energy[known] = flow_awr_energy(advantage[known], group, self.gating)
        return energy

    def loss(self, x: Noised) -> Tensor:
        return flow_awr_loss(x, x.advantage)
