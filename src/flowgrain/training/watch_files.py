"""The files of the watch: what the base model measured, alarms.jsonl and best.json."""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from flowgrain.monitors.features import Features
from flowgrain.training import checkpoint
from flowgrain.training.alarms import Finding, Measured
from flowgrain.training.files import write_atomically

log = logging.getLogger(__name__)

ALARMS, BEST = "alarms.jsonl", "best.json"
_BASE = "base.npz"
RULE = "highest trained reward among checkpoints without an alarm"
"""Which checkpoint is the best."""


@dataclass(frozen=True)
class Alarm:
    """A line of alarms.jsonl.

    Attributes:
        step: training step.
        finding: what changed.
        evaluations: evaluations in a row for which the rule holds.
        action: what the alarm does.
        message: one sentence with the numbers.
    """

    step: int
    finding: Finding
    evaluations: int
    action: str
    message: str

    def as_dict(self) -> dict[str, Any]:
        """The line as plain values."""
        values = {"step": self.step, **asdict(self.finding)}
        rest = {"evaluations": self.evaluations, "action": self.action, "message": self.message}
        return values | rest


class Base(NamedTuple):
    """What later evaluations need of the base model, beside its scores.

    Attributes:
        net: name of the feature network. Empty: none.
        features: [I, D] of the evaluation images.
        others: [n, D] of a second image of the first prompts.
        x: [P, K, *L] states of sampling paths.
        v: [P, K, *L] velocities at these states.
    """

    net: str
    features: Features
    others: Features
    x: Features
    v: Features


def write_base(folder: Path, base: Base) -> None:
    """Write what the base model measured into the directory of a run."""
    content = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(v) for name, v in base._asdict().items()}
    np.savez(content, **arrays)
    write_atomically(folder / _BASE, content.getvalue())


def read_base(folder: Path) -> Base | None:
    """What the base model measured. None if the file is missing, or damaged, with a warning."""
    path = folder / _BASE
    if not path.exists():
        return None
    try:
        with np.load(path) as found:
            values = {name: found[name] for name in Base._fields}
        return Base(**{**values, "net": str(values["net"])})
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        log.warning("%s is damaged (%s). Monitors that need it are left out.", path, error)
        return None


def read_evaluation(folder: Path, step: int, guidance: float) -> Measured | None:
    """An evaluation of a run. None if there is none, or if it is damaged, with a warning.

    Args:
        folder: directory of the run.
        step: training step. 0: the base model.
        guidance: guidance scale of an evaluation that does not record it.
    """
    path = folder / "evaluations" / f"step-{step:06d}.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_bytes())
        return Measured(
            prompts=values["prompts"],
            num_steps=values["num_steps"],
            guidance=values.get("guidance_scale", guidance),
            scores=_columns(values["scores"]),
            monitors=_columns(values.get("monitors", {})),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s).", path, error)
        return None


def _columns(values: Mapping[str, Sequence[float | None]]) -> dict[str, Features]:
    return {name: np.array(column, dtype=np.float32) for name, column in values.items()}


def append_alarms(folder: Path, alarms: Sequence[Alarm]) -> None:
    """Append the alarms of an evaluation to alarms.jsonl."""
    # An evaluation that was interrupted after its alarms were written is repeated.
    _keep(folder, alarms[0].step - 1, [json.dumps(alarm.as_dict()) for alarm in alarms])


def read_alarms(folder: Path) -> list[dict[str, Any]]:
    """The lines of alarms.jsonl, without damaged lines."""
    return [json.loads(line) for line in _read_lines(folder / ALARMS)]


def _read_lines(file: Path) -> list[str]:
    """The undamaged lines of alarms.jsonl."""
    found = []
    for line in file.read_text("utf-8", "replace").splitlines() if file.exists() else []:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(line)
    return found


def discard_after(folder: Path, step: int) -> None:
    """Delete the alarms of later steps and the base model of step 0, if it is measured again."""
    if step == 0:
        (folder / _BASE).unlink(missing_ok=True)
    if (folder / ALARMS).exists():
        _keep(folder, step)
    write_best(folder)


def _keep(folder: Path, step: int, new: Sequence[str] = ()) -> None:
    """Keep the lines of alarms.jsonl up to `step`, and append `new` lines."""
    kept = [line for line in _read_lines(folder / ALARMS) if json.loads(line)["step"] <= step]
    write_atomically(folder / ALARMS, "".join(f"{line}\n" for line in [*kept, *new]))


def write_best(folder: Path) -> None:
    """Write which checkpoint is the best to best.json, or delete it if no checkpoint is."""
    found = checkpoint.best(folder / "checkpoints")
    if found is None:
        (folder / BEST).unlink(missing_ok=True)
        return
    values = {"step": checkpoint.step_of(found), "score": checkpoint.score(found), "rule": RULE}
    write_atomically(folder / BEST, json.dumps(values))


def read_best(folder: Path) -> dict[str, Any] | None:
    """The content of best.json. None if it is missing or damaged."""
    try:
        values = json.loads((folder / BEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None
