"""Threads of rewards that never keep the process alive."""

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
V = TypeVar("V")


class Workers:
    """A thread pool like `ThreadPoolExecutor`, with daemon threads.

    At the end of the process Python waits for the threads of a `ThreadPoolExecutor`. A reward that
    hangs would keep the process alive.

    Args:
        count: number of threads.
    """

    def __init__(self, count: int) -> None:
        self.calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Call `function` in a thread, after the calls before it."""
        future: Future[T] = Future()
        self.calls.put((future, lambda: function(*arguments)))
        return future

    def close(self, wait: bool) -> None:
        """End the threads after the submitted calls, or discard the calls that did not start.

        Args:
            wait: run all submitted calls and wait for the end of the threads.
        """
        while not wait:
            try:
                self.calls.get_nowait()
            except queue.Empty:
                break
        for _ in self.threads:
            self.calls.put(None)
        for thread in self.threads if wait else ():
            thread.join()

    def _work(self) -> None:
        while (call := self.calls.get()) is not None:
            future, function = call
            try:
                future.set_result(function())
            except BaseException as error:  # raised again by future.result()
                future.set_exception(error)


def map_in_threads(function: Callable[[V], T], values: Iterable[V], count: int) -> list[T]:
    """`function` of each value, in `count` threads. One thread: in the thread of the caller.

    After an exception it does not wait for the threads.
    """
    if count == 1:
        return [function(value) for value in values]
    workers, finished = Workers(count), False
    try:
        futures = [workers.submit(function, value) for value in values]
        results = [future.result() for future in futures]
        finished = True
    finally:
        workers.close(wait=finished)
    return results
