"""A store for the process group of one attempt of a torchrun job.

torchrun shares its store with the ranks, and keeps it when it restarts them. Ranks would then find
the addresses of processes that have ended: https://github.com/pytorch/pytorch/issues/135712.
"""

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

_POLL_SECONDS = 0.02


def attempt_store(rank: int, size: int, timeout: timedelta) -> Store | None:
    """The store of torchrun, without the keys of earlier attempts.

    Returns:
        The store. None: torchrun does not share its store, so that every attempt has a new one.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, size, is_master=False, timeout=timeout)
    return PrefixStore(agree_on_name(store, rank, size), store)


def agree_on_name(store: Store, rank: int, size: int) -> str:
    """A random name that is the same on all ranks of this attempt.

    No environment variable of torchrun counts attempts for all machines together. Every rank writes
    a random number. Rank 0 replies to it with the name, until the rank confirms the reply. Keys of
    earlier attempts have no effect, because their random numbers differ.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"flowgrain/request/{rank}", own)
        name = store.get(f"flowgrain/reply/{own}").decode()
        store.set(f"flowgrain/confirmed/{name}/{rank}", "yes")
        return name
    waiting = set(range(1, size))
    while waiting:
        for other in sorted(waiting):
            if store.check([f"flowgrain/request/{other}"]):
                number = store.get(f"flowgrain/request/{other}").decode()
                store.set(f"flowgrain/reply/{number}", own)
            if store.check([f"flowgrain/confirmed/{own}/{other}"]):
                waiting.discard(other)
        time.sleep(_POLL_SECONDS)
    return own
