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
        scores: score of every image by reward, NaN where the image could not be scored.
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
        evaluations: evaluations in the order of their steps.
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
        """Names of the rewards in all evaluations. A resumed run may have added a reward."""
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
        evaluations=[
            _read_evaluation(path) for path in sorted((folder / "evaluations").glob("step-*.json"))
        ],
        calibration=json.loads(calibration.read_text()) if calibration.exists() else None,
    )


def _read_evaluation(path: Path) -> SavedEvaluation:
    values = json.loads(path.read_text())
    return SavedEvaluation(
        step=values["step"],
        num_steps=values["num_steps"],
        prompts=values["prompts"],
        scores=values["scores"],
        parts=values["parts"],
    )
