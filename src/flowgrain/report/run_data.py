"""The files of a run that its page shows."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrain.config.schema import Config
from flowgrain.training.run_files import read_metrics, read_run, read_run_config

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class SavedEvaluation:
    """An evaluation during training.

    Attributes:
        step: training step.
        num_steps: ODE steps of an image.
        prompts: texts of the prompts.
        scores: score of every image by reward, NaN or None where it could not be scored.
        parts: mean of every part by "reward/part".
    """

    step: int
    num_steps: int
    prompts: list[str]
    scores: dict[str, list[float]]
    parts: dict[str, float]


@dataclass(frozen=True)
class RunData:
    """A run.

    Attributes:
        folder: directory of the run.
        config: its settings.
        record: content of run.yaml.
        steps: metrics of every training step.
        evaluations: evaluations in order of their step.
        calibration: content of calibration.json, or None.
    """

    folder: Path
    config: Config
    record: dict[str, Any]
    steps: list[Metrics]
    evaluations: list[SavedEvaluation]
    calibration: dict[str, Any] | None

    @property
    def trained_rewards(self) -> list[str]:
        """Names of the trained rewards."""
        return [reward.name for reward in self.config.rewards]

    @property
    def evaluated_rewards(self) -> list[str]:
        """Names of the rewards that every evaluation contains. A resumed run may add rewards."""
        names: Iterable[str] = self.evaluations[0].scores if self.evaluations else ()
        return [name for name in names if all(name in e.scores for e in self.evaluations)]


def read_run_data(folder: Path) -> RunData:
    """The run in `folder`.

    Raises:
        SettingsError: the directory contains no run.
    """
    config = read_run_config(folder)
    calibration = folder / "calibration.json"
    return RunData(
        folder=folder,
        config=config,
        record=read_run(folder),
        steps=[line for line in read_metrics(folder) if line["step"] > 0],
        evaluations=[_read_evaluation(path) for path in _numbered(folder, "evaluations/step-*.json")],
        calibration=json.loads(calibration.read_text()) if calibration.exists() else None,
    )


def _numbered(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


def _read_evaluation(path: Path) -> SavedEvaluation:
    values = json.loads(path.read_text())
    return SavedEvaluation(**{name: values[name] for name in SavedEvaluation.__annotations__})
