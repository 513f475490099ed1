"""What to do with damaged files: they are left out, with a note, and never stop the server."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class Missing(Exception):
    """There is no such run, step or image."""


class Outside(Exception):
    """A symbolic link leads out of the given directory."""


DAMAGED = (
    *(ValueError, TypeError, KeyError, AttributeError, IndexError, OSError, Outside),
    *(ArithmeticError, RecursionError),  # of a huge integer, and of deeply nested values
)
"""What reading a damaged file raises."""


def readable(
    damaged: list[str], read: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T | None:
    """The result of `read`. None for a damaged or missing file, with a note in `damaged`."""
    try:
        return read(*args, **kwargs)
    except (Missing, *DAMAGED) as error:
        damaged.append(reason(error))
        return None


def reason(error: Exception) -> str:
    """What is wrong with a file, in words."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or type(error).__name__}"
    if isinstance(error, KeyError):
        return f"{error.args[0] if error.args else 'a value'} is missing"
    return str(error) or type(error).__name__
