"""CPU threads of a process."""

import os

import torch

from flowgrain.distributed.world import local_world_size


def available_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int) -> None:
    """Use `count` CPU threads. With 0, several processes share the cores of the machine equally.

    torchrun sets OMP_NUM_THREADS=1 for every process. A larger value that the user set stays. A
    single process keeps torch's default.
    """
    processes = local_world_size()
    unset = os.environ.get("OMP_NUM_THREADS", "1") == "1"
    if count or (processes > 1 and unset):
        torch.set_num_threads(count or max(1, available_cores() // processes))
