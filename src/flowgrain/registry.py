"""Registries of methods, rewards and backbones, and plugin files that extend them."""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from flowgrain.settings import SettingsError, did_you_mean

T = TypeVar("T")


def canonical(name: str) -> str:
    """`name` in lower case without separators.

    DanceGRPO, dance-grpo and dance_grpo are the same name.
    """
    return re.sub(r"[-_ ]", "", name.lower())


class Registry(Generic[T]):
    """Objects of one kind, by name.

    An object is a built-in "module:attribute", an entry point of an installed package, or added by
    the decorator `register`. Built-in objects and entry points are imported on first use.

    Args:
        kind: kind of the objects, for error messages ("method").
        entry_point_group: entry-point group in which other packages publish objects
            ("flowgrain.methods").
        built_in: "module:attribute" of the built-in objects, by name.
    """

    def __init__(
        self, kind: str, entry_point_group: str, built_in: Mapping[str, str] | None = None
    ) -> None:
        self.kind, self.entry_point_group = kind, entry_point_group
        self._built_in = dict(built_in or {})
        self._objects: dict[str, T] = {}
        self._entry_points: dict[str, importlib.metadata.EntryPoint] | None = None

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an object under `name`.

        A module may register the same name again, which replaces its own object.

        Raises:
            SettingsError: `name` belongs to a built-in object, or to an object of another module.
        """

        def add(thing: T) -> T:
            taken = (
                k for k in (*self._built_in, *self._objects) if canonical(k) == canonical(name)
            )
            spelling = next(taken, None)
            known = self._objects.get(spelling) if spelling is not None else None
            replaces_itself = (
                spelling == name and known is not None and _module_of(known) == _module_of(thing)
            )
            if spelling is not None and not replaces_itself:
                raise SettingsError(
                    f"A {self.kind} named {spelling!r} already exists. "
                    f"Choose another name than {name!r}."
                )
            self._objects[name] = thing
            return thing

        return add

    def get(self, name: str) -> T:
        """The object registered as `name`. Case and separators of `name` do not matter.

        Raises:
            SettingsError: there is no such object, or it cannot be imported. The message contains
                the nearest known name.
        """
        found = self.find(name)
        if found is None:
            raise SettingsError(f"There is no {self.kind} {name!r}. {did_you_mean(name, self)}")
        if found not in self._objects:
            try:
                if found in self._built_in:
                    module, _, attribute = self._built_in[found].partition(":")
                    self._objects[found] = getattr(importlib.import_module(module), attribute)
                else:
                    self._objects[found] = self._published()[found].load()
            except (Exception, SystemExit) as error:  # code of another package
                raise SettingsError(
                    f"{self.kind} {found!r} cannot be imported: {error}."
                ) from error
        return self._objects[found]

    def find(self, name: str) -> str | None:
        """The registered spelling of `name`. None if there is no such object."""
        return next((known for known in self if canonical(known) == canonical(name)), None)

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self._built_in, *self._objects, *self._published()])

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) is not None

    def _published(self) -> dict[str, importlib.metadata.EntryPoint]:
        if self._entry_points is None:
            found = importlib.metadata.entry_points(group=self.entry_point_group)
            self._entry_points = {entry.name: entry for entry in found}
        return self._entry_points


def _module_of(thing: Any) -> str | None:
    """Name of the module that defines `thing`."""
    return getattr(thing, "__module__", None)


def load_plugin(path: str | Path) -> None:
    """Run a Python file that registers methods, rewards or backbones.

    Loading the same file again has no effect.

    Raises:
        SettingsError: the file does not exist, is not a Python file, or raises an error.
    """
    file = Path(path).expanduser().resolve()
    if not os.path.isfile(file):  # False also for a name that is too long
        raise SettingsError(
            f"plugin {path}: there is no such file. Give the path of a Python file."
        )
    name = f"flowgrain_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}_{file.stem}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise SettingsError(f"plugin {path}: not a Python file. Its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        fix, reason = (
            ". Install it." if isinstance(error, ModuleNotFoundError) else "",
            describe(error),
        )
        shown = file.name if f"({file}, line " in reason else path  # the reason has the full path
        raise SettingsError(f"plugin {shown}: {reason}{fix}") from error


def describe(error: BaseException) -> str:
    """Type and message of an exception, with the file and line of the user's code that raised it.

    The user's code is the innermost frame outside of this package, of installed packages and of
    the standard library.
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_NOT_USER_CODE)]
    return f"{text} ({own[-1].filename}, line {own[-1].lineno})" if own else text


_NOT_USER_CODE = (
    str(Path(__file__).parent) + os.sep,
    "<",
    *{sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "purelib", "platlib")},
)
"""Beginnings of the names of files that are not the user's."""
