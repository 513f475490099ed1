"""Worker processes. After a signal, every worker saves its run and ends."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import TypeVar

from flowgrain.training import Interrupted, RunStopped
from flowgrain.training.rollout_batch import Metrics

J = TypeVar("J")
R = TypeVar("R")

PRELOAD = ["flowgrain.studies.run", "flowgrain.models.shapes", "diffusers.training_utils"]
"""Slow imports that the fork server does once for all workers."""
_POLL_SECONDS = 0.5


def run_all(
    work: Callable[[J], R], pending: Sequence[J], jobs: int, note: Callable[[R], None]
) -> None:
    """Do all `pending` work, in this process or in `jobs` worker processes.

    Args:
        work: a module-level function.
        pending: its arguments.
        jobs: number of processes. 1: this process.
        note: called with every result.

    Raises:
        Interrupted: a signal arrived, in this process.
        KeyboardInterrupt: a signal arrived, and all workers have saved their work and ended.
        RunStopped: a worker process died.
    """
    if jobs == 1:
        for job in pending:
            note(work(job))
        return
    context = multiprocessing.get_context("forkserver")  # a fork would break torch's threads
    context.set_forkserver_preload(PRELOAD)
    stop = context.Event()
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start_worker, initargs=(stop,)
    )
    with _signals_set(stop), pool:
        queue, running = list(pending), set[concurrent.futures.Future[R]]()
        while (queue and not stop.is_set()) or running:
            while queue and len(running) < jobs and not stop.is_set():
                running.add(pool.submit(work, queue.pop(0)))
            finished, running = concurrent.futures.wait(
                running, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                _collect(future, stop, note)
        if stop.is_set():
            raise KeyboardInterrupt


def _collect(future: concurrent.futures.Future[R], stop: Event, note: Callable[[R], None]) -> None:
    """Record the result of a worker. Any exception stops all workers."""
    try:
        note(future.result())
    except Interrupted:
        stop.set()
    except concurrent.futures.BrokenExecutor as error:
        raise RunStopped(
            f"a worker process died ({error}). Run the same command to continue."
        ) from error
    except BaseException:
        stop.set()
        raise


@contextlib.contextmanager
def _signals_set(stop: Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop` inside this context."""

    def handle(*_: object) -> None:
        stop.set()

    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class _Worker:
    """A worker process: the event that stops it, and the process that started it."""

    stop: Event
    parent: int


_worker: _Worker | None = None


def _start_worker(stop: Event) -> None:
    global _worker
    _worker = _Worker(stop, os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes; the parent decides


def stop_check() -> Callable[[Metrics], None]:
    """A progress function for `Trainer.train`.

    In a worker, it stops the run after the current step if the comparison stops, or if the process
    that started the worker has ended.
    """
    requested = False

    def check(_metrics: Metrics) -> None:
        nonlocal requested
        if requested or _worker is None:
            return
        if _worker.stop.is_set() or os.getppid() != _worker.parent:
            requested = True  # a second signal would end the process before it has saved
            os.kill(os.getpid(), signal.SIGTERM)

    return check
