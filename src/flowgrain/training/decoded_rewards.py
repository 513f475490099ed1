"""Rewards of latents and their gradients, through the decoder.

Decoder and rewards are evaluated for a few images at a time. The gradient with respect to the
latents is computed at once, and the graph is freed.

Shapes: B images, *L latent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.core import credit
from flowgrain.data import Prompt
from flowgrain.methods import DifferentiableReward
from flowgrain.registry import describe
from flowgrain.rewards import score, total_gradient
from flowgrain.rewards.scoring import BATCH_SIZE
from flowgrain.training.errors import RunStopped
from flowgrain.training.policy import Policy
from flowgrain.training.rollout_batch import RolloutBatch


class DecodedRewards:
    """The weighted sum of the rewards of decoded latents.

    Args:
        config: batch sizes of sampling and of the rewards.
        method: batch size of the decoder with gradient.
        policy: decodes.
        batch: its rewards and their weights.
    """

    def __init__(
        self, config: Config, method: DifferentiableReward, policy: Policy, batch: RolloutBatch
    ) -> None:
        self.method, self.policy = method, policy
        self.rewards, self.weights = batch.rewards, batch.reward_weights
        self.batch_sizes = config.reward_batch_sizes
        self.decoded_together = config.sampling.batch_size

    def gradient(self, x0: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """The rewards [B] of latents [B, *L] and their gradient [B, *L].

        Raises:
            RunStopped: a reward or the decoder has no gradient, or raises an error.
        """
        rewards, slopes = [], []
        size = self.method.decode_batch_size
        for first in range(0, len(x0), size):
            latents = x0[first : first + size].detach().requires_grad_()
            with torch.enable_grad():
                images = self.policy.backbone.decode(latents)
            if not images.requires_grad:
                raise RunStopped(
                    f"method {self.method.name!r} needs the gradient of the decoder, but the "
                    "images that this backbone decodes have none"
                )
            try:
                reward, slope = total_gradient(
                    self.rewards,
                    self.weights,
                    images.detach(),
                    prompts[first : first + size],
                    self.batch_sizes,
                )
            except Exception as error:  # user code may raise anything
                raise RunStopped(f"no gradient of the rewards: {describe(error)}") from error
            rewards.append(reward)
            slopes.append(torch.autograd.grad(images, latents, slope.to(images))[0].float())
        return torch.cat(rewards), torch.cat(slopes)

    @torch.no_grad()
    def values(self, x0: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The rewards [B] of latents [B, *L], without gradient. NaN where scoring failed."""
        totals = []
        for first in range(0, len(x0), self.decoded_together):
            part = slice(first, first + self.decoded_together)
            images, of_part = self.policy.backbone.decode(x0[part]), prompts[part]
            values = {
                name: score(reward, images, of_part, self.batch_sizes.get(name, BATCH_SIZE)).values
                for name, reward in self.rewards.items()
            }
            totals.append(credit.weighted_sum(values, self.weights).to(x0.device))
        return torch.cat(totals)
