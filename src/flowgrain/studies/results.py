"""Results of the finished runs of a comparison, and the comparison of a directory."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flowgrain.core.cost import Cost
from flowgrain.settings import SettingsError
from flowgrain.studies.comparison import Comparison

BASE = "base"
"""Label of the base model, which is measured like the runs."""

Result = dict[str, Any]


def read_comparison(folder: Path) -> Comparison:
    """The comparison whose runs are in `folder`.

    Raises:
        SettingsError: there is no comparison in `folder`, or another version wrote it.
    """
    file = folder / "comparison.yaml"
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError:
        raise SettingsError(
            f"{folder}: not the directory of a comparison. It has no comparison.yaml."
        ) from None
    try:
        return Comparison.model_validate(saved["comparison"])
    except (KeyError, TypeError, ValueError) as error:
        raise SettingsError(
            f"{file}: not a comparison of this version of flowgrain. Use another directory."
        ) from error


def result_file(folder: Path, name: str) -> Path:
    """The file with the result of the run `name`. It exists once the run is finished."""
    return folder / "runs" / name / "result.json"


def results(folder: Path) -> list[Result]:
    """The results of all finished runs in `folder`, with the base model."""
    files = sorted((folder / "runs").glob("*/result.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def by_seed(
    found: Iterable[Mapping[str, Any]], label: str, reward_set: str, num_steps: int, metric: str
) -> dict[int, float]:
    """A metric of a method and a reward set at `num_steps` inference steps, by seed."""
    return {
        result["seed"]: float(result["steps"][str(num_steps)].get(metric, np.nan))
        for result in found
        if result["label"] == label and result["reward_set"] == reward_set
    }


def units_of_step(metrics: Mapping[str, Any], num_rewards: int) -> float:
    """The cost of a training step in `Cost.units`, from its line in metrics.jsonl."""
    names = ("forward_passes", "train_forward_passes", "decodes", "frozen_forward_passes")
    counted = {name: metrics[name] for name in names}
    reward_calls = metrics["decodes"] * num_rewards
    return float(Cost(**counted, reward_calls=reward_calls, trained_edges=0).units)
