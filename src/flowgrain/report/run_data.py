"""The files of a run that its page shows."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from flowgrain.config.schema import Config
from flowgrain.training.run_files import read_metrics, read_run, read_run_config
from flowgrain.training.watch_files import read_alarms, read_best

log = logging.getLogger(__name__)
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Metrics = Mapping[str, Any]


class SavedDifference(BaseModel):
    """A paired difference to the base model: its mean and the ends of its 95% interval.

    std is the standard deviation of the images of the base model. None: not known.
    """

    mean: float | None
    low: float | None
    high: float | None
    std: float | None


class SavedEvaluation(BaseModel):
    """An evaluation during training.

    Attributes:
        step: training step.
        num_steps: ODE steps of an image.
        prompts: texts of the prompts.
        scores: score of every image by reward, NaN where the image could not be scored.
        parts: mean of every part by "reward/part".
        monitors: value of every image by monitor, None where it is not available.
        base: difference to the base model by reward and monitor.
    """

    step: int
    num_steps: int
    prompts: list[str]
    scores: dict[str, list[float]]
    parts: dict[str, float]
    monitors: dict[str, list[float | None]] = {}
    base: dict[str, SavedDifference] = {}

    @model_validator(mode="after")
    def _check_lengths(self) -> "SavedEvaluation":
        if not self.prompts or any(len(v) != len(self.prompts) for v in self.scores.values()):
            raise ValueError("a reward has another number of scores than there are prompts")
        return self


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
    evaluations: list[SavedEvaluation]
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
    calibration = _readable([folder / "calibration.json"], SavedCalibration)
    return RunData(
        folder=folder,
        config=config,
        record=read_run(folder),
        steps=[line for line in read_metrics(folder) if line["step"] > 0],
        evaluations=_readable(
            sorted((folder / "evaluations").glob("step-*.json")), SavedEvaluation
        ),
        calibration=calibration[0] if calibration else None,
        alarms=read_alarms(folder),
        best=read_best(folder),
    )


def _readable(paths: Iterable[Path], kind: type[M]) -> list[M]:
    """The content of all undamaged JSON files."""
    found = (
        undamaged(path, lambda file: kind.model_validate_json(file.read_bytes())) for path in paths
    )
    return [content for content in found if content is not None]


def undamaged(path: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` returns for `path`. None if the file is missing, or damaged, with a warning."""
    if not path.exists():
        return None
    try:
        return read(path)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = "not JSON" if first["type"] == "json_invalid" else "not a record of a run"
        reason = f"the value of {place} is wrong or missing" if place else reason
    except (KeyError, AttributeError, TypeError, IndexError):
        reason = "not a record of a run"
    except Exception:  # libraries raise many errors for damaged files
        reason = "not an image" if path.suffix == ".png" else "not readable"
    log.warning("%s is damaged (%s). It is left out.", path, reason)
    return None
