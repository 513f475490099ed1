"""Signals that stop a run: SIGINT and SIGTERM.

A step that has not changed a parameter yet can be abandoned: the resumed run repeats it exactly. A
signal therefore ends the work of a step at the next of these places:

- `check_stop`, between two model calls,
- `interruptible`, around rewards, which may wait for a server: at once,
- `stop_together`, where all ranks meet. A single rank cannot leave the others.

After the first update of a step, the step is finished. A checkpoint is always written to its end.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from flowgrain.distributed import World

T = TypeVar("T")

_SAME_SECONDS = 0.2
"""A signal this soon after the first is the same: torchrun repeats a Ctrl+C to its ranks."""
_UNWIND_SECONDS = 1.5
"""After a second SIGINT, KeyboardInterrupt has this time to end the run."""

STOPPING = (
    "stopping. A step without an update is abandoned, otherwise it is finished. Then the run is "
    "saved. Repeat the signal to stop at once."
)


class StopRequested(BaseException):
    """A signal arrived while the step could be abandoned.

    It is no Exception, so that a reward that catches every Exception does not catch it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignal:
    """Records the first SIGINT or SIGTERM in `number`. The second ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.raising = False
        self._kept: Callable[[], str] | None = None
        self._first = 0.0
        self._lock = threading.RLock()
        self._ended = threading.Event()

    @contextmanager
    def listen(self, kept: Callable[[], str] | None = None) -> Iterator[None]:
        """Handle signals inside this context. Has no effect outside of the main thread.

        A thread writes the messages, because the main thread may wait for a device or other ranks.

        Args:
            kept: returns what is kept if the process ends at once. None: this rank writes no
                messages.
        """
        global _listening
        self.number, self._kept, self._first = None, kept, 0.0
        self._ended.clear()
        previous: dict[int, Any] = {}
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        wakeup: int | None = None
        try:
            for stop in (signal.SIGINT, signal.SIGTERM):
                previous[stop] = signal.signal(stop, self._handle)
            wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        except ValueError:  # not the main thread
            pass
        _listening = self
        try:
            yield
        finally:
            _listening = None
            self._ended.set()
            for number, handler in previous.items():
                signal.signal(number, handler)
            if wakeup is not None:
                signal.set_wakeup_fd(wakeup)
            writer.close()  # ends the thread
            if wakeup is None:
                reader.close()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._is_first(number):
            if self.raising:
                self.raising = False
                raise StopRequested(number)
        elif time.monotonic() - self._first > _SAME_SECONDS:
            self._end(number)

    def _is_first(self, number: int) -> bool:
        """Whether this is the first signal. The handler and the thread see every signal."""
        with self._lock:
            if self.number is not None:
                return False
            self.number, self._first = number, time.monotonic()
        _arrived.set()
        return True

    def _watch(self, reader: socket.socket) -> None:
        """Write a message for the first signal, and end the process after the second."""
        # The handler runs late if the main thread is in a C call, so its time is not used here.
        first: float | None = None
        with reader:
            while data := reader.recv(1):
                number = data[0]
                if number not in (signal.SIGINT, signal.SIGTERM):
                    continue
                if first is None:
                    first = time.monotonic()
                    self._say(f"{signal.Signals(number).name}: {STOPPING}")
                elif time.monotonic() - first > _SAME_SECONDS:
                    if number == signal.SIGINT and self._ended.wait(_UNWIND_SECONDS):
                        return
                    self._end(number)

    def _end(self, number: int) -> None:
        """Say what is kept, then end the process: by KeyboardInterrupt after SIGINT."""
        with self._lock:
            if self._kept is not None:
                self._say(f"{signal.Signals(number).name} again: stopped at once. {self._kept()}")
            self._kept = None
            if number == signal.SIGINT and threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            os._exit(128 + number)

    def _say(self, text: str) -> None:
        if self._kept is not None:
            os.write(2, f"\n{text}\n".encode(errors="replace"))  # sys.stderr may be locked


_listening: StopSignal | None = None
"""Handlers of signals belong to the process, and so does this."""


_arrived = threading.Event()


def signal_arrived() -> bool:
    """Whether SIGINT or SIGTERM arrived at this process while a run listened."""
    return _arrived.is_set()


def check_stop(world: World) -> None:
    """Abandon the step if a signal arrived. Several ranks stop in `stop_together`.

    Raises:
        StopRequested: a signal arrived.
    """
    if _listening is not None and _listening.number is not None and world.size == 1:
        raise StopRequested(_listening.number)


def interruptible(world: World, work: Callable[[], T]) -> T | None:
    """The result of `work`, which a signal ends at once. `work` must not change the run.

    Returns None if a signal arrived and there are several ranks: `stop_together` must follow.

    Raises:
        StopRequested: a signal arrived, and there is one rank.
    """
    stop = _listening
    if stop is None:
        return work()
    try:
        stop.raising = True
        if stop.number is not None:
            raise StopRequested(stop.number)
        return work()
    except StopRequested:
        if world.size == 1:
            raise
        return None
    finally:
        stop.raising = False


def stop_together(world: World) -> None:
    """Abandon the step on all ranks if a signal arrived on any rank. All ranks must call it.

    Raises:
        StopRequested: a signal arrived.
    """
    own = None if _listening is None else _listening.number
    number = next((n for n in world.gather(own) if n is not None), None)
    if number is not None:
        raise StopRequested(number)
