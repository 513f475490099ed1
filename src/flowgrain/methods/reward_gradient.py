"""Base classes of methods that use the gradient of the reward."""

from abc import abstractmethod

from torch import Tensor

from flowgrain.core import credit
from flowgrain.core.credit import Normalization, RewardMix
from flowgrain.core.tree import Tree
from flowgrain.methods.base import Method
from flowgrain.settings import Setting

OF_ADVANTAGES = ("reward_mix", "std_scope", "std_unbiased", "std_epsilon", "advantage_clip")
"""Options of advantages."""


class DifferentiableReward(Method):
    """A method whose rewards must be differentiable. Their gradient goes through the decoder."""

    not_compared = "it trains on the gradient of the reward and does not compare images"

    decode_batch_size: int = Setting(
        1,
        "Images that are decoded and scored together with gradient. The memory of the decoder "
        "grows with it.",
        unit="images",
        ge=1,
        le=10_000,
    )


class RewardGradient(DifferentiableReward):
    """A method that trains on the gradient of the reward, through the last steps of the sampler.

    Images are sampled by the ODE without gradient. The last steps of every image are repeated with
    gradient, from a state that the plan keeps. The rewards must be differentiable. Images of a
    prompt are not compared with each other.
    """

    group_size: int = Setting(1, "Images per prompt (G).", unit="images", ge=1, le=10_000)
    reward_mix: RewardMix = "reward"  # own choice: the weighted sum of the rewards

    @property
    @abstractmethod
    def gradient_steps(self) -> int:
        """Number of last steps of an image that have a gradient. The plan keeps their start."""

    @property
    def noise_samples(self) -> int:
        """Noised copies of an image that are trained in place of its sampled trajectory. 0: none.

        A copy starts at the noise level before the last step. See DRaFT-LV.
        """
        return 0

    @property
    def passes_per_image(self) -> int:
        """Forward passes with gradient of an image."""
        return self.gradient_steps * max(self.noise_samples, 1)

    @abstractmethod
    def loss(self, reward: Tensor) -> Tensor:
        """Loss [B] of the weighted sum of the rewards [B] of images."""

    def credit(self, tree: Tree, rewards: Tensor, how: Normalization) -> Tensor:
        """One advantage per image, for reports. The loss does not use it."""
        return credit.per_image(tree, rewards, how)

    def check(self, num_steps: int) -> None:
        """See `Method.check`."""
        if self.updates_per_rollout == "per_step":
            raise ValueError(
                f"updates_per_rollout=per_step: method {self.name!r} has no stochastic steps. "
                "Use a number."
            )
        if int(self.updates_per_rollout) > self.group_size:
            raise ValueError(
                f"updates_per_rollout={self.updates_per_rollout}: the images of a prompt are "
                f"divided among the updates. Use at most method.group_size={self.group_size}."
            )
        self.check_unused(("tail_order", *OF_ADVANTAGES))
