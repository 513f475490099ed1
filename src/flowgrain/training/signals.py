"""Signals that stop a run after its current step: SIGINT and SIGTERM."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopSignal:
    """Records the first SIGINT or SIGTERM in `number`. A second signal has its default effect."""

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Record signals inside this context. Has no effect outside of the main thread."""
        self.number = None
        previous: dict[int, Any] = {}

        def remember(number: int, _frame: FrameType | None) -> None:
            self.number = number
            for signal_number, handler in previous.items():
                signal.signal(signal_number, handler)

        try:
            for stop in (signal.SIGINT, signal.SIGTERM):
                previous[stop] = signal.signal(stop, remember)
        except ValueError:  # not the main thread
            pass
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
