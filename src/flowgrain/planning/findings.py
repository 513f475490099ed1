"""Results of checks, and checks that may raise an error."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from flowgrain.settings import SettingsError

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        name: what was checked.
        ok: whether the run can start.
        message: what was found, and the fix if `ok` is false.
    """

    name: str
    ok: bool
    message: str


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """The finding of a check, and its result. The result is None if the check raised an error."""

    finding: Finding
    result: T | None


def attempt(name: str, check: Callable[[], T], describe: Callable[[T], str]) -> Attempt[T]:
    """Run a check that returns a result or raises an error. `describe` makes text of a result."""
    try:
        result = check()
    except SettingsError as error:
        return Attempt(Finding(name, False, str(error)), None)
    except Exception as error:  # a check runs code of models and rewards, which may raise anything
        return Attempt(Finding(name, False, f"{type(error).__name__}: {error}"), None)
    return Attempt(Finding(name, True, describe(result)), result)
