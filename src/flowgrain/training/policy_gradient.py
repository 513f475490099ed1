"""The losses of methods that train stochastic steps.

One forward pass with gradient is enough for all edges of a parent.

Shapes: B parents, E edges, *L latent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.core.cost import split_updates
from flowgrain.core.objective import Edges
from flowgrain.core.sde import Gaussian, Step
from flowgrain.core.tree import Ints
from flowgrain.methods import PolicyGradient
from flowgrain.models import take
from flowgrain.training.graphs import reused_micro_batches
from flowgrain.training.losses import TermRecord, Terms, Update
from flowgrain.training.policy import Policy
from flowgrain.training.rollout_batch import Metrics, RolloutBatch
from flowgrain.training.signals import check_stop


class PolicyGradientLoss:
    """The losses of a policy-gradient method. See `losses.RolloutLoss`.

    Losses are summed over edges and divided by the global number of edges.
    """

    def __init__(
        self,
        config: Config,
        method: PolicyGradient,
        policy: Policy,
        batch: RolloutBatch,
        sigmas: Tensor,
    ) -> None:
        self.policy, self.batch, self.sigmas = policy, batch, sigmas
        self.kl_weight, self.guidance = method.kl_weight, config.sampling.guidance_scale
        self.kernel, self.objective = method.kernel(sigmas), method.objective(sigmas)
        self._reuses = bool(config.training.graph_memory)
        self._velocities: dict[int, Tensor] = {}  # of the rollout, by place of the micro-batch
        parent_of_edge, updates = batch.tree.parent[batch.tree.edges], []
        for rows in split_updates(batch.tree, method.updates_per_rollout):
            micro_batches = batch.micro_batches(rows, config.micro_batch_size)
            if self._reuses:  # there is one update
                micro_batches, self._velocities = reused_micro_batches(
                    batch, rows, config.micro_batch_size
                )
            updates.append(Update(rows, micro_batches, int(np.isin(parent_of_edge, rows).sum())))
        self.updates: Sequence[Update] = updates
        self._reused_rows = sum(map(len, self._velocities.values()))
        self._old: list[list[Gaussian]] = []
        self._first_old = 1 if batch.sampled_with is None else 0

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute the old transitions of all updates except the first.

        During the first update, the policy equals the policy that sampled. The old transitions come
        from the same kind of forward pass as the gradient, so that the ratio is exactly 1 while the
        policy is unchanged. If older parameters sampled, they compute the old transitions of all
        updates.

        Raises:
            StopRequested: a signal arrived.
        """
        self._old = [[] for _ in self.updates]
        with self.policy.replaced(self.batch.sampled_with):
            for number in range(self._first_old, len(self.updates)):
                for micro_batch in self.updates[number].micro_batches:
                    check_stop(self.batch.world)
                    old = self._transition(micro_batch.rows, self.policy.train_velocity)[0]
                    self._old[number].append(old)

    def terms(self, number: int, place: int) -> Terms:
        """Loss, ratio, clip and KL [E] of the trained edges below the rows of a micro-batch."""
        batch = self.batch
        rows = self.updates[number].micro_batches[place].rows
        kept = self._velocities.pop(place, None)
        transition, edges, step = self._transition(rows, self.policy.train_velocity, kept)
        x_next = batch.rollout.at(edges)
        reference = None
        if self.kl_weight:
            reference = self._transition(rows, self.policy.reference_velocity)[0]
        position = torch.from_numpy(np.searchsorted(batch.credited, batch.global_rows(edges)))
        position = position.clamp(max=len(batch.credited) - 1)
        advantage = batch.advantage[position].to(self.policy.device)
        edge_weight = batch.edge_weight[position].to(self.policy.device)
        if self._old[number]:
            old = self._old[number][place]
        else:
            old = replace(transition, mean=transition.mean.detach())
        result = self.objective(Edges(transition, old, x_next, advantage, step, reference))
        return {
            "loss": result.loss * edge_weight,
            "ratio": result.ratio,
            "clipped": result.clipped,
            "kl": result.kl,
        }

    def _transition(
        self, parents: Ints, velocity: Callable[..., Tensor], v: Tensor | None = None
    ) -> tuple[Gaussian, Ints, Step]:
        """Transitions of the trained edges below `parents`, the edges [E], and their grid steps.

        v [B, *L]: the velocity, if it is known. Otherwise `velocity` computes it.
        """
        rollout, device = self.batch.rollout, self.policy.device
        tree = rollout.tree
        edges = tree.edges[np.isin(tree.parent[tree.edges], parents)]
        source = torch.from_numpy(np.searchsorted(parents, tree.parent[edges])).to(device)
        x = rollout.at(parents)  # (B, *L)
        prompt = torch.from_numpy(tree.prompt[parents]).to(device)
        sigma = self.sigmas[torch.from_numpy(tree.grid_index[parents]).to(device)]
        if v is None:
            v = velocity(x, sigma, take(self.batch.cond, prompt), self.guidance)
        start = torch.from_numpy(tree.grid_index[tree.parent[edges]]).to(device)
        end = torch.from_numpy(tree.grid_index[edges]).to(device)
        step = Step.on(self.sigmas, start, end)
        return self.kernel(x[source], v[source], step), edges, step

    def finish(self) -> None:
        """Nothing to do."""

    def metrics(self, means: Mapping[str, float], record: TermRecord) -> Metrics:
        """Ratio, clip fraction, KL and forward passes of the step."""
        passes = sum(len(update.rows) for update in self.updates)
        reused = sum(self.batch.world.gather_data(self._reused_rows)) if self._reuses else 0
        largest = record.largest("ratio")
        metrics: Metrics = {
            "loss": means["loss"],
            "ratio/mean": means["ratio"],
            "ratio/max": max(self.batch.world.gather(largest)),
            "clip_fraction": means["clipped"],
            "train_forward_passes": passes - reused,
            "frozen_forward_passes": sum(len(u.rows) for u in self.updates[self._first_old :])
            + (passes if self.kl_weight else 0),
        }
        if self._reuses:
            metrics["reused_forward_passes"] = reused
        if len(self.updates) > 1:  # only later updates can be clipped
            metrics["clip_fraction/later_updates"] = means["clipped/later_updates"]
        if self.kl_weight:
            metrics["kl"] = means["kl"]
        return metrics
