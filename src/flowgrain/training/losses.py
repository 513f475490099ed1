"""Optimizer updates and loss terms, shared by the losses of all methods.

Shapes: B rows or edges of a micro-batch.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowgrain.core.tree import Ints
from flowgrain.distributed import World
from flowgrain.training.rollout_batch import Metrics, MicroBatch

Terms = Mapping[str, Tensor]
"""Loss terms by name, one value per row or edge [B]. "loss" is the differentiable loss."""


@dataclass(frozen=True)
class Update:
    """One optimizer update.

    Attributes:
        rows: rows of the whole tree.
        micro_batches: micro-batches of this rank.
        count: number of losses on all ranks.
    """

    rows: Ints
    micro_batches: list[MicroBatch]
    count: int


class RolloutLoss(Protocol):
    """The losses of a rollout batch, divided into optimizer updates."""

    updates: Sequence[Update]

    def prepare(self) -> None:
        """Compute the tensors that later updates need. Called before the first update."""

    def terms(self, number: int, place: int) -> Terms:
        """Loss terms of micro-batch `place` of update `number`."""

    def finish(self) -> None:
        """Called after the last update."""

    def metrics(self, means: Mapping[str, float], record: "TermRecord") -> Metrics:
        """Metrics of the step, from the means of the recorded terms."""


def _numbers(values: list[Tensor]) -> list[float]:
    """Scalars of a device as numbers. The host waits once for all of them."""
    return torch.stack(values).tolist() if values else []


class TermRecord:
    """The detached loss terms of a step on this rank."""

    def __init__(self) -> None:
        self.values: defaultdict[str, list[Tensor]] = defaultdict(list)

    def add(self, terms: Terms, number: int) -> None:
        """Record the terms of a micro-batch of update `number`."""
        for name, value in terms.items():
            self.values[name].append(value.detach())
            if number:
                self.values[f"{name}/later_updates"].append(value.detach())

    def largest(self, name: str) -> float:
        """The largest value of a term on this rank, or -inf."""
        return max(_numbers([value.max() for value in self.values[name]]), default=-math.inf)

    def means(self, world: World, names: Sequence[str]) -> dict[str, float]:
        """The mean of each term in `names` over all ranks."""
        sums = {
            name: (
                sum(_numbers([value.double().sum() for value in self.values[name]])),
                sum(map(len, self.values[name])),
            )
            for name in names
        }
        ranks = world.gather_data(sums)
        return {
            name: sum(rank[name][0] for rank in ranks)
            / max(sum(rank[name][1] for rank in ranks), 1)
            for name in sums
        }
