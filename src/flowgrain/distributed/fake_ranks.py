"""A rank among fake ranks, whose tensors have no values. No other process exists."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flowgrain.distributed.world import GPUS_PER_MACHINE, SINGLE, World, context_mesh

T = TypeVar("T")


@dataclass(frozen=True)
class _FakeWorld(World):
    """A rank whose other ranks have the same values."""

    def gather(self, value: T) -> list[T]:
        """`value` of every rank."""
        return [value] * self.size


def fake_world(size: int, device_type: str, context: int = 1) -> World:
    """The first of `size` ranks. Its collectives return at once.

    The meshes are those of `init_process_group` on machines with `GPUS_PER_MACHINE` GPUs.

    Args:
        size: number of ranks.
        device_type: type of the registered accelerator.
        context: number of ranks in a context group. It divides `size`.
    """
    if size == 1:
        return SINGLE
    if dist.is_initialized() and dist.get_world_size() != size:
        dist.destroy_process_group()
    if not dist.is_initialized():
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    mesh = _mesh(size, device_type)
    return _FakeWorld(0, size, mesh, context, context_mesh(size, device_type, context))


def group_of(arguments: Sequence[Any]) -> dist.ProcessGroup:
    """The group of a collective operator with these arguments: an object, or the last name."""
    groups = [a for a in arguments if isinstance(a, torch.ScriptObject)]
    if groups:
        return dist.ProcessGroup.unbox(groups[0])
    names = [a for a in arguments if isinstance(a, str)]
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    found: dist.ProcessGroup = resolve(names[-1])
    return found


def spans_machines(group: dist.ProcessGroup) -> bool:
    """Whether the ranks of a group are on several machines."""
    ranks = dist.get_process_group_ranks(group)
    return len({rank // GPUS_PER_MACHINE for rank in ranks}) > 1


def _mesh(size: int, device_type: str) -> DeviceMesh:
    """Shards within a machine, replicas across machines."""
    machines = -(-size // GPUS_PER_MACHINE)
    if machines > 1 and size % GPUS_PER_MACHINE == 0:
        names = ("replicate", "shard")
        return init_device_mesh(device_type, (machines, GPUS_PER_MACHINE), mesh_dim_names=names)
    return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
