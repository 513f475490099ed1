"""The files of a run that its page shows."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from flowgrain.config.schema import Config
from flowgrain.records.alarms import read_alarms, read_best
from flowgrain.records.evaluations import EvaluationRecord, evaluation_files, read_evaluation
from flowgrain.records.images import DamagedRecord
from flowgrain.records.metrics import read_metrics
from flowgrain.records.run_yaml import read_run
from flowgrain.training.run_files import read_run_config

log = logging.getLogger(__name__)
T = TypeVar("T")
Metrics = Mapping[str, Any]


class CalibrationRound(BaseModel):
    """A round of the calibration: psi and the shares of trajectories, by grid step."""

    psi: list[float]
    gained: list[float]
    lost: list[float]


class SavedCalibration(BaseModel):
    """The calibration of the noise: its rounds, and psi at the end."""

    psi: list[float]
    rounds: list[CalibrationRound] = Field(min_length=1)


@dataclasses.dataclass(frozen=True)
class RunData:
    """A run.

    Attributes:
        folder: directory of the run.
        config: its settings.
        record: content of run.yaml.
        steps: metrics of every training step.
        evaluations: evaluations in the order of their steps.
        calibration: the calibration of the noise, or None.
        alarms: lines of alarms.jsonl.
        best: content of best.json, or None.
    """

    folder: Path
    config: Config
    record: dict[str, Any]
    steps: list[Metrics]
    evaluations: list[EvaluationRecord]
    calibration: SavedCalibration | None
    alarms: list[dict[str, Any]]
    best: dict[str, Any] | None

    @property
    def trained_rewards(self) -> list[str]:
        """Names of the trained rewards."""
        return [reward.name for reward in self.config.rewards]

    @property
    def evaluated_rewards(self) -> list[str]:
        """Names of the rewards in all evaluations. A resumed run may have added a reward."""
        names: Iterable[str] = self.evaluations[0].scores if self.evaluations else ()
        return [name for name in names if all(name in e.scores for e in self.evaluations)]


def read_run_data(folder: Path) -> RunData:
    """The run in `folder`. Damaged files are left out, with a warning.

    Raises:
        SettingsError: the directory contains no run.
    """
    config = read_run_config(folder)
    paths = evaluation_files(folder / "evaluations")
    found = [undamaged(path, read_evaluation) for path in paths]
    calibration = undamaged(folder / "calibration.json", _read_calibration)
    return RunData(
        folder=folder,
        config=config,
        record=read_run(folder),
        steps=[line for line in read_metrics(folder) if line["step"] > 0],
        evaluations=[e for e in found if e is not None],
        calibration=calibration,
        alarms=read_alarms(folder),
        best=read_best(folder),
    )


def _read_calibration(path: Path) -> SavedCalibration:
    return SavedCalibration.model_validate_json(path.read_bytes())


def undamaged(path: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` returns for `path`. None if the file is missing, or damaged, with a warning."""
    if not path.exists():
        return None
    try:
        return read(path)
    except DamagedRecord as error:
        reason = error.reason
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = "not JSON" if first["type"] == "json_invalid" else "not a record of a run"
        reason = f"the value of {place} is wrong or missing" if place else reason
    except Exception:  # libraries raise many errors for damaged files
        reason = "not an image" if path.suffix == ".png" else "not readable"
    log.warning("%s is damaged (%s). It is left out.", path, reason)
    return None
