"""The entry point: runs a command and turns errors into a message and an exit status."""

import logging
import re
import sys
import traceback
import warnings
from pathlib import Path

# isort: off
# In the order of the help.
from flowgrain.cli import train, plan, rehearse, evaluate, export  # noqa: F401
from flowgrain.cli import compare, report, view, config, serve, bench  # noqa: F401

# isort: on
from flowgrain.cli.app import DEBUG, app, debugging, err, note
from flowgrain.heap import retain_freed_memory
from flowgrain.registry import describe
from flowgrain.settings import SettingsError, SettingsWarning, one_line

USAGE, FAILURE, INTERRUPTED = 2, 1, 130
"""Exit statuses: a setting cannot be used, a run failed, a run was interrupted."""
_SETTING = re.compile(r"--?[a-z_]+\.[\w.]+")
"""A setting with dashes. Settings have none."""


def main() -> None:
    """Run the command line. An error is one message, with its traceback only with `--debug`.

    `--debug` may stand anywhere on the command line.
    """
    retain_freed_memory()
    _show_log()
    # `config_from` prints them, also for commands that only plan.
    warnings.simplefilter("ignore", SettingsWarning)
    words = [word for word in sys.argv[1:] if word != DEBUG]
    try:
        _check_words(words)
        app(words, prog_name="flowgrain")
    except Exception as error:
        if debugging():
            traceback.print_exc(file=sys.stderr)
        message, status = _message(error)
        _fail(message, status)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except SystemExit as error:
        reason = describe(error)
        if not reason.endswith(")"):  # raised by typer, not in a file of the user
            raise
        _fail(f"{reason}. Raise an error instead of ending the process.", FAILURE)


class _Warnings(logging.Handler):
    """Prints log messages like the warnings about settings."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        note(f"{record.levelname.lower()}: {record.getMessage()}", style="yellow")


def _show_log() -> None:
    """Print warnings of this package to stderr."""
    log = logging.getLogger("flowgrain")
    if not any(isinstance(handler, _Warnings) for handler in log.handlers):
        log.addHandler(_Warnings(logging.WARNING))


def _check_words(words: list[str]) -> None:
    """Check for empty words and for settings with dashes. Typer would read '' as the directory ".".

    Raises:
        SettingsError: a word is empty, or a setting has dashes.
    """
    for before, word in zip(["", *words], words, strict=False):
        option, equals, value = word.partition("=") if word.strip() else (before, "=", "")
        if not word.strip() and not option.startswith("--"):
            raise SettingsError("'': an empty word. Write a name or a path, or remove it.")
        if equals and not value.strip() and option.startswith("--") and option != "--prompt":
            raise SettingsError(f"{option}='': is empty. Give a value, or remove {option}.")
        if _SETTING.fullmatch(option) and option is not before:
            value = value if equals else "VALUE"
            raise SettingsError(f"{word}: write {option.lstrip('-')}={value} without dashes.")


def _message(error: Exception) -> tuple[str, int]:
    """What to print for an error, and the exit status."""
    if isinstance(error, SettingsError):
        return str(error), USAGE
    from flowgrain.training import Interrupted, RunStopped
    from flowgrain.training.checkpoint import CheckpointError

    if isinstance(error, RunStopped | CheckpointError):
        return str(error), INTERRUPTED if isinstance(error, Interrupted) else FAILURE
    if isinstance(error, OSError) and error.filename is not None:
        names = " to ".join(str(name) for name in (error.filename, error.filename2) if name)
        reason = error.strerror or type(error).__name__
        return f"{names}: {reason}. Check this path, or use --debug to see the traceback.", FAILURE
    text = one_line(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    return (
        f"{type(error).__name__}: {text} ({place}). Use --debug to see the traceback.",
        FAILURE,
    )


def _fail(message: str, status: int) -> None:
    """Print the message and exit. An interruption is not an error."""
    if status != INTERRUPTED:
        err.print("error:", style="bold red", end=" ")
    err.print(message, markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(status)
