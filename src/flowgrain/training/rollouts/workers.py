"""Rollouts that worker processes sample, while the training process waits or updates.

With rollout.max_staleness=0, a step is sampled with the latest parameters. With 1, step k + 1 is
sampled during the update of step k, with the parameters before this update. The importance ratio
of step k + 1 is then taken against these older parameters, which are kept for it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowgrain.core.rollout import concatenate
from flowgrain.core.tree import Tree
from flowgrain.data import Prompt
from flowgrain.models import Conditioning, take
from flowgrain.rewards import Scores
from flowgrain.training.health import check_images
from flowgrain.training.rollouts.cluster import Call, Cluster
from flowgrain.training.rollouts.steps import step_prompts, step_tree
from flowgrain.training.rollouts.worker import RolloutRequest
from flowgrain.training.signals import check_stop

if TYPE_CHECKING:
    from flowgrain.config.schema import Config
    from flowgrain.training.collect import RolloutCollector
    from flowgrain.training.scored_tree import ScoredTree

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The parameters with which a step is sampled, on the CPU.

    Attributes:
        updates: number of optimizer updates before.
        tensors: trained parameters by name, in float32.
    """

    updates: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Pending:
    """A step that the workers sample.

    Attributes:
        calls: one for each worker.
        cond: conditioning of all prompts.
    """

    calls: list[Call]
    cond: Conditioning


class WorkerRollouts:
    """Workers sample the rollouts. See `RolloutSource`.

    Every worker gets consecutive prompts in whole chunks. A chunk has the same model calls on every
    worker and in the training process, so that the results are the same to the bit.

    Args:
        config: settings of the run.
        collector: plans the steps and encodes the prompts.
    """

    def __init__(self, config: Config, collector: RolloutCollector) -> None:
        self.config, self.collector = config, collector
        self.cluster: Cluster | None = None
        self.processes: list[int] = []
        self._pending: dict[int, Pending] = {}
        self._snapshots: dict[int, Snapshot] = {}

    def start(self) -> None:
        if self.cluster is None:
            self.cluster = Cluster(self.config, self.collector.policy.device)
            self.processes = self.cluster.processes

    def close(self) -> None:
        if self.cluster is not None:
            self.cluster.close()
        self.cluster = None
        self._pending = {}

    def score(self, step: int, prompts: list[Prompt], tree: Tree) -> ScoredTree:
        self.start()
        self._snapshots = {k: v for k, v in self._snapshots.items() if k >= step}
        if step not in self._pending:
            self._pending[step] = self._dispatch(step, prompts, tree)
        if self.config.rollout.max_staleness:
            # The workers continue with the next step as soon as they have finished this one.
            self._keep(step + 1)
            if step < self.config.training.max_steps and step + 1 not in self._pending:
                following = step_prompts(self.config, self.collector.prompts, step + 1)
                next_tree = step_tree(self.config, self.collector.method, step + 1)
                self._pending[step + 1] = self._dispatch(step + 1, following, next_tree)
        scored = self._result(step, tree)
        self._pending = {k: v for k, v in self._pending.items() if k > step}
        snapshot = self._snapshots.get(step)
        if snapshot is None or snapshot.updates == self.collector.policy.updates:
            return scored
        return replace(scored, sampled_with=snapshot.tensors)

    def state_dict(self, step: int) -> dict[str, Any]:
        snapshot = self._older(step)
        return {} if snapshot is None else {"updates": snapshot.updates}

    def tensors(self, step: int) -> dict[str, Tensor]:
        snapshot = self._older(step)
        found = {} if snapshot is None else snapshot.tensors
        return {f"sampled_with.{name}": value for name, value in found.items()}

    def load_state_dict(self, step: int, state: Mapping[str, Any]) -> None:
        self._pending, self._snapshots = {}, {}
        if "updates" in state:
            parameters = self.collector.policy.parameters
            empty = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in parameters.items()}
            self._snapshots[step + 1] = Snapshot(state["updates"], empty)

    def _older(self, step: int) -> Snapshot | None:
        """The parameters of the step after `step`, if they are older than those of the policy."""
        snapshot = self._snapshots.get(step + 1)
        current = self.collector.policy.updates
        return None if snapshot is None or snapshot.updates == current else snapshot

    @torch.no_grad()
    def _keep(self, step: int) -> None:
        """Keep the current parameters for `step`, unless it has its parameters already."""
        policy = self.collector.policy
        if step not in self._snapshots:
            kept = {n: p.detach().to("cpu", copy=True) for n, p in policy.parameters.items()}
            self._snapshots[step] = Snapshot(policy.updates, kept)

    def _dispatch(self, step: int, prompts: list[Prompt], tree: Tree) -> Pending:
        """Start the sampling of `step`."""
        assert self.cluster is not None
        collector, policy = self.collector, self.collector.policy
        with collector.timer.measure("encode"):
            cond = policy.encode([prompt.text for prompt in prompts])
        size = self.config.sampling.prompts_per_chunk or len(prompts)
        starts = range(0, len(prompts), size)
        requests = []
        for first, end in shares(len(starts), self.config.rollout.workers):
            rows = torch.arange(first * size, min(end * size, len(prompts)), device=policy.device)
            request = RolloutRequest(
                step,
                first * size,
                prompts[first * size : end * size],
                _on_cpu(take(cond, rows)),
                _on_cpu(policy.unconditional),
                tree,
                collector.method.state_dict(),
            )
            requests.append(request)
        return Pending(self.cluster.submit(requests, self._parameters(step)), cond)

    @torch.no_grad()
    def _parameters(self, step: int) -> dict[str, Tensor]:
        """The parameters that sample `step`, on the CPU in the dtype of the copy that samples."""
        policy, snapshot = self.collector.policy, self._snapshots.get(step)
        sampler = policy.old if policy.copies.old_samples else policy.sampler
        assert sampler is not None
        current = dict(zip(policy.parameters, policy.parameters_of(sampler), strict=True))
        found = current if snapshot is None else snapshot.tensors
        return {name: found[name].detach().to("cpu", p.dtype) for name, p in current.items()}

    def _result(self, step: int, tree: Tree) -> ScoredTree:
        """The scored tree of all prompts of `step`, from the shares of the workers."""
        assert self.cluster is not None
        collector, pending = self.collector, self._pending[step]
        world, policy = collector.world, collector.policy
        with collector.timer.measure("sample"):
            results = self.cluster.results(pending.calls, partial(check_stop, world))
        self._warn_of_restarts(step, [process for _, process in results])
        parts = [part for part, _ in results]
        images = torch.cat([part.images for part in parts])
        check_images(images, self.config.training.max_failed_rewards, world)
        rollouts = [
            replace(part.rollout, latents=part.rollout.latents.to(policy.device)) for part in parts
        ]
        whole = concatenate(tree.repeat(sum(r.tree.num_prompts for r in rollouts)), rollouts)
        names, monitors = parts[0].scores, parts[0].monitors
        return replace(
            parts[0],
            cond=pending.cond,
            rollout=whole,
            images=images,
            scores={n: Scores.concatenate([part.scores[n] for part in parts]) for n in names},
            monitors={n: torch.cat([part.monitors[n] for part in parts]) for n in monitors},
        )

    def _warn_of_restarts(self, step: int, processes: list[int]) -> None:
        """Log which workers are not the processes of the step before, or those that started."""
        for number, (before, now) in enumerate(zip(self.processes, processes, strict=False)):
            if before != now:
                log.warning(
                    "Step %d: rollout worker %d died and was restarted. Prompts that it had not "
                    "finished were sampled again.",
                    *(step, number),
                )
        self.processes = processes


def shares(chunks: int, workers: int) -> list[tuple[int, int]]:
    """First and end of each worker's consecutive chunks. Their numbers differ by at most 1."""
    ends = [(number * chunks) // workers for number in range(workers + 1)]
    return list(itertools.pairwise(ends))


def _on_cpu(cond: Conditioning) -> Conditioning:
    return {name: value.cpu() for name, value in cond.items()}
