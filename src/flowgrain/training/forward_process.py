"""The losses of methods that train on finished images by adding noise to them again.

Shapes: I images of this rank in an update, N draws of an image, B rows of a micro-batch, *L latent.
A row is one draw of one image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.core.cost import split_images
from flowgrain.core.regression import Noised, Quantities, linearized, squared_error
from flowgrain.core.sde import per_row
from flowgrain.core.tree import Ints
from flowgrain.data import latent_noise
from flowgrain.methods import ForwardProcess
from flowgrain.models import Conditioning, take
from flowgrain.training.losses import TermRecord, Terms, Update
from flowgrain.training.policy import Policy
from flowgrain.training.rollout_batch import Metrics, RolloutBatch
from flowgrain.training.signals import check_stop


@dataclass(frozen=True)
class _Rows:
    """Rows of a micro-batch: inputs of the model, and what the loss needs besides velocities."""

    inputs: tuple[Tensor, Tensor, Conditioning, float]
    target: Tensor
    advantage: Tensor
    known: Tensor


def _quantity(method: ForwardProcess, rows: _Rows, v: Tensor) -> Tensor:
    """The method's quantity [B] of the rows with the velocity `v` of one of the policies."""
    return method.quantity(Noised(v, rows.target, rows.inputs[1], rows.advantage))


def _noise(owner: Ints, number: Ints, shape: Sequence[int], of: tuple[str, int, int]) -> Tensor:
    """Noise [B, *L] of draw `number` [B] of image or group `owner` [B].

    Args:
        owner: [B].
        number: [B].
        shape: L.
        of: kind of the noise, seed and step.
    """
    keys = list(zip(owner.tolist(), number.tolist(), strict=True))
    # The images of a group share their noise.
    noise = {key: latent_noise(shape, *of, *key) for key in dict.fromkeys(keys)}
    return torch.stack([noise[key] for key in keys])


class ForwardProcessLoss:
    """The losses of a forward-process method. See `losses.RolloutLoss`.

    If the loss of a draw depends on other draws of its group (`method.reduces`), an update has two
    passes. The first computes one number per draw, without gradient. From these follow the losses
    and their derivatives in the numbers. The second pass computes the gradient of the numbers, one
    micro-batch at a time. A group is never split over ranks, because a rank holds whole prompts.
    """

    def __init__(
        self,
        config: Config,
        method: ForwardProcess,
        policy: Policy,
        batch: RolloutBatch,
        sigmas: Tensor,
    ) -> None:
        self.method, self.policy, self.batch = method, policy, batch
        self.seed, self.given = config.runtime.seed, config.data.kind is not None
        guided = method.trains_guided or policy.backbone.embedded_guidance
        self.guidance = config.sampling.guidance_scale if guided else 1.0
        self.leaves = leaves = batch.tree.leaves
        prompt = batch.tree.prompt[leaves]
        self.group = np.unique(prompt, return_inverse=True)[1] if method.shares_draws else None
        random = np.random.default_rng([self.seed, batch.step])
        count = len(leaves) if self.group is None else int(self.group.max()) + 1
        self.levels = method.draw_levels(random, count, sigmas.cpu().numpy())
        self.num_draws = self.levels.sigma.shape[1]
        selected = method.selected(batch.advantage, torch.from_numpy(prompt)).numpy()
        self.updates: Sequence[Update] = [
            self._update(rows[selected[np.searchsorted(leaves, rows)]], config.micro_batch_size)
            for rows in split_images(batch.tree, int(method.updates_per_rollout))
        ]
        self._old: list[list[Tensor]] = []
        self._linear: tuple[Tensor, Tensor] | None = None
        self._passed: list[Tensor] = []
        self._reference: list[Tensor] = []  # velocities of the reference in the first pass

    def _update(self, leaves: Ints, size: int) -> Update:
        rows = leaves.repeat(self.num_draws)
        return Update(leaves, self.batch.micro_batches(rows, size), len(rows))

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute the quantities of later updates under the policy that sampled.

        Only if the trained policy sampled: after the first update it is another policy.
        """
        if not self.method.needs_quantity or self.method.compares_slow:
            return
        for number, update in enumerate(self.updates):
            self._old.append([])
            for place in range(len(update.micro_batches)) if number else ():
                check_stop(self.batch.world)
                rows = self._rows(number, place)
                v = self.policy.train_velocity(*rows.inputs)
                self._old[-1].append(_quantity(self.method, rows, v))

    def terms(self, number: int, place: int) -> Terms:
        """Loss [B] of a micro-batch. With a KL weight, also the distance [B] to the reference."""
        method, policy = self.method, self.policy
        if method.reduces and place == 0:
            self._first_pass(number)
        rows = self._rows(number, place)
        needs_reference = method.kl_weight > 0 if method.reduces else method.needs_reference
        needs_old = method.regularizes_old if method.reduces else method.needs_old
        old = policy.old_velocity(*rows.inputs) if needs_old else None
        reference = self._reference_velocity(rows, place) if needs_reference else None
        v = policy.train_velocity(*rows.inputs)
        x = Noised(v, rows.target, rows.inputs[1], rows.advantage, old, reference)
        x = replace(x, old_quantity=self._old_quantity(x, number, place))
        if method.reduces:
            loss = self._linear_loss(method.quantity(x), number, place)
        else:
            # An image without a score only has the regularizer.
            loss = torch.where(rows.known, method.loss(x), 0)
        added = method.regularizer(x)
        terms = {"loss": loss if added is None else loss + added}
        if method.kl_weight and reference is not None:
            terms["kl"] = squared_error(v.detach(), reference)
        return terms

    def _old_quantity(self, x: Noised, number: int, place: int) -> Tensor | None:
        """The quantities [B] under the old policy. None: they equal those of the trained policy."""
        method = self.method
        if not method.needs_quantity:
            return None
        if method.reduces:
            return self._passed[place]
        if method.compares_slow:
            assert x.old is not None
            return method.quantity(replace(x, v=x.old))
        return self._old[number][place] if number else None

    def _reference_velocity(self, rows: _Rows, place: int) -> Tensor:
        """The velocity [B, *L] of the reference. Only computed if the first pass has not."""
        if self._reference:
            return self._reference[place].to(self.policy.device)
        return self.policy.reference_velocity(*rows.inputs)

    @torch.no_grad()
    def _first_pass(self, number: int) -> None:
        """Compute the quantities of all draws of an update, their losses and derivatives."""
        method, policy = self.method, self.policy
        places = range(len(self.updates[number].micro_batches))
        trained, old, reference = [], [], []
        self._reference = []
        for place in places:
            if number == 0:
                check_stop(self.batch.world)
            rows = self._rows(number, place)
            trained.append(_quantity(self.method, rows, policy.train_velocity(*rows.inputs)))
            if method.compares_slow:
                old.append(_quantity(self.method, rows, policy.old_velocity(*rows.inputs)))
            if method.reduces_reference:
                v = policy.reference_velocity(*rows.inputs)
                reference.append(_quantity(self.method, rows, v))
                if method.kl_weight:
                    self._reference.append(v.cpu())  # of a whole update
        if not method.compares_slow:
            old = self._old[number] if number else trained
        self._passed = old
        self._linear = self._linearize(number, trained, old, reference)

    def _linearize(
        self, number: int, trained: list[Tensor], old: list[Tensor], reference: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses and derivatives [rows] of the draws of this rank that count."""
        update = self.updates[number]
        counts = [micro_batch.counts for micro_batch in update.micro_batches]
        if not any(counts):
            return torch.zeros(0), torch.zeros(0)

        def per_image(parts: list[Tensor]) -> Tensor:
            counted = [part for part, count in zip(parts, counts, strict=True) if count]
            return torch.cat(counted).reshape(-1, self.num_draws)

        mine = self.batch.local_rows(update.rows)
        image = np.searchsorted(self.leaves, self.batch.global_rows(mine))
        group = np.unique(self.batch.rollout.tree.prompt[mine], return_inverse=True)[1]
        device = self.policy.device
        q = Quantities(
            per_image(trained),
            per_image(old),
            per_image(reference) if reference else None,
            self.batch.advantage[torch.from_numpy(image)].to(device),
            torch.from_numpy(group).to(device),
            self.batch.known[torch.from_numpy(image)].to(device),
        )
        values, derivative = linearized(self.method.group_loss, q)
        return values.flatten(), derivative.flatten()

    def _linear_loss(self, quantity: Tensor, number: int, place: int) -> Tensor:
        """Losses [B] with the value and the gradient of the losses of whole groups."""
        assert self._linear is not None
        micro_batches = self.updates[number].micro_batches
        if not micro_batches[place].counts:
            return quantity * 0
        first = sum(len(before.rows) for before in micro_batches[:place])
        values, derivative = (of[first : first + len(quantity)] for of in self._linear)
        return values + derivative * (quantity - quantity.detach())

    def _rows(self, number: int, place: int) -> _Rows:
        """The rows of micro-batch `place` of update `number`."""
        batch, device = self.batch, self.policy.device
        micro_batches = self.updates[number].micro_batches
        rows = micro_batches[place].rows
        taken = sum(len(before.rows) for before in micro_batches[:place])
        image = np.searchsorted(self.leaves, batch.global_rows(rows)).clip(max=len(self.leaves) - 1)
        owner = image if self.group is None else self.group[image]
        place_of = owner, np.arange(taken, taken + len(rows)) % self.num_draws
        x0 = batch.rollout.at(rows).float()  # (B, *L)
        kind = "forward" if self.group is None else "forward of group"
        number_of = self.levels.number[place_of]
        eps = _noise(owner, number_of, x0.shape[1:], (kind, self.seed, batch.step)).to(x0)
        sigma = torch.from_numpy(self.levels.sigma[place_of]).to(device)
        x = (1 - per_row(sigma, x0)) * x0 + per_row(sigma, x0) * eps
        prompt = torch.from_numpy(batch.rollout.tree.prompt[rows]).to(device)
        inputs = (x, sigma, take(batch.cond, prompt), self.guidance)
        of_image = torch.from_numpy(image)
        advantage, known = (of[of_image].to(device) for of in (batch.advantage, batch.known))
        return _Rows(inputs, eps - x0, advantage, known)

    def finish(self) -> None:
        """Move the old policy toward the trained policy, unless the images were given."""
        if self.method.needs_old and not self.given:
            self.policy.move_old(self.method.decay(self.policy.updates))

    def metrics(self, means: Mapping[str, float], record: TermRecord) -> Metrics:  # noqa: ARG002
        """Loss, distance to the reference, and forward passes of the step."""
        rows = [len(update.rows) * self.num_draws for update in self.updates]
        metrics: Metrics = {
            "loss": means["loss"],
            "train_forward_passes": sum(rows),
            "frozen_forward_passes": self.method.frozen_passes(sum(rows), sum(rows[1:])),
        }
        return metrics | ({"kl": means["kl"]} if self.method.kl_weight else {})
