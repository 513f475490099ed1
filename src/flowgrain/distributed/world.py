"""The ranks of a run. A single process is a world of size 1 and runs the same code.

Prompts are assigned to ranks, or with context parallelism to groups of ranks. Ranks exchange
gradients and parameters as tensors, and scores and metrics as small objects on the CPU, a few times
per step.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from flowgrain.core.tree import Ints
from flowgrain.distributed.attempt_store import attempt_store

T = TypeVar("T")

GPUS_PER_MACHINE = 8
"""Assumed number of GPUs of a machine, if the machines do not exist yet."""

# A slow reward on one rank is not an error. If a rank dies, torchrun ends all other ranks.
_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: number of this process.
        size: number of processes.
        mesh: device mesh on which parameters are sharded. None for a single process.
        context: number of consecutive ranks that compute the same rows together. Each of them
            computes a part of the tokens.
        context_mesh: device mesh [size / context, 1, context] with the dimensions data, ring and
            ulysses. None if `context` is 1.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    context: int = 1
    context_mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Number of this rank's context group. Without context parallelism, `rank`."""
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        """Number of context groups. Without context parallelism, `size`."""
        return self.size // self.context

    @property
    def is_first_of_group(self) -> bool:
        """Whether this rank is the first of its context group. It scores the group's images."""
        return self.rank % self.context == 0

    def assign(self, count: int) -> Ints:
        """Numbers of the items, out of `count`, of this context group: every `data_size`-th item.

        All groups get the same number of items, so that they do the same work at the same time. The
        last number may therefore be `count` or larger. The result of such an item is discarded.
        """
        groups = self.data_size
        return np.arange(-(-count // groups), dtype=np.int64) * groups + self.data_rank

    def gather_data(self, value: T) -> list[T]:
        """The values of the first rank of every context group. All ranks must call it together."""
        return self.gather(value)[:: self.context]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank. Values are pickled and should be small."""
        if self.mesh is None:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def on_main(self, work: Callable[[], T]) -> T:
        """The result of `work` on the main rank, on all ranks. An error is raised on all ranks."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.is_main:
            try:
                outcome = (work(), None)
            except Exception as error:
                outcome = (None, error)
        result, failure = self.gather(outcome)[0]
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def interleave(self, parts: Sequence[Tensor], count: int) -> Tensor:
        """Results [count, ...] of all items, from the results parts[g] of each context group g."""
        return torch.stack(list(parts), 1).flatten(0, 1)[:count]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return any(self.gather(flag))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of replicated parameters over the ranks.

        FSDP already sums the gradients of sharded parameters. In a context group, every rank has
        the gradient of its tokens, so that the sum over all ranks is the gradient of all rows.
        """
        grads = [
            p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)
        ]
        if self.mesh is None or not grads:
            return
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        totals = torch.split(flat, [grad.numel() for grad in grads])
        for grad, total in zip(grads, totals, strict=True):
            grad.copy_(total.view_as(grad))


SINGLE = World()
"""The world of a single process."""


def init_process_group(device: torch.device, context: int = 1) -> World:
    """Initialize the process group of the processes that torchrun started.

    With several machines the mesh is hybrid: parameters are sharded within a machine and replicated
    across machines. Context groups do not change this mesh.

    Args:
        device: compute device.
        context: number of ranks in a context group. It divides the number of processes.

    Returns:
        The world of these processes. Without torchrun, the world of a single process.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return SINGLE
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = attempt_store(rank := int(os.environ["RANK"]), size, _TIMEOUT)
        if store is None:
            dist.init_process_group(backend, timeout=_TIMEOUT)
        else:
            dist.init_process_group(
                backend, timeout=_TIMEOUT, store=store, rank=rank, world_size=size
            )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if local < size and size % local == 0:
        names = ("replicate", "shard")
        mesh = init_device_mesh(device.type, (size // local, local), mesh_dim_names=names)
    else:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    groups = context_mesh(size, device.type, context)
    return World(dist.get_rank(), size, mesh, context, groups)


def context_mesh(size: int, device_type: str, context: int) -> DeviceMesh | None:
    """Device mesh of the context groups, see `World`. None if a group is a single rank."""
    if context == 1:
        return None
    dims = ("data", "ring", "ulysses")  # the last two are names of diffusers
    return init_device_mesh(device_type, (size // context, 1, context), mesh_dim_names=dims)


def destroy_process_group() -> None:
    """Destroy the process group, if one was initialized."""
    if dist.is_initialized():
        dist.destroy_process_group()


def env_rank() -> tuple[int, int, int]:
    """Rank, world size and local rank from the environment that torchrun sets.

    It needs no process group. Without torchrun it is (0, 1, 0).
    """
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, size, local = (int(os.environ.get(name, default)) for name, default in names.items())
    return rank, size, local


def local_world_size() -> int:
    """Number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
