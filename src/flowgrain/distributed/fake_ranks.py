"""A rank among fake ranks, whose tensors have no values. No other process exists."""

from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flowgrain.distributed.world import GPUS_PER_MACHINE, SINGLE, World

T = TypeVar("T")


@dataclass(frozen=True)
class _FakeWorld(World):
    """A rank whose other ranks have the same values."""

    def gather(self, value: T) -> list[T]:
        """`value` of every rank."""
        return [value] * self.size


def fake_world(size: int, device_type: str) -> World:
    """The first of `size` ranks. Its collectives return at once.

    The mesh is that of `init_process_group` on machines with `GPUS_PER_MACHINE` GPUs.
    """
    if size == 1:
        return SINGLE
    if dist.is_initialized() and dist.get_world_size() != size:
        dist.destroy_process_group()
    if not dist.is_initialized():
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    return _FakeWorld(0, size, _mesh(size, device_type))


def _mesh(size: int, device_type: str) -> DeviceMesh:
    """Shards within a machine, replicas across machines."""
    machines = -(-size // GPUS_PER_MACHINE)
    if machines > 1 and size % GPUS_PER_MACHINE == 0:
        names = ("replicate", "shard")
        return init_device_mesh(device_type, (machines, GPUS_PER_MACHINE), mesh_dim_names=names)
    return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
