"""A process group of this process alone, to test a backend on a machine with one GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import init_device_mesh

from flowgrain.distributed.world import World, destroy_process_group

_TIMEOUT = timedelta(minutes=2)


@contextmanager
def one_rank(device: torch.device) -> Iterator[World]:
    """A world of size 1 with a process group and a mesh, as torchrun initializes several ranks.

    `init_process_group` leaves them out for a single process. With them, collectives run through
    NCCL on a GPU and through gloo on a CPU, and `shard` shards.
    """
    store = TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=_TIMEOUT)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=_TIMEOUT)
    try:
        yield World(0, 1, init_device_mesh(device.type, (1,), mesh_dim_names=("shard",)))
    finally:
        destroy_process_group()
