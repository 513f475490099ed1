"""Number of CPU threads of a process."""

import os
import sys

import torch

from flowgrain.distributed.world import local_world_size


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def set_threads(count: int) -> None:
    """Use `count` CPU threads.

    With `count` 0, a single process keeps torch's default. Several processes divide the cores of
    the machine equally, unless OMP_NUM_THREADS is above 1. torchrun sets it to 1 by default.
    """
    processes = local_world_size()
    unset = os.environ.get("OMP_NUM_THREADS", "1") == "1"
    if count or (processes > 1 and unset):
        torch.set_num_threads(count or max(1, available_cores() // processes))
