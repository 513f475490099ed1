"""Errors that end a run."""

from flowgrain.distributed import World


class RunStopped(RuntimeError):
    """The run cannot continue. The message gives the reason and the command that resumes it."""


class Diverged(RunStopped):
    """Too many updates had a non-finite loss or gradient, or weights or images are not finite."""


class Interrupted(RunStopped):
    """SIGINT or SIGTERM arrived. The run is saved. The message names the last finished step."""


class StoppedByAlarm(RunStopped):
    """A monitor raised an alarm, and watch.action is stop. The run is saved."""


def stop_all(world: World, failure: str | None) -> None:
    """Stop all ranks if any of them has a failure. All ranks must call it together.

    A rank that raises alone leaves the others waiting in their next collective.

    Args:
        world: ranks.
        failure: why this rank cannot continue, or None.

    Raises:
        RunStopped: with the first failure, on all ranks.
    """
    failures = [text for text in world.gather(failure) if text is not None]
    if failures:
        raise RunStopped(failures[0])
