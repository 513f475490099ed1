"""Autograd graphs of a rollout, which an update can use in place of a second forward pass.

Shapes: N rows of the tree, B rows of a batch, *L latent.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrain.core.tree import Ints

_Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Graph:
    """The velocity of one model call with gradient. Its autograd graph is kept.

    Attributes:
        rows: [B] rows of the tree.
        velocity: [B, *L].
    """

    rows: Ints
    velocity: Tensor


@dataclass
class GraphKeeper:
    """Evaluates the rows of a rollout, and keeps the graphs of trained parents.

    A batch is divided into calls with gradient and a call without gradient for all other rows, so
    that no memory is spent on rows that are not trained.

    Attributes:
        velocity: velocity of the trained policy. It is called with gradient.
        wanted: [N] rows whose graphs are needed.
        take_room: take_room(n) reserves memory for the graph of the next call with at most n >= 1
            rows. It returns the number of rows, 0 if no memory is left.
        graphs: the kept graphs.
        more_calls: model calls beyond one per batch.
    """

    velocity: _Velocity
    wanted: NDArray[np.bool_]
    take_room: Callable[[int], int]
    graphs: list[Graph] = field(default_factory=list)
    more_calls: int = 0

    def evaluate(
        self, rows: Ints, x: Tensor, sigma: Tensor, prompt: Tensor, sample: _Velocity
    ) -> Tensor:
        """v [B, *L] without gradient.

        Args:
            rows: [B] rows of the tree.
            x: [B, *L] their latents.
            sigma: [B] their noise levels.
            prompt: [B] their prompts.
            sample: velocity of the rows whose graphs are not kept.
        """
        wanted, first = np.flatnonzero(self.wanted[rows]), 0
        calls: list[tuple[Ints, bool]] = []
        while first < len(wanted) and (count := self.take_room(len(wanted) - first)):
            calls.append((wanted[first : first + count], True))
            first += count
        kept = wanted[:first]
        if len(kept) < len(rows):
            calls.append((np.setdiff1d(np.arange(len(rows)), kept), False))
        self.more_calls += len(calls) - 1
        parts = []
        for places, keep in calls:
            index = torch.from_numpy(places).to(x.device)
            whole = len(places) == len(rows)
            inputs = (x, sigma, prompt) if whole else (x[index], sigma[index], prompt[index])
            if keep:
                with torch.enable_grad():
                    v = self.velocity(*inputs)
                self.graphs.append(Graph(rows[places], v))
            else:
                v = sample(*inputs)
            parts.append(v.detach())
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate([places for places, _ in calls]))
        return torch.cat(parts)[torch.from_numpy(order).to(x.device)]
