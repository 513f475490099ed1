"""Reading of a run's directory."""

import logging
import math
import socket
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from flowgrain.records import html
from flowgrain.records.alarms import read_alarms, read_best
from flowgrain.records.evaluations import EvaluationRecord, evaluation_files, read_evaluation
from flowgrain.records.group_files import GroupStore
from flowgrain.records.history import History
from flowgrain.records.images import DamagedRecord
from flowgrain.records.metrics import read_metrics
from flowgrain.records.run_lock import HOLDER, read_holder
from flowgrain.records.run_yaml import read_run

log = logging.getLogger(__name__)


def load_run(path: str | Path) -> "Run":
    """The run in a directory. Only run.yaml is read.

    Args:
        path: directory of the run, or its run.yaml.

    Raises:
        SettingsError: the directory contains no run.

    Example:
        >>> run = load_run("runs/demo")
        >>> run.history["eval/towers"]
        >>> run.groups[12].image(prompt=0, place=3)
    """
    path = Path(path)
    record = read_run(path)
    return Run(path if path.is_dir() else path.parent, record)


@dataclass(frozen=True, eq=False)
class Run:
    """A run, read from its directory. Files are read when a property is used, each time again.

    Attributes:
        folder: directory of the run.
        record: content of run.yaml.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The settings as nested values."""
        config = self.record.get("config")
        return config if isinstance(config, dict) else {}

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.config.get("name", self.folder.name))

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self._section("method").get("name", ""))

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self._section("model").get("name", ""))

    @property
    def rewards(self) -> list[str]:
        """Names of the trained rewards."""
        rewards = self.config.get("rewards")
        found = rewards if isinstance(rewards, list | tuple) else []
        return [str(reward["name"]) for reward in found if isinstance(reward, dict)]

    @property
    def max_steps(self) -> int:
        """Last training step of a complete run."""
        steps = self._section("training").get("max_steps")
        return steps if isinstance(steps, int) else 0

    @property
    def status(self) -> str:
        """What happens in the directory.

        "running": a process trains. "finished": the run is complete. "stopped": the run ended
        before its last step, by a signal or an error. "unfinished": its process was killed.
        """
        lines = self.metrics
        step = lines[-1]["step"] if lines else 0
        return self.status_after(step, sum(line.get("seconds", 0.0) for line in lines))

    def status_after(self, step: int, seconds: float) -> str:
        """The status of a run whose last line of metrics.jsonl is known.

        Args:
            step: its last step.
            seconds: its training time.
        """
        holder = read_holder(self.folder / HOLDER)
        if holder is not None and _is_alive(holder):
            return "running"
        limit = self._section("training").get("max_seconds")
        in_time = isinstance(limit, int | float) and bool(seconds >= limit)
        if in_time or step >= self.max_steps > 0:
            return "finished"
        return "stopped" if holder is None else "unfinished"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl. NaN: the value was not finite."""
        return read_metrics(self.folder)

    @property
    def history(self) -> History:
        """The metrics as columns."""
        return History(self.metrics)

    @property
    def evaluations(self) -> list[EvaluationRecord]:
        """The evaluations by step. Damaged files are left out with a warning."""
        found = []
        for path in evaluation_files(self.folder / "evaluations"):
            try:
                found.append(read_evaluation(path))
            except DamagedRecord as error:
                log.warning("%s. It is left out.", error)
        return found

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """The lines of alarms.jsonl. Damaged lines are left out."""
        return read_alarms(self.folder)

    @property
    def best_checkpoint(self) -> dict[str, Any] | None:
        """The content of best.json: step, score and rule. None if it is missing or damaged."""
        return read_best(self.folder)

    @cached_property
    def groups(self) -> GroupStore:
        """The recorded groups."""
        return GroupStore(self.folder / "groups")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.method} on {self.model})"

    def _repr_html_(self) -> str:
        lines, steps = self.metrics, self.groups.steps
        done = lines[-1]["step"] if lines else 0
        rows: list[list[Any]] = [
            ["status", f"{self.status}, step {done} of {self.max_steps}"],
            ["method", self.method],
            ["model", self.model],
            ["directory", self.folder],
            ["recorded groups", f"{len(steps)} steps" + (f", last {steps[-1]}" if steps else "")],
            ["alarms", len(self.alarms)],
        ]
        history = History(lines)
        for name in self.rewards:
            values = [v for v in history.get(f"eval/{name}", []) if math.isfinite(v)]
            if values:
                rows.append([f"eval/{name}", f"{values[0]:.4g} → {values[-1]:.4g}"])
        return html.page(self.name, html.table(["", ""], rows))

    def _section(self, name: str) -> dict[str, Any]:
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process that has the lock runs. A process of another host counts as running."""
    if holder.get("host") != socket.gethostname():
        return True
    pid = holder.get("pid")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return False
    try:
        started = datetime.fromisoformat(str(holder.get("started"))).timestamp()
        return bool(psutil.Process(pid).create_time() <= started + 1)
    except (psutil.Error, ValueError):
        return False
