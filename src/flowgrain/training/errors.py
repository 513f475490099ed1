"""Errors that end a run."""


class RunStopped(RuntimeError):
    """The run cannot continue. The message gives the reason and the command that resumes it."""


class Diverged(RunStopped):
    """Too many updates had a non-finite loss or gradient, or weights or images are not finite."""


class Interrupted(RunStopped):
    """SIGINT or SIGTERM arrived. The run is saved. The message names the last finished step."""


class StoppedByAlarm(RunStopped):
    """A monitor raised an alarm, and watch.action is stop. The run is saved."""
