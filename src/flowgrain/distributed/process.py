"""What a process of ours does for itself before it works: memory that stays, and libraries that keep quiet."""

import ctypes
import logging
import os
import sys
import warnings

import torch


def keep_memory() -> None:
    """Tells glibc not to give memory back between steps: page faults cost several times the step where they are slow."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            trim_threshold, top_pad, mmap_max = -1, -2, -4  # numbers of <malloc.h>
            libc.mallopt(trim_threshold, 2**31 - 1)
            libc.mallopt(top_pad, 2**26)
            libc.mallopt(mmap_max, 0)
        except (OSError, AttributeError):
            pass


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int) -> None:
    """The threads of this process: `count`, or for 0 its share of the machine's cores, where torchrun has started several.

    torchrun gives each of them one (OMP_NUM_THREADS=1); a larger number that the user has set there stays. Alone a process keeps
    torch's choice.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if count or (processes > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1"):
        torch.set_num_threads(count or max(1, cores() // processes))


def quieten() -> None:
    """Model libraries' notes on loading small configs are not for this command's user."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
