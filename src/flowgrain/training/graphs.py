"""Reuse of the rollout's autograd graphs by the update, within a memory budget.

With one update per rollout, the parameters of the update are those that sampled. The forward pass
of a trained parent can then keep its graph while sampling, and the update only runs its backward
pass.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flowgrain.config.schema import Config
from flowgrain.core.graphs import Graph
from flowgrain.core.tree import Ints
from flowgrain.models import take
from flowgrain.settings import SettingsError
from flowgrain.training.policy import Policy
from flowgrain.training.rollout_batch import MicroBatch, RolloutBatch

GIGABYTE = 10**9
"""Bytes in the unit of training.graph_memory."""


@dataclass(frozen=True)
class GraphSize:
    """Bytes of the graph of a model call with n rows: of_call + n * of_row."""

    of_call: int
    of_row: int

    def rows_in(self, size: int, limit: int) -> int:
        """The largest number of rows up to `limit` whose graph takes at most `size` bytes."""
        if self.of_call + limit * self.of_row <= size:
            return limit
        return max(0, (size - self.of_call) // self.of_row) if self.of_row else 0


@dataclass
class GraphBudget:
    """Memory for the graphs of one rollout batch.

    Attributes:
        size: memory of a graph. None: the budget is not limited.
        micro_batch_size: largest number of rows in a call.
        left: bytes that are not reserved.
    """

    size: GraphSize | None
    micro_batch_size: int
    left: int = 0

    def take_room(self, rows: int) -> int:
        """Reserve memory for the next call with at most `rows` rows. Returns their number."""
        rows = min(rows, self.micro_batch_size)
        if self.size is None:
            return rows
        rows = self.size.rows_in(self.left, rows)
        if rows:
            self.left -= self.size.of_call + rows * self.size.of_row
        return rows


class GraphReuse:
    """Decides how many graphs of a rollout are kept, from training.graph_memory.

    Args:
        config: settings.
        policy: the policy that samples and is trained.

    Raises:
        SettingsError: the parameters are sharded over ranks.
    """

    def __init__(self, config: Config, policy: Policy) -> None:
        self.memory = config.training.graph_memory
        self.config, self.policy = config, policy
        self._size: GraphSize | None = None
        if self.memory and policy.copies.sharded:
            shown = self.memory if self.memory == "all" else f"{self.memory:g}"
            fix = "runtime.rollout_weights=replica, or " if config.lora.rank else ""
            raise SettingsError(
                f"training.graph_memory={shown}: the trained parameters are sharded over "
                f"ranks, and a graph would keep gathered parameters. Use {fix}"
                "training.graph_memory=0."
            )

    def budget(self) -> GraphBudget | None:
        """The budget of a rollout batch. None: no graph is kept. Prompts must be encoded."""
        rows = self.config.micro_batch_size
        if not self.memory:
            return None
        if self.memory == "all":
            return GraphBudget(None, rows)
        self._size = self._size or self._measure()
        return GraphBudget(self._size, rows, int(self.memory * GIGABYTE))

    def _measure(self) -> GraphSize:
        """Measure the graphs of one and two rows with the conditioning of the empty prompt.

        The result only depends on shapes. It is therefore the same on all ranks and in a resumed
        run.
        """
        policy, guidance = self.policy, self.config.sampling.guidance_scale

        def forward(rows: int) -> Tensor:
            x = torch.zeros(rows, *policy.backbone.latent_shape, device=policy.device)
            sigma = torch.full((rows,), 0.5, device=policy.device)
            cond = take(policy.unconditional, torch.zeros(rows, dtype=torch.long).to(policy.device))
            return policy.train_velocity(x, sigma, cond, guidance)

        one = graph_bytes(policy.model, lambda: forward(1))
        if self.config.micro_batch_size == 1:
            return GraphSize(0, one)
        two = graph_bytes(policy.model, lambda: forward(2))
        of_row = max(two - one, 0)
        return GraphSize(max(one - of_row, 0), of_row)


def graph_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that the graph of `forward` keeps for the backward pass, with its result.

    Parameters and buffers of `model` are not counted. Storages are counted once.
    """
    # Not data_ptr(), which is 0 for every fake tensor of a rehearsal.
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            found[storage._cdata] = storage.nbytes()
        return tensor.detach()  # keeps the storage, so that its address is not used again

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    storage = result.untyped_storage()
    found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def reused_micro_batches(
    batch: RolloutBatch, rows: Ints, size: int
) -> tuple[list[MicroBatch], dict[int, Tensor]]:
    """Micro-batches of the only update of `batch`: kept graphs first, then all other rows.

    The graphs are removed from the rollout. Each is freed by the backward pass of its micro-batch.

    Args:
        batch: the rollout batch.
        rows: rows of the whole tree that are trained.
        size: rows of a micro-batch without a graph.

    Returns:
        The micro-batches, and the velocities [B, *L] with their graphs by place of the micro-batch.
    """
    graphs = list(batch.rollout.graphs)
    batch.rollout.graphs.clear()
    if not graphs:
        return batch.micro_batches(rows, size), {}
    graphs = [_sorted(graph) for graph in graphs]
    rest = np.setdiff1d(batch.local_rows(rows), np.concatenate([graph.rows for graph in graphs]))
    micro_batches = [MicroBatch(graph.rows, True) for graph in graphs]
    # Parameters are not sharded, so ranks may have different numbers of micro-batches.
    micro_batches += [MicroBatch(rest[i : i + size], True) for i in range(0, len(rest), size)]
    return micro_batches, {place: graph.velocity for place, graph in enumerate(graphs)}


def _sorted(graph: Graph) -> Graph:
    """The graph with rows in rising order."""
    order = np.argsort(graph.rows)
    return Graph(
        graph.rows[order], graph.velocity[torch.from_numpy(order).to(graph.velocity.device)]
    )
