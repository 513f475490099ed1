"""The memory of a device over time, by kind.

Every allocation and release is an event. What an allocation was for is often known only later, so
that kinds are looked up when the peak is computed.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flowgrain.distributed.sharding import local_tensor

_BLOCK = 512
"""The allocator of CUDA rounds up to this many bytes."""
OTHER = "activations"
"""Kind of an allocation that has no other kind: activations, gradients of them, workspaces."""


@dataclass(frozen=True)
class Peak:
    """Bytes by kind at the moment when a phase needs most memory."""

    kinds: dict[str, float]

    @property
    def total(self) -> float:
        """All kinds."""
        return sum(self.kinds.values())


class Ledger:
    """Allocations of one device.

    Attributes:
        phase: name of what is running.
    """

    def __init__(self) -> None:
        self.phase = "start"
        self._events: list[tuple[int, int, str]] = []  # number of the allocation, bytes, phase
        self._numbers: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._refs: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._kind: dict[int, str] = {}
        self._next = 0

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name what runs inside this context."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def add(self, tensor: Tensor) -> None:
        """Record the storage of `tensor`, unless it is known."""
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._refs.get(key)
        if known is not None and known() is storage:
            return
        self._refs[key] = weakref.ref(storage, partial(self._released, key))
        self._numbers[key] = self._next
        self._sizes[key] = 0
        self._next += 1
        self.resized(storage)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Record the new size of a known storage. FSDP2 frees and allocates like this."""
        key = id(storage)
        if key not in self._numbers:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        change = size - self._sizes[key]
        if change:
            self._sizes[key] = size
            self._events.append((self._numbers[key], change, self.phase))

    def tag(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Say what the storages of `tensors` are for."""
        for tensor in tensors:
            if tensor is None:
                continue
            number = self._numbers.get(id(local_tensor(tensor).untyped_storage()))
            if number is not None:
                self._kind.setdefault(number, kind)

    @property
    def position(self) -> int:
        """The number of events so far."""
        return len(self._events)

    def highest(self, since: int) -> list[tuple[int, int]]:
        """Number and bytes of allocations since event `since` that are held at their peak."""
        events = self._events[since:]
        if not events:
            return []
        totals = np.cumsum([size for _, size, _ in events])
        held: dict[int, int] = {}
        for number, size, _ in events[: int(totals.argmax()) + 1]:
            held[number] = held.get(number, 0) + size
        return [(number, size) for number, size in held.items() if size > 0]

    def repeat(self, held: list[tuple[int, int]]) -> None:
        """Record that allocations like those of `highest` were made and released once more."""
        self._events += [(number, size, self.phase) for number, size in held]
        self._events += [(number, -size, self.phase) for number, size in held]

    def peaks(self) -> Mapping[str, Peak]:
        """The peak of every phase."""
        if not self._events:
            return {}
        sizes = np.array([size for _, size, _ in self._events], dtype=np.int64)
        total = np.cumsum(sizes)
        names = sorted({self._kind.get(number, OTHER) for number, _, _ in self._events})
        place = {name: number for number, name in enumerate(names)}
        kind = np.array([place[self._kind.get(n, OTHER)] for n, _, _ in self._events])
        phase = np.array([phase for _, _, phase in self._events])
        found = {}
        for name in dict.fromkeys(phase.tolist()):
            inside = np.flatnonzero(phase == name)
            top = int(inside[total[inside].argmax()])
            by_kind = np.bincount(kind[: top + 1], sizes[: top + 1], minlength=len(names))
            found[name] = Peak(
                {name: float(size) for name, size in zip(names, by_kind, strict=True) if size > 0}
            )
        return found

    def _released(self, key: int, _: "weakref.ref[torch.UntypedStorage]") -> None:
        number, size = self._numbers.pop(key), self._sizes.pop(key)
        del self._refs[key]
        if size:
            self._events.append((number, -size, self.phase))
