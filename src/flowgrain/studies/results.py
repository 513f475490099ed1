"""Results of the finished runs of a comparison, and the comparison of a directory."""

import contextlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from flowgrain.config.load import read_yaml
from flowgrain.core.cost import Cost
from flowgrain.settings import SettingsError
from flowgrain.studies.comparison import Comparison

BASE = "base"
"""Label of the base model, which is measured like the runs."""

Result = dict[str, Any]
log = logging.getLogger(__name__)


class _SavedResult(BaseModel):
    """What a result.json must contain. Other entries are numbers."""

    model_config = ConfigDict(extra="allow")

    label: str
    reward_set: str | None
    seed: int | None
    stopped: str | None
    prompts: list[str]
    steps: dict[str, dict[str, float]]


def read_comparison(folder: Path) -> Comparison:
    """The comparison whose runs are in `folder`.

    Raises:
        SettingsError: there is no comparison in `folder`, or another version wrote it.
    """
    file = folder / "comparison.yaml"
    if not file.is_file():
        raise SettingsError(
            f"{folder}: not the directory of a comparison. It has no comparison.yaml."
        )
    saved = read_yaml(file)
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
    """The results of all finished runs in `folder`, with the base model.

    A damaged result is renamed, with a warning. `run_comparison` then computes it again.
    """
    found = []
    for file in sorted((folder / "runs").glob("*/result.json")):
        result = read_result(file)
        if result is not None:
            found.append(result)
            continue
        log.warning(
            "%s is damaged. It is left out and renamed to damaged-result.json. "
            "flowgrain compare computes it again.",
            file,
        )
        with contextlib.suppress(OSError):  # a read-only directory
            file.rename(file.with_name("damaged-result.json"))
    return found


def read_result(file: Path) -> Result | None:
    """The result of a run. None if the file is missing or damaged."""
    try:
        return _SavedResult.model_validate_json(file.read_bytes()).model_dump()
    except (OSError, ValueError):
        return None


def by_seed(
    found: Iterable[Mapping[str, Any]], label: str, reward_set: str, num_steps: int, metric: str
) -> dict[int, float]:
    """A metric of a method and a reward set at `num_steps` inference steps, by seed."""
    return {
        result["seed"]: float(result["steps"].get(str(num_steps), {}).get(metric, np.nan))
        for result in found
        if result["label"] == label and result["reward_set"] == reward_set
    }


def units_of_step(metrics: Mapping[str, Any], num_rewards: int) -> float:
    """The cost of a training step in `Cost.units`, from its line in metrics.jsonl."""
    names = ("forward_passes", "train_forward_passes", "decodes", "frozen_forward_passes")
    counted = {name: metrics[name] for name in names}
    counted["reused_forward_passes"] = metrics.get("reused_forward_passes", 0)
    reward_calls = metrics["decodes"] * num_rewards
    return float(Cost(**counted, reward_calls=reward_calls, trained_edges=0).units)
