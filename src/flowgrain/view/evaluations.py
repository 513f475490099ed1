"""The evaluations of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from flowgrain.records import EvaluationRecord
from flowgrain.records.evaluations import evaluation_files, evaluation_name, read_evaluation
from flowgrain.statistics import confidence_interval
from flowgrain.view.catalog import Entry
from flowgrain.view.readable import Missing, readable


def means(entry: Entry) -> dict[str, Any]:
    """The answer to /api/runs/ID/evaluations: the means of all evaluations with 95% intervals."""
    damaged: list[str] = []
    found = [readable(damaged, _means, entry, step) for step in evaluation_steps(entry)]
    return {"evaluations": [means for means in found if means], "damaged": damaged}


def evaluation_steps(entry: Entry) -> list[int]:
    """The steps of all evaluations in ascending order, also of damaged ones."""
    files = evaluation_files(entry.file("evaluations"))
    return [int(path.stem.removeprefix("step-")) for path in files]


def evaluation_of(entry: Entry, step: int) -> EvaluationRecord:
    """The evaluation of a training step.

    Raises:
        Missing: there is none.
        DamagedRecord: the file is not readable.
    """
    path = entry.file("evaluations", evaluation_name(step))
    if not path.is_file():
        raise Missing(f"{entry.id}: there is no evaluation of step {step}.")
    return entry.of_file(("evaluation", step), path, read_evaluation)


def content(entry: Entry, step: int) -> dict[str, Any]:
    """The answer to /api/runs/ID/evaluations/STEP: all scores. See `evaluation_of`."""
    record = evaluation_of(entry, step)
    values = {**asdict(record), "images": num_images(entry, record)}
    del values["path"]
    return values


def image(entry: Entry, step: int, place: int) -> bytes:
    """An image of an evaluation as WebP.

    Raises:
        Missing: the image was not recorded.
        DamagedRecord: the file is not readable.
    """
    record = evaluation_of(entry, step)
    entry.file("evaluations", record.images_path.name)
    try:
        return record.image_bytes(place)
    except KeyError:
        raise Missing(f"{entry.id}: the evaluation of step {step} has no image {place}.") from None


def num_images(entry: Entry, record: EvaluationRecord) -> int:
    """Number of recorded images, which belong to the first prompts.

    Raises:
        DamagedRecord: the file is not readable.
    """
    path = entry.file("evaluations", record.images_path.name)
    if not path.is_file():
        return 0
    return entry.of_file(("images", record.step), path, lambda _: record.num_images)


def _means(entry: Entry, step: int) -> dict[str, Any]:
    record = evaluation_of(entry, step)
    return {
        "step": record.step,
        "num_steps": record.num_steps,
        "means": _intervals(record.scores),
        "base": record.base,
        "monitors": _intervals(record.monitors),
    }


def _intervals(columns: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """The mean of every column with its interval."""
    return {
        name: asdict(confidence_interval(np.array(values, dtype=float)))
        for name, values in columns.items()
    }
