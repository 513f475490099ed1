"""A run that torchrun restarts: it resumes by itself, unless its error would repeat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flowgrain.distributed.elastic import (
    attempt,
    forget_error,
    is_of_this_job,
    last_error,
    record_error,
    write_job,
)
from flowgrain.settings import SettingsError
from flowgrain.training.checkpoint import CheckpointError
from flowgrain.training.errors import Interrupted, RunStopped
from flowgrain.training.signals import signal_arrived

if TYPE_CHECKING:
    from flowgrain.training.trainer import Trainer

JOB = ".job.json"
"""File of a run's directory with the torchrun job that trains in it."""
LOCK_SECONDS = 60.0
"""Longest wait for processes of the same job to end."""


def remember_job(folder: Path) -> None:
    """Record that the torchrun job of this process trains in `folder`."""
    write_job(folder / JOB)


def belongs_to_job(folder: Path) -> bool:
    """Whether the torchrun job of this process has trained in `folder`."""
    return is_of_this_job(folder / JOB)


def resume_after_restart(trainer: Trainer) -> list[str] | None:
    """Resume the run if this torchrun job has already started it. All ranks must call it.

    A run without a checkpoint starts from the beginning.

    Returns:
        Messages of `Trainer.resume`. None: the run is new.

    Raises:
        SettingsError: see `Trainer.resume`.
    """
    if not trainer.world.on_main(partial(belongs_to_job, trainer.out)):
        return None
    return trainer.resume()


@contextmanager
def no_restart_after_permanent_errors() -> Iterator[None]:
    """Record an error that a restart by torchrun would repeat, and raise it at once in a restart.

    torchrun restarts a job after every error. Errors of settings and errors that end a run would
    repeat. Other errors, such as a lost connection or a killed process, may not.

    Raises:
        SettingsError, RunStopped: the error of the attempt before.
    """
    _raise_last()
    try:
        yield
    except (SettingsError, RunStopped, CheckpointError) as error:
        if _repeats(error):
            record_error(type(error).__name__, str(error))
        raise


def _repeats(error: Exception) -> bool:
    """Whether a restart would repeat an error, or would ignore a signal of the user."""
    if isinstance(error, Interrupted):
        return signal_arrived()  # a signal to another machine stops this one, too
    return not _lost_connection(error)


def _lost_connection(error: BaseException | None) -> bool:
    """Whether the error, or an error that led to it, is that of a connection."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _raise_last() -> None:
    error, number = last_error(), attempt()
    if error is None:
        return
    if error.kind == Interrupted.__name__ and error.attempt == number:
        # torchrun sent the signal itself, because a machine joined or left.
        forget_error()
        return
    kinds: dict[str, type[SettingsError | RunStopped]] = {
        "SettingsError": SettingsError,
        Interrupted.__name__: Interrupted,
    }
    message = error.message.removesuffix(".")
    raise kinds.get(error.kind, RunStopped)(
        f"{message}. Restart {number} by torchrun ended at once, because this error would repeat."
    )
