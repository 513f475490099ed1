"""The page of an evaluation: its table, and images of the same prompt and noise by two models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowgrain.evaluation.storage import Columns, image_path, read_scores
from flowgrain.evaluation.table import Table, cell_lines, part_tables
from flowgrain.report.render import SMALL, write_page

MAX_PAIRS = 12
"""Largest losses on the page, and as many largest gains."""


@dataclass(frozen=True)
class ModelImage:
    """A model's image of a prompt.

    Attributes:
        model: label of the model.
        image: path of the image from the page. None: the evaluation did not keep images.
        score: score of the image.
    """

    model: str
    image: str | None
    score: float


@dataclass(frozen=True)
class ImageDifference:
    """The images of two models from one prompt and one seed.

    Attributes:
        prompt: text of the prompt.
        seed: seed of the noise.
        gain: score of the second image minus score of the first one.
        images: the two images.
    """

    prompt: str
    seed: int
    gain: float
    images: list[ModelImage]


@dataclass(frozen=True)
class ModelDifference:
    """A model compared with the first model, by one metric at one number of steps.

    Attributes:
        metric: name of the metric.
        model: label of the model.
        steps: ODE steps.
        better: share of the images with a higher score.
        worse: share of the images with a lower score.
        losses: images with the largest losses, largest first.
        gains: images with the largest gains, largest first.
    """

    metric: str
    model: str
    steps: int
    better: float
    worse: float
    losses: list[ImageDifference]
    gains: list[ImageDifference]


def write_side_by_side(folder: Path, table: Table, seeds: Sequence[int]) -> Path:
    """Write the page index.html of an evaluation. Returns its path.

    Images are links to files in the directory. The page must stay there.

    Args:
        folder: output directory of the evaluation.
        table: its table.
        seeds: seeds to show.
    """
    columns = read_scores(folder)
    models = list(dict.fromkeys(row.model for row in table.rows))
    steps = list(dict.fromkeys(row.steps for row in table.rows))
    differences = [
        compare_models(folder, columns, metric, models[0], model, max(steps), seeds)
        for metric in table.metrics
        for model in models[1:]
    ]
    first_image = next((folder / "images").glob("*/*/*.png"), None)
    values = {
        "has_images": first_image is not None,
        "small": first_image is not None and _width(first_image) <= SMALL,
        "table": table,
        "models": models,
        "steps": steps,
        "seeds": list(seeds),
        "cell_lines": cell_lines,
        "part_tables": list(part_tables(table)),
        "differences": [found for found in differences if found.losses or found.gains],
        "first_images": (
            first_images(folder, columns, models[0], max(steps), seeds) if len(models) == 1 else []
        ),
    }
    return write_page(folder / "index.html", "side_by_side.html", values)


def compare_models(
    folder: Path,
    columns: Columns,
    metric: str,
    first: str,
    other: str,
    steps: int,
    seeds: Sequence[int],
) -> ModelDifference:
    """The largest losses and gains of model `other` compared with model `first`."""
    before, after = (_rows(columns, model, steps, seeds) for model in (first, other))
    pairs = [(before[key], after[key]) for key in before if key in after]
    gain = np.array([columns[metric][b] - columns[metric][a] for a, b in pairs], dtype=float)
    order = [int(i) for i in np.argsort(gain, kind="stable") if np.isfinite(gain[i])]
    losses = [i for i in order[:MAX_PAIRS] if gain[i] < 0]
    gains = [i for i in order[::-1][:MAX_PAIRS] if gain[i] > 0]
    scored = max(len(order), 1)
    return ModelDifference(
        metric=metric,
        model=other,
        steps=steps,
        better=float((gain > 0).sum() / scored),
        worse=float((gain < 0).sum() / scored),
        losses=[_difference(folder, columns, metric, pairs[i], gain[i]) for i in losses],
        gains=[_difference(folder, columns, metric, pairs[i], gain[i]) for i in gains],
    )


def first_images(
    folder: Path, columns: Columns, model: str, steps: int, seeds: Sequence[int]
) -> list[tuple[str, str]]:
    """Prompts and paths of the first images of a single model."""
    rows = [row for _, row in sorted(_rows(columns, model, steps, seeds).items())]
    images = [(str(columns["prompt"][row]), _image(folder, columns, row)) for row in rows]
    return [(prompt, path) for prompt, path in images[: 2 * MAX_PAIRS] if path is not None]


def _rows(
    columns: Columns, model: str, steps: int, seeds: Sequence[int]
) -> dict[tuple[int, int], int]:
    """Row of every image by place and seed."""
    chosen: NDArray[Any] = (columns["model"] == model) & (columns["steps"] == steps)
    rows = np.flatnonzero(chosen & np.isin(columns["seed"], list(seeds)))
    return {(int(columns["place"][row]), int(columns["seed"][row])): int(row) for row in rows}


def _difference(
    folder: Path, columns: Columns, metric: str, rows: tuple[int, int], gain: float
) -> ImageDifference:
    images = [
        ModelImage(
            str(columns["model"][row]),
            _image(folder, columns, row),
            float(columns[metric][row]),
        )
        for row in rows
    ]
    first = rows[0]
    prompt, seed = str(columns["prompt"][first]), int(columns["seed"][first])
    return ImageDifference(prompt, seed, float(gain), images)


def _image(folder: Path, columns: Columns, row: int) -> str | None:
    """Path of an image from the page. None if it was not kept."""
    model = str(columns["model"][row])
    steps, seed, place = (int(columns[name][row]) for name in ("steps", "seed", "place"))
    file = image_path(folder, model, steps, seed, place)
    return file.relative_to(folder).as_posix() if file.exists() else None


def _width(file: Path) -> int:
    """Width of an image in pixels, or 0 if it is damaged."""
    try:
        with Image.open(file) as image:
            return image.width
    except (OSError, ValueError, SyntaxError):
        return 0
