"""The runs and evaluations in the given directories, and which of them have changed."""

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from flowgrain.records.run_lock import HOLDER
from flowgrain.view.readable import Missing, Outside

T = TypeVar("T")
Kind = Literal["run", "evaluation"]

REFRESH_SECONDS = 1.0
"""Files are checked at most this often."""
MAX_DEPTH = 5
"""Levels of directories that are searched below a given directory."""
MAX_FOLDERS = 20_000
"""Directories that are searched at most."""
_MARKS: dict[str, Kind] = {"run.yaml": "run", "evaluation.yaml": "evaluation"}
"""Files that make a directory a run or an evaluation."""
_WATCHED = (
    *("run.yaml", "evaluation.yaml", "metrics.jsonl", "alarms.jsonl", "calibration.json"),
    *("best.json", HOLDER, "evaluations", "groups", "arena/votes.jsonl", "scores", "images"),
)
"""Files and directories whose times show a change. A new file changes the time of its directory."""
_IN_URLS = ("groups", "evaluations", "metrics")
"""Words that follow an id in an address. An id does not end with them."""
_ID_LENGTH = 200

Stamp = tuple[tuple[int, int, int] | None, ...]
"""Time, size and number of every watched file."""


class Entry:
    """The directory of a run or of an evaluation.

    Attributes:
        id: its name in addresses.
        kind: "run" or "evaluation".
        folder: the directory.
        version: number of the last change, among the changes of all directories.
        state: objects that outlive a change, such as a partly read file.
    """

    def __init__(self, name: str, kind: Kind, folder: Path, root: Path) -> None:
        self.id, self.kind, self.folder, self.version = name, kind, folder, 0
        self.state: dict[str, Any] = {}
        self._root = _real(root)
        self._stamp: Stamp = ()
        self._results: dict[Any, tuple[Any, Any]] = {}
        self._lock = threading.RLock()

    def check(self) -> bool:
        """Whether a watched file has changed since the last call.

        Raises:
            Outside: a watched file is a link that leads out of the given directory.
        """
        stamp = tuple(self._stamp_of(name) for name in _WATCHED)
        if self.kind == "evaluation" and self.has("scores"):
            models = sorted(os.listdir(self.file("scores")))  # a new chunk changes its directory
            stamp += tuple(_stamp(os.lstat(self.folder / "scores" / name)) for name in models)
        changed, self._stamp = stamp != self._stamp, stamp
        return changed

    def has(self, *parts: str) -> bool:
        """Whether a file of the directory exists."""
        return self.folder.joinpath(*parts).exists()

    def file(self, *parts: str) -> Path:
        """The path of a file of the directory.

        Raises:
            Outside: a link leads out of the given directory.
        """
        path = self.folder.joinpath(*parts)
        if not _real(path).is_relative_to(self._root):
            raise Outside(f"{path}: a symbolic link that leads out of {self._root}")
        return path

    def cached(self, key: Any, compute: Callable[[], T], stamp: Any = None) -> T:
        """The result of `compute`, which is kept until the directory changes.

        Args:
            key: name of the result.
            compute: computes it.
            stamp: what the result depends on. Default: all watched files.
        """
        with self._lock:
            stamp = self._stamp if stamp is None else stamp
            known = self._results.get(key)
            if known is None or known[0] != stamp:
                known = self._results[key] = (stamp, compute())
            result: T = known[1]
            return result

    def of_file(self, key: Any, path: Path, read: Callable[[Path], T]) -> T:
        """What `read` returns for a file, which is kept until the file changes."""
        return self.cached(key, lambda: read(path), _stamp(path.stat()))

    def _stamp_of(self, name: str) -> tuple[int, int, int] | None:
        path = self.folder / name
        try:
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                found = os.stat(self.file(name))
        except (OSError, ValueError):
            return None
        return _stamp(found)


class Catalog:
    """All runs and evaluations below `roots`.

    Methods may be called from several threads.

    Args:
        roots: directories of runs, or directories that contain them.

    Attributes:
        problems: what was left out, and why.
        version: number of changes so far.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = list(roots)
        self.problems: list[str] = []
        self.version = 0
        self._ids: dict[Path, str] = {}
        self._entries: dict[str, Entry] = {}
        self._changed: dict[str, int] = {}
        self._checked = -REFRESH_SECONDS
        self._lock = threading.Lock()

    def entries(self, kind: Kind) -> list[Entry]:
        """The runs or the evaluations in the order of their ids."""
        self.refresh()
        return [entry for entry in self._entries.values() if entry.kind == kind]

    def entry(self, name: str, kind: Kind) -> Entry:
        """The run or evaluation with the id `name`.

        Raises:
            Missing: there is none.
        """
        self.refresh()
        entry = self._entries.get(name)
        if entry is None or entry.kind != kind:
            raise Missing(f"There is no {kind} {name!r}.")
        return entry

    def changed_since(self, version: int) -> list[str]:
        """The ids of all directories that appeared, changed or disappeared after `version`."""
        with self._lock:
            return [name for name, changed in self._changed.items() if changed > version]

    def refresh(self) -> None:
        """Look for changes, at most once a second."""
        with self._lock:
            if time.monotonic() - self._checked < REFRESH_SECONDS:
                return
            problems: list[str] = []
            found: dict[str, Entry] = {}
            for root in self.roots:
                for folder, kind in _search(root, problems):
                    self._check(folder, kind, root, found, problems)
            for name in self._entries.keys() - found.keys():
                self._mark(name)
            self._entries = dict(sorted(found.items()))
            self.problems = problems
            self._checked = time.monotonic()

    def _check(
        self, folder: Path, kind: Kind, root: Path, found: dict[str, Entry], problems: list[str]
    ) -> None:
        """Add the directory to `found`, and note whether it has changed."""
        name = self._id(folder, root)
        entry = self._entries.get(name)
        if name in found:  # below two of the given directories
            return
        if entry is None or entry.kind != kind:
            entry = Entry(name, kind, folder, root)
        try:
            if entry.check():
                entry.version = self._mark(name)
        except Outside as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{folder}: cannot be read ({error.strerror})")
        else:
            found[name] = entry

    def _mark(self, name: str) -> int:
        self.version += 1
        self._changed[name] = self.version
        return self.version

    def _id(self, folder: Path, root: Path) -> str:
        """The id of a directory. It never changes while the server runs."""
        path = _real(folder)
        if path not in self._ids:
            wanted, taken = _short_name(folder, root), set(self._ids.values())
            name, number = wanted, 2
            while name in taken:
                name, number = f"{wanted}-{number}", number + 1
            self._ids[path] = name
        return self._ids[path]


def _search(root: Path, problems: list[str]) -> Iterator[tuple[Path, Kind]]:
    """The directories of runs and evaluations below `root`. They are not searched themselves."""
    queue, searched = [(root, 0)], 0
    for folder, depth in queue:
        searched += 1
        if searched > MAX_FOLDERS:
            problems.append(f"{root}: only the first {MAX_FOLDERS:,} directories were searched")
            return
        try:
            with os.scandir(folder) as content:
                children = sorted(content, key=lambda child: child.name)
        except OSError as error:
            problems.append(f"{folder}: cannot be read ({error.strerror})")
            continue
        kind = next((_MARKS[child.name] for child in children if child.name in _MARKS), None)
        if kind is not None:
            yield folder, kind
            continue
        for child in children:
            if child.name.startswith(".") or depth >= MAX_DEPTH:
                continue
            if child.is_symlink():
                target = _real(Path(child.path))
                if target.is_dir() and not target.is_relative_to(_real(root)):
                    problems.append(
                        f"{child.path}: a symbolic link that leads out of {root}. "
                        "Give its target as another directory"
                    )
            elif child.is_dir():
                queue.append((Path(child.path), depth + 1))


def _short_name(folder: Path, root: Path) -> str:
    """The path below `root`, without the directories runs/ of comparisons."""
    parts = [part for part in folder.relative_to(root).parts if part != "runs"]
    name = "/".join(parts) or _real(folder).name or "run"
    name = "".join(letter if letter.isprintable() else "_" for letter in name)[-_ID_LENGTH:]
    return f"{name}_" if name.rsplit("/", 1)[-1] in _IN_URLS else name


def _real(path: Path) -> Path:
    """The path without links. A loop of links stays as it is; `Path.resolve` may raise for it."""
    return Path(os.path.realpath(path))


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_mtime_ns, found.st_size, found.st_ino
