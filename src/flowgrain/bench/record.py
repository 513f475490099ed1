"""The record of a step: its measurements, in a JSON file that is written after every measurement.

A measurement that fails, or that runs out of memory, is recorded, and the next one runs.
"""

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from flowgrain.records.files import write_atomically
from flowgrain.records.json_text import to_json
from flowgrain.settings import one_line

Outcome = Literal["measured", "passed", "failed", "out of memory", "skipped"]
Status = Literal["running", "done", "failed", "timeout", "crashed", "not started"]
Values = Mapping[str, Any]
"""Numbers and words of a measurement by name. `passed` says whether a check is within its limit."""

_NO_TIME = "the time limit of the step is reached"
CHECK = "passed"
"""Name of the value that says whether a check is within its limit."""


class Skipped(Exception):
    """A measurement cannot be made here. The message is the reason."""


def within(error: float, limit: float, **others: Any) -> dict[str, Any]:
    """The values of a check: `error` must be at most `limit`. NaN is not."""
    return {"error": error, "limit": limit, **others, CHECK: bool(error <= limit)}


@dataclass
class StepRecord:
    """The measurements of a step.

    Attributes:
        name: name of the step.
        file: JSON file, written after every measurement.
        seconds: time limit of the step. Later measurements keep the values of an earlier run of
            the step, or are skipped.
        status: see `Status`.
        error: why the step failed, if it did not reach its end.
        measurements: one entry per measurement, in order.
    """

    name: str
    file: Path
    seconds: float = float("inf")
    status: Status = "running"
    error: str | None = None
    measurements: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin = time.monotonic()
        self._exhausted: set[str] = set()
        self._earlier = {
            entry["name"]: entry
            for entry in read_record(self.file)["measurements"]
            if entry["outcome"] in ("measured", "passed")
        }
        self.write()

    @property
    def elapsed(self) -> float:
        """Seconds since the step started."""
        return time.monotonic() - self._begin

    def run(self, name: str, work: Callable[[], Values], sweep: str | None = None) -> None:
        """Run the measurement `work`, and record its values or why there are none.

        Args:
            name: name of the measurement, with its batch size.
            work: returns the values. It raises `Skipped` if it cannot run here.
            sweep: measurements with the same sweep have growing batches. After one of them ran out
                of memory, the others are skipped.
        """
        begin, values, log = time.monotonic(), dict[str, Any](), None
        outcome: Outcome = "skipped"
        reason: str | None = None
        if sweep in self._exhausted:
            reason = "a smaller batch was out of memory"
        elif self.elapsed > self.seconds:
            if name in self._earlier:
                self.measurements.append(self._earlier[name])
                self.write()
                return
            reason = _NO_TIME
        else:
            try:
                values = dict(work())
                outcome = "measured"
                if CHECK in values:
                    outcome = "passed" if values.pop(CHECK) else "failed"
            except Skipped as skipped:
                reason = str(skipped)
            except torch.OutOfMemoryError as error:
                outcome, reason = "out of memory", one_line(error, 300)
                if sweep is not None:
                    self._exhausted.add(sweep)
            except Exception as error:
                outcome, reason = "failed", f"{type(error).__name__}: {one_line(error, 500)}"
                log = traceback.format_exc()
        if outcome in ("failed", "out of memory"):
            free_memory()  # after the handlers, because a traceback holds tensors
        entry = {"name": name, "outcome": outcome, "seconds": time.monotonic() - begin}
        entry |= {"values": values} if values else {}
        entry |= {"reason": reason} if reason else {}
        entry |= {"traceback": log} if log else {}
        self.measurements.append(entry)
        self.write()

    def fail(self, error: Exception) -> None:
        """Record an error between measurements. The step then counts as failed."""
        entry = {
            "name": "preparation",
            "outcome": "failed",
            "reason": f"{type(error).__name__}: {one_line(error, 500)}",
            "traceback": "".join(traceback.format_exception(error)),
        }
        self.measurements.append(entry)
        self.write()

    def finish(self) -> None:
        """Set the status: failed if a measurement failed, timeout if one had no time, or done."""
        failed = [entry["name"] for entry in self.measurements if entry["outcome"] == "failed"]
        late = any(entry.get("reason") == _NO_TIME for entry in self.measurements)
        self.status = "failed" if failed else "timeout" if late else "done"
        self.error = f"failed: {', '.join(failed)}" if failed else _NO_TIME if late else None
        self.write()

    def write(self) -> None:
        """Write the file."""
        content = {
            "step": self.name,
            "status": self.status,
            "seconds": self.elapsed,
            "error": self.error,
            "measurements": self.measurements,
        }
        write_atomically(self.file, to_json(content))


def read_record(file: Path) -> dict[str, Any]:
    """The record of a step. A step whose file is missing or damaged counts as not started."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        return {"step": file.stem, "status": "not started", "measurements": []}
    return content


def free_memory() -> None:
    """Free unreferenced tensors, and return cached GPU memory to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
