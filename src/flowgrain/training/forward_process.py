"""The losses of methods that train on finished images by adding noise to them again.

Shapes: I images, B rows of a micro-batch, *L latent.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.core.sde import per_row
from flowgrain.data import latent_noise
from flowgrain.methods import ForwardProcess
from flowgrain.models import take
from flowgrain.training.losses import TermRecord, Terms, Update
from flowgrain.training.policy import Policy
from flowgrain.training.rollout_batch import Metrics, RolloutBatch


class ForwardProcessLoss:
    """The losses of a forward-process method. See `losses.RolloutLoss`.

    Noise of several random grid levels is added to every image.
    """

    def __init__(
        self,
        config: Config,
        method: ForwardProcess,
        policy: Policy,
        batch: RolloutBatch,
        sigmas: Tensor,
    ) -> None:
        self.method, self.policy, self.batch, self.sigmas = method, policy, batch, sigmas
        self.seed, self.guidance = config.runtime.seed, config.sampling.guidance_scale
        num_steps = len(sigmas) - 1
        self.num_levels = method.num_levels(num_steps)
        self.leaves = leaves = batch.tree.leaves
        random = np.random.default_rng([self.seed, batch.step])
        indices = np.tile(np.arange(num_steps), (len(leaves), 1))
        self.levels = random.permuted(indices, axis=1)[:, : self.num_levels]  # (I, num_levels)
        self.updates: Sequence[Update] = [
            self._update(rows, config.micro_batch_size) for rows in self._shares()
        ]

    def _shares(self) -> list[np.ndarray]:
        """The leaves of every optimizer update: equal shares of the images of every prompt."""
        prompt = self.batch.tree.prompt[self.leaves]
        updates = int(self.method.updates_per_rollout)
        of_prompt = [self.leaves[prompt == p] for p in np.unique(prompt)]
        parts = zip(*(np.array_split(leaves, updates) for leaves in of_prompt), strict=True)
        shares = [np.sort(np.concatenate(part)) for part in parts]
        return [share for share in shares if len(share)]

    def _update(self, leaves: np.ndarray, size: int) -> Update:
        # A row is one level of one image.
        rows = leaves.repeat(self.num_levels)
        return Update(leaves, self.batch.micro_batches(rows, size), len(rows))

    def prepare(self) -> None:
        """Nothing to do."""

    def terms(self, number: int, place: int) -> Terms:
        """Loss [B] of a micro-batch. With a KL weight, also the distance [B] to the reference."""
        batch, policy = self.batch, self.policy
        micro_batches = self.updates[number].micro_batches
        rows = micro_batches[place].rows
        taken = sum(len(before.rows) for before in micro_batches[:place])
        image = np.searchsorted(self.leaves, batch.global_rows(rows)).clip(max=len(self.leaves) - 1)
        k = self.levels[image, np.arange(taken, taken + len(rows)) % self.num_levels]
        x0 = batch.rollout.at(rows).float()  # (B, *L)
        eps = self._noise(image, k, x0)
        sigma = self.sigmas[torch.from_numpy(k).to(policy.device)]
        x = (1 - per_row(sigma, x0)) * x0 + per_row(sigma, x0) * eps
        prompt = torch.from_numpy(batch.rollout.tree.prompt[rows]).to(policy.device)
        inputs = (x, sigma, take(batch.cond, prompt), self.guidance)
        v = policy.train_velocity(*inputs)
        advantage = batch.advantage[torch.from_numpy(image)].to(policy.device)
        loss = self.method.loss(v, policy.old_velocity(*inputs), eps - x0, sigma, advantage)
        if not self.method.kl_weight:
            return {"loss": loss}
        distance = (v - policy.reference_velocity(*inputs)).square().flatten(1).mean(1)
        return {"loss": loss + self.method.kl_weight * distance, "kl": distance}

    def _noise(self, image: np.ndarray, k: np.ndarray, x0: Tensor) -> Tensor:
        """eps [B, *L] of image number `image` [B] at grid index `k` [B]."""
        step = self.batch.step
        keys = zip(image.tolist(), k.tolist(), strict=True)
        noise = [latent_noise(x0.shape[1:], "forward", self.seed, step, *key) for key in keys]
        return torch.stack(noise).to(x0)

    def finish(self) -> None:
        """Move the old policy toward the trained policy."""
        self.policy.move_old(self.method.decay(self.policy.updates))

    def metrics(self, means: Mapping[str, float], record: TermRecord) -> Metrics:  # noqa: ARG002
        """Loss, distance to the reference, and forward passes of the step."""
        rows = len(self.leaves) * self.num_levels
        weighted = bool(self.method.kl_weight)
        metrics: Metrics = {
            "loss": means["loss"],
            "train_forward_passes": rows,
            "frozen_forward_passes": rows * (2 if weighted else 1),
        }
        return metrics | ({"kl": means["kl"]} if weighted else {})
