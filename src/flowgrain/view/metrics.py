"""The metrics of a run: columns that grow with metrics.jsonl, and what the list of runs shows.

Shapes: L lines, B buckets.
"""

import hashlib
import math
import os
import re
import stat
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flowgrain.records.metrics import DamagedLine, parse_metrics

MAX_POINTS = 10_000
"""Rows of an answer."""
_TAIL = 256
"""Bytes that are compared before new lines are read."""
_SECONDS = re.compile(rb'"seconds":\s*([-+.\deE]+)')
_PASSES = ("forward_passes", "train_forward_passes", "frozen_forward_passes")
Column = NDArray[np.float64]


class GrowingFile:
    """The new lines of a file that a run appends to.

    Args:
        path: the file. It may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._offset, self._inode = path, 0, 0
        self._tail = b""  # digest of the last bytes before the offset

    def read_new(self) -> tuple[bytes, bool]:
        """The complete lines since the last call, and whether the file was replaced.

        A file that was replaced is read from its start. A new file may have the number of the old
        one and be longer, so the last bytes that were read are compared too.
        """
        try:
            with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(f"{self.path} is not a file")  # such as a pipe, which never ends
                replaced = status.st_ino != self._inode or status.st_size < self._offset
                if replaced or self._tail_of(file) != self._tail:
                    replaced, self._offset, self._inode = True, 0, status.st_ino
                file.seek(self._offset)
                content = file.read()
                complete = content[: content.rfind(b"\n") + 1]
                self._offset += len(complete)
                self._tail = self._tail_of(file)
        except OSError:
            replaced, self._offset, self._inode = self._inode != 0, 0, 0
            return b"", replaced
        return complete, replaced

    def _tail_of(self, file: BinaryIO) -> bytes:
        """The digest of the last bytes before the offset."""
        start = max(0, self._offset - _TAIL)
        file.seek(start)
        return hashlib.sha256(file.read(self._offset - start)).digest()


class Curves:
    """All metrics of a run as columns [L]. NaN where a line has no value.

    Attributes:
        damaged: the lines that are left out.
    """

    def __init__(self, path: Path) -> None:
        self._file = GrowingFile(path)
        self._clear()

    def _clear(self) -> None:
        self._columns: dict[str, array[float]] = {"step": array("d")}
        self._lines = 0
        self.damaged: list[DamagedLine] = []

    def update(self) -> None:
        """Read the new lines."""
        content, replaced = self._file.read_new()
        if replaced:
            self._clear()
        records, damaged = parse_metrics(content)
        self.damaged += [replace(line, number=line.number + self._lines) for line in damaged]
        self._lines += content.count(b"\n")
        for record in records:
            known = len(self._columns["step"])
            for name, value in record.items():
                if name not in self._columns:
                    self._columns[name] = array("d", [math.nan] * known)
                self._columns[name].append(_float(value))
            for column in self._columns.values():
                if len(column) == known:
                    column.append(math.nan)

    @property
    def keys(self) -> list[str]:
        """Names of the metrics."""
        return [name for name in self._columns if name != "step"]

    def column(self, name: str) -> Column:
        """A column [L]. All NaN if no line has this metric."""
        if name in self._columns:
            return np.array(self._columns[name])
        return np.full(len(self._columns["step"]), np.nan)

    def total(self, names: Iterable[str]) -> Column:
        """Sum [L] of columns over all lines so far."""
        return np.cumsum(sum(np.nan_to_num(self.column(name)) for name in names))

    def sample(self, keys: Sequence[str] | None, points: int) -> dict[str, Any]:
        """The columns `keys` in at most `points` rows: the mean of every bucket of lines.

        Args:
            keys: names of metrics. Unknown names are left out. Default: all.
            points: largest number of rows.

        Returns:
            step, seconds and passes of the last line of every bucket, and the columns [B].
        """
        keys = self.keys if keys is None else [key for key in keys if key in self._columns]
        steps = self.column("step")
        edges = np.linspace(0, len(steps), min(len(steps), points) + 1).astype(int)
        firsts, lasts = edges[:-1], edges[1:] - 1
        return {
            "step": steps[lasts].astype(int).tolist(),
            "seconds": self.total(["seconds"])[lasts].tolist(),
            "passes": self.total(_PASSES)[lasts].astype(int).tolist(),
            "columns": {key: _means(self.column(key), firsts).tolist() for key in keys},
        }


class Summary:
    """What the list of runs shows about metrics.jsonl. Only lines with an evaluation are parsed.

    Attributes:
        seconds: training time of all lines.
        evaluations: the lines with an evaluation.
        last: the last line.
    """

    def __init__(self, path: Path) -> None:
        self._file = GrowingFile(path)
        self._clear()

    def _clear(self) -> None:
        self.seconds = 0.0
        self.evaluations: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}

    def update(self) -> None:
        """Read the new lines."""
        content, replaced = self._file.read_new()
        if replaced:
            self._clear()
        self.seconds += _sum(_SECONDS.findall(content))
        self.evaluations += parse_metrics(_lines_with(content, b'"eval/'))[0]
        self.last = _last_record(content) or self.last

    def scores(self, prefix: str, names: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
        """Steps and values of every metric `prefix`NAME that has values."""
        found = {
            name: [
                (line["step"], float(line[prefix + name]))
                for line in self.evaluations
                if line.get(prefix + name) is not None
            ]
            for name in names
        }
        return {name: values for name, values in found.items() if values}


def _lines_with(content: bytes, word: bytes) -> bytes:
    """The lines of `content` that contain `word`. Faster than a test of every line."""
    found, place = [], content.find(word)
    while place >= 0:
        end = content.find(b"\n", place)
        found.append(content[content.rfind(b"\n", 0, place) + 1 : end])
        place = content.find(word, end)
    return b"\n".join(found)


def _last_record(content: bytes) -> dict[str, Any] | None:
    """The last undamaged line of `content`. None if there is none."""
    end = len(content)
    while end > 0:
        start = content.rfind(b"\n", 0, end - 1) + 1
        found, _ = parse_metrics(content[start:end])
        if found:
            return found[0]
        end = start
    return None


def _sum(texts: Sequence[bytes]) -> float:
    """Sum of numbers. Texts of damaged lines that are no numbers count as 0."""
    try:
        return sum(map(float, texts))
    except ValueError:
        return float(np.nansum([_float(text) for text in texts]))


def _means(column: Column, firsts: NDArray[np.int_]) -> Column:
    """The mean [B] of the finite values of every bucket, which starts at `firsts` [B]."""
    if not len(firsts):
        return np.empty(0)
    finite = np.isfinite(column)
    counts = np.add.reduceat(finite, firsts, dtype=float)
    sums = np.add.reduceat(np.where(finite, column, 0), firsts)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _float(value: Any) -> float:
    """A JSON number. NaN: null, or not a number. Infinite: too large."""
    try:
        return math.nan if value is None else float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return math.nan
