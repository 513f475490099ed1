"""Rewards of latents and their gradients, through the decoder.

Decoder and rewards are evaluated for a few images at a time. The gradient with respect to the
latents is computed at once, and the graph is freed.

Shapes: B images, *L latent.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.core import credit
from flowgrain.core.sde import per_row
from flowgrain.data import Prompt
from flowgrain.distributed import World
from flowgrain.methods import DifferentiableReward
from flowgrain.registry import describe
from flowgrain.rewards import NoGradient, Scores, score, total_gradient
from flowgrain.rewards.scoring import BATCH_SIZE
from flowgrain.training.errors import RunStopped, stop_all
from flowgrain.training.policy import Policy
from flowgrain.training.rollout_batch import RolloutBatch


class Gradients(NamedTuple):
    """Rewards of latents and their gradients.

    Attributes:
        reward: [B]. NaN marks an image without a finite reward and gradient.
        slope: [B, *L]. 0 for such an image.
        reason: the last exception of a reward, if there was one.
    """

    reward: Tensor
    slope: Tensor
    reason: str | None = None


def check_failed_gradients(
    world: World,
    failure: str | None,
    failed: tuple[int, str | None],
    count: int,
    allowed: float,
) -> int:
    """Check the gradients of the rewards of all ranks. All ranks must call it together.

    Args:
        world: ranks.
        failure: a failure of this rank that always stops the run, or None.
        failed: number of images of this rank that have a score but no gradient, and why.
        count: images of all ranks.
        allowed: share of the images that may fail.

    Returns:
        The number of failed images of all ranks.

    Raises:
        RunStopped: on all ranks.
    """
    stop_all(world, failure)
    ranks = world.gather_data(failed)
    total = sum(number for number, _ in ranks)
    if total > allowed * count:
        reason = next((text for _, text in ranks if text), "they are not finite")
        raise RunStopped(
            f"no gradient of the rewards for {total} of {count} images ({reason}), more than "
            f"training.max_failed_rewards={allowed:g} allows"
        )
    return total


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
        sampling = config.sampling
        self.decoded_together = sampling.decode_batch_size or sampling.batch_size

    def gradient(self, x0: Tensor, prompts: Sequence[Prompt]) -> Gradients:
        """The rewards of latents [B, *L] and their gradients. A call that raises scores no image.

        Raises:
            RunStopped: a reward or the decoder never has a gradient.
        """
        size = self.method.decode_batch_size
        parts = [
            self.gradient_of_batch(x0[first : first + size], prompts[first : first + size])
            for first in range(0, len(x0), size)
        ]
        reasons = [part.reason for part in parts if part.reason is not None]
        return _finite(
            torch.cat([part.reward for part in parts]),
            torch.cat([part.slope for part in parts]),
            reasons[-1] if reasons else None,
        )

    def gradient_of_batch(self, x0: Tensor, prompts: Sequence[Prompt]) -> Gradients:
        """Like `gradient`, of latents that are decoded together."""
        latents = x0.detach().requires_grad_()
        with torch.enable_grad():
            images = self.policy.backbone.decode(latents)
        if not images.requires_grad:
            raise RunStopped(
                f"method {self.method.name!r} needs the gradient of the decoder, but the images "
                "that this backbone decodes have none"
            )
        try:
            reward, slope = total_gradient(
                self.rewards, self.weights, images.detach(), prompts, self.batch_sizes
            )
        except NoGradient as error:
            raise RunStopped(f"no gradient of the rewards: {describe(error)}") from error
        except Exception as error:  # user code may raise anything
            missing = torch.full((len(latents),), torch.nan, device=x0.device)
            return Gradients(
                missing, torch.zeros_like(latents, dtype=torch.float32), describe(error)
            )
        slope = torch.autograd.grad(images, latents, slope.to(images))[0].float()
        return Gradients(reward, slope, None)

    @torch.no_grad()
    def values(
        self, x0: Tensor, prompts: Sequence[Prompt]
    ) -> tuple[Tensor, list[dict[str, Scores]]]:
        """The rewards [B] of latents [B, *L] without gradient, and the scores of every call.

        NaN where scoring failed.
        """
        totals, parts = [], []
        for first in range(0, len(x0), self.decoded_together):
            part = slice(first, first + self.decoded_together)
            images, of_part = self.policy.backbone.decode(x0[part]), prompts[part]
            scores = {
                name: score(reward, images, of_part, self.batch_sizes.get(name, BATCH_SIZE))
                for name, reward in self.rewards.items()
            }
            values = {name: of_reward.values for name, of_reward in scores.items()}
            totals.append(self.total(values).to(x0.device))
            parts.append(scores)
        return torch.cat(totals), parts

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum [B] of the values [B] of the rewards by name."""
        return credit.weighted_sum(values, self.weights)


def _finite(reward: Tensor, slope: Tensor, reason: str | None) -> Gradients:
    """Gradients without images whose reward or gradient is not finite."""
    finite = reward.isfinite() & slope.isfinite().flatten(1).all(1)
    slope = torch.where(per_row(finite, slope), slope, 0)
    return Gradients(torch.where(finite, reward, torch.nan), slope, reason)
