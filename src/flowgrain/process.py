"""What a process of ours does for itself before it works: memory that stays, and libraries that keep quiet."""

import ctypes
import logging
import sys
import warnings


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
