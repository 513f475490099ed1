"""The losses of methods that train on the gradient of the reward.

The last steps of every image are repeated with gradient. The gradient of the rewards with respect
to x0 is computed first, see `DecodedRewards`. The loss then contains the reward as a number with
this gradient.

Shapes: I images, B rows of a micro-batch, K steps with gradient, *L latent.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowgrain.config.schema import Config
from flowgrain.core.cost import split_images
from flowgrain.core.sde import ODE, Step, per_row
from flowgrain.core.tree import Ints, Tree
from flowgrain.data import latent_noise
from flowgrain.methods import RewardGradient
from flowgrain.models import Conditioning, take
from flowgrain.training.decoded_rewards import DecodedRewards, Gradients, check_failed_gradients
from flowgrain.training.errors import RunStopped
from flowgrain.training.losses import TermRecord, Terms, Update
from flowgrain.training.policy import Policy
from flowgrain.training.rollout_batch import Metrics, RolloutBatch

log = logging.getLogger(__name__)


def path_to(tree: Tree, rows: Ints, steps: int) -> list[Ints]:
    """The rows of the last `steps` steps before `rows`, and `rows`, in the order of sampling."""
    path = [rows]
    for _ in range(steps):
        path.append(tree.parent[path[-1]])
    return path[::-1]


def with_gradient(value: Tensor, x: Tensor, slope: Tensor) -> Tensor:
    """`value` [B], differentiable with respect to `x` [B, *L] with the gradient `slope` [B, *L]."""
    return value + ((x - x.detach()) * slope).flatten(1).sum(1)


class RewardGradientLoss:
    """The losses of a reward-gradient method. See `losses.RolloutLoss`.

    Losses are summed over images and divided by the global number of images.
    """

    def __init__(
        self,
        config: Config,
        method: RewardGradient,
        policy: Policy,
        batch: RolloutBatch,
        sigmas: Tensor,
    ) -> None:
        self.method, self.policy, self.batch, self.sigmas = method, policy, batch, sigmas
        self.seed, self.guidance = config.runtime.seed, config.sampling.guidance_scale
        self.decoded = DecodedRewards(config, method, policy, batch)
        self.samples = max(method.noise_samples, 1)
        self.allowed = config.training.max_failed_rewards
        # Rows of this rank that have a score but no gradient, in all updates, and why.
        self.failed = 0
        self.reason: str | None = None
        self.updates: Sequence[Update] = [
            self._update(leaves, config.micro_batch_size)
            for leaves in split_images(batch.tree, int(method.updates_per_rollout))
        ]

    def _update(self, leaves: Ints, size: int) -> Update:
        rows = leaves.repeat(self.samples)
        return Update(leaves, self.batch.micro_batches(rows, size), len(rows))

    def prepare(self) -> None:
        """Nothing to do."""

    def terms(self, number: int, place: int) -> Terms:
        """Loss [B] of a micro-batch. With a KL weight, also the distance [B] to the reference."""
        micro_batches = self.updates[number].micro_batches
        rows = micro_batches[place].rows
        taken = sum(len(before.rows) for before in micro_batches[:place])
        sample = np.arange(taken, taken + len(rows)) % self.samples
        x0, distance = self._last_steps(rows, self._start(rows, sample))
        reward, slope = self._gradients(number, place, x0.detach())
        scored = reward.isfinite()
        reward = torch.where(scored, reward, 0).requires_grad_()
        value = self.method.loss(reward)
        rate = torch.autograd.grad(value.sum(), reward)[0] * scored  # d loss / d reward, (B)
        # An image without a score has no loss.
        loss = with_gradient(
            torch.where(scored, value.detach(), 0), x0, per_row(rate, slope) * slope
        )
        terms = {"loss": loss, "clipped": (rate == 0)[scored].float()}
        if not self.method.kl_weight:
            return terms
        return terms | {"loss": loss + self.method.kl_weight * distance, "kl": distance}

    def _gradients(self, number: int, place: int, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards [B] of the images `x0` [B, *L] of a micro-batch, and their gradients [B, *L].

        Images without a gradient are masked. Before the first update they can stop the run, on all
        ranks. After it they cannot, because a checkpoint must not contain a part of a step.

        Raises:
            RunStopped: on all ranks.
        """
        update = self.updates[number]
        micro_batch, failure = update.micro_batches[place], None
        try:
            found = self.decoded.gradient(x0, self.batch.prompts_of(micro_batch.rows))
        except RunStopped as error:
            missing = torch.full((len(x0),), torch.nan, device=x0.device)
            failure, found = str(error), Gradients(missing, torch.zeros_like(x0))
        known = self.batch.known[torch.from_numpy(self._image(micro_batch.rows))]
        if micro_batch.counts:
            self.failed += int((known & found.reward.isnan().cpu()).sum())
        self.reason = found.reason or self.reason
        if number == 0:
            failed = (self.failed, self.reason)
            check_failed_gradients(self.batch.world, failure, failed, update.count, self.allowed)
        return found.reward, found.slope

    def _image(self, rows: Ints) -> Ints:
        """Numbers of the images of rows of this rank."""
        leaves = self.batch.tree.leaves
        number: Ints = np.searchsorted(leaves, self.batch.global_rows(rows))
        return number.clip(max=len(leaves) - 1)

    def _start(self, rows: Ints, sample: Ints) -> Tensor:
        """The states [B, *L] before the first step with gradient."""
        batch, tree = self.batch, self.batch.rollout.tree
        start = path_to(tree, rows, self.method.gradient_steps)[0]
        if not self.method.noise_samples:
            return batch.rollout.at(start)
        x0 = batch.rollout.at(rows).float()
        keys = zip(self._image(rows).tolist(), sample.tolist(), strict=True)
        shape = x0.shape[1:]
        noise = [latent_noise(shape, "renoise", self.seed, batch.step, *key) for key in keys]
        sigma = per_row(self.sigmas[self._index(tree.grid_index[start])], x0)
        return (1 - sigma) * x0 + sigma * torch.stack(noise).to(x0)

    def _last_steps(self, rows: Ints, x: Tensor) -> tuple[Tensor, Tensor]:
        """x0 [B, *L] of the last K steps from `x` [B, *L], and the distance [B] to the reference.

        The distance is the mean over the steps of ||v - v_ref||^2, without a KL weight 0.
        """
        tree = self.batch.rollout.tree
        cond = take(self.batch.cond, self._index(tree.prompt[rows]))
        distance = torch.zeros(len(rows), device=x.device)
        path = path_to(tree, rows, self.method.gradient_steps)
        for start, end in itertools.pairwise(path):
            before, after = self._index(tree.grid_index[start]), self._index(tree.grid_index[end])
            step = Step.on(self.sigmas, before, after)
            v = self._velocity(x, step.sigma, cond)
            if self.method.kl_weight:
                v_ref = self.policy.reference_velocity(x, step.sigma, cond, self.guidance)
                distance = distance + (v - v_ref).square().flatten(1).mean(1)
            x = ODE()(x, v, step).mean
        return x, distance / self.method.gradient_steps

    def _velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """v [B, *L]. With several steps, its activations are recomputed in the backward pass."""
        inputs = (x, sigma, cond, self.guidance)
        if self.method.gradient_steps == 1:
            return self.policy.train_velocity(*inputs)
        v: Tensor = checkpoint(
            self.policy.train_velocity, *inputs, use_reentrant=False, preserve_rng_state=False
        )
        return v

    def _index(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self.policy.device)

    def finish(self) -> None:
        """Nothing to do."""

    def metrics(self, means: Mapping[str, float], record: TermRecord) -> Metrics:  # noqa: ARG002
        """Loss, share of clipped images, failures, and forward passes of the step."""
        passes = len(self.batch.tree.leaves) * self.method.passes_per_image
        weighted = bool(self.method.kl_weight)
        if means["clipped"] == 1 and self.batch.world.is_main:
            cap = getattr(self.method, "reward_cap", None)
            log.warning(
                "step %d trained no image: every reward is above %s",
                self.batch.step,
                f"the cap of method {self.method.name}"
                if cap is None
                else f"method.reward_cap={cap:g}. Use a larger cap, or null.",
            )
        metrics: Metrics = {
            "loss": means["loss"],
            "clip_fraction": means["clipped"],
            "failed/gradient": sum(self.batch.world.gather_data(self.failed)),
            "train_forward_passes": passes,
            "frozen_forward_passes": passes if weighted else 0,
        }
        return metrics | ({"kl": means["kl"]} if weighted else {})
