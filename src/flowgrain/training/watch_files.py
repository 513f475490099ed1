"""The files of the watch: what the base model measured, its alarms and the best checkpoint."""

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from flowgrain.monitors.features import Features
from flowgrain.records.alarms import delete_best, discard_alarms_after, write_best
from flowgrain.records.evaluations import evaluation_name, read_evaluation
from flowgrain.records.files import write_atomically
from flowgrain.records.images import DamagedRecord
from flowgrain.training import checkpoint
from flowgrain.training.alarms import Finding, Measured

log = logging.getLogger(__name__)

_BASE = "base.npz"


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


def read_measured(folder: Path, step: int, guidance: float) -> Measured | None:
    """An evaluation of a run. None if there is none, or if it is damaged, with a warning.

    Args:
        folder: directory of the run.
        step: training step. 0: the base model.
        guidance: guidance scale of an evaluation that does not record it.
    """
    path = folder / "evaluations" / evaluation_name(step)
    if not path.exists():
        return None
    try:
        record = read_evaluation(path)
    except DamagedRecord as error:
        log.warning("%s.", error)
        return None
    recorded = record.guidance_scale
    return Measured(
        prompts=record.prompts,
        num_steps=record.num_steps,
        guidance=guidance if recorded is None else recorded,
        scores=_columns(record.scores),
        monitors=_columns(record.monitors),
    )


def _columns(values: Mapping[str, Sequence[float]]) -> dict[str, Features]:
    return {name: np.array(column, dtype=np.float32) for name, column in values.items()}


def discard_after(folder: Path, step: int) -> None:
    """Delete the alarms of later steps and the base model of step 0, if it is measured again."""
    if step == 0:
        (folder / _BASE).unlink(missing_ok=True)
    discard_alarms_after(folder, step)
    update_best(folder)


def update_best(folder: Path) -> None:
    """Write which checkpoint is the best to best.json, or delete it if no checkpoint is."""
    found = checkpoint.best(folder / "checkpoints")
    if found is None:
        delete_best(folder)
    else:
        write_best(folder, checkpoint.step_of(found), checkpoint.score(found))
