"""The entry point: runs a command and turns errors into a message and an exit status."""

import warnings

# In the order of the help.
from flowgrain.cli import compare, config, evaluate, plan, report, serve, train  # noqa: F401
from flowgrain.cli.app import app, err
from flowgrain.heap import retain_freed_memory
from flowgrain.settings import SettingsError, SettingsWarning

USAGE, FAILURE, INTERRUPTED = 2, 1, 130
"""Exit statuses: a setting cannot be used, a run failed, a run was interrupted."""


def main() -> None:
    """Run the command line. An error of the user or of a run is one message without a traceback."""
    retain_freed_memory()
    # `config_from` prints them, also for commands that only plan.
    warnings.simplefilter("ignore", SettingsWarning)
    try:
        app()
    except SettingsError as error:
        _fail(str(error), USAGE)
    except RuntimeError as error:
        from flowgrain.training import Interrupted, RunStopped
        from flowgrain.training.checkpoint import CheckpointError

        if not isinstance(error, RunStopped | CheckpointError):
            raise
        _fail(str(error), INTERRUPTED if isinstance(error, Interrupted) else FAILURE)


def _fail(message: str, status: int) -> None:
    err.print("error:", style="bold red", end=" ")
    err.print(message, markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(status)
