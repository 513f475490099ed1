"""The page of an evaluation: its table, and the same prompt and noise across models, worst losses first, then the best gains."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowgrain.training.checkpoint import write_atomically
from flowgrain.report.page import template
from flowgrain.evaluation.survey import Table, cell_text, image_path, part_tables, read_scores

SHOWN = 12  # losses, and as many gains


@dataclass(frozen=True)
class Look:
    """One model's image of a prompt: its path from the page, if it was kept, and its score."""

    model: str
    image: str | None
    score: float


@dataclass(frozen=True)
class Comparison:
    """One prompt and seed: the first model's image and another's, and what the other gained."""

    prompt: str
    seed: int
    gain: float
    looks: list[Look]


@dataclass(frozen=True)
class Section:
    """One model against the first by one metric at one step count."""

    metric: str
    model: str
    steps: int
    better: float
    worse: float
    losses: list[Comparison]
    gains: list[Comparison]


def write_side_by_side(folder: Path, table: Table, seeds: Sequence[int]) -> Path:
    """Writes `folder`/index.html for `table`. Images are linked, not copied: the page stays in its folder."""
    data = read_scores(folder)
    models = list(dict.fromkeys(row.model for row in table.rows))
    steps = list(dict.fromkeys(row.steps for row in table.rows))
    sections = [
        section(folder, data, metric, models[0], model, count, seeds)
        for metric in table.metrics
        for model in models[1:]
        for count in [max(steps)]  # where images are at their best
    ]
    kept = next((folder / "images").glob("*/*/*.png"), None)
    page = template("side_by_side.html").render(
        kept=kept is not None,
        small=kept is not None and Image.open(kept).width < 128,
        table=table,
        models=models,
        steps=steps,
        seeds=list(seeds),
        cell_text=cell_text,
        parts=list(part_tables(table)),
        sections=[one for one in sections if one.losses or one.gains],
        contact=contact(folder, data, models[0], max(steps), seeds) if len(models) == 1 else [],
    )
    write_atomically(folder / "index.html", page)
    return folder / "index.html"


def _rows(data: dict[str, NDArray[Any]], model: str, steps: int, seeds: Sequence[int]) -> dict[tuple[int, int], int]:
    """Row of the data by (place, seed)."""
    there = np.flatnonzero((data["model"] == model) & (data["steps"] == steps) & np.isin(data["seed"], list(seeds)))
    return {(int(data["place"][i]), int(data["seed"][i])): int(i) for i in there}


def _look(folder: Path, data: dict[str, NDArray[Any]], metric: str, row: int) -> Look:
    model = str(data["model"][row])
    file = image_path(folder, model, int(data["steps"][row]), int(data["seed"][row]), int(data["place"][row]))
    return Look(model, file.relative_to(folder).as_posix() if file.exists() else None, float(data[metric][row]))


def section(
    folder: Path, data: dict[str, NDArray[Any]], metric: str, first: str, other: str, steps: int, seeds: Sequence[int]
) -> Section:
    """The worst losses and best gains of `other` against `first`, worst and best first."""
    before, after = (_rows(data, model, steps, seeds) for model in (first, other))
    pairs = [(before[key], after[key]) for key in before if key in after]
    gain = np.array([data[metric][b] - data[metric][a] for a, b in pairs], dtype=float)
    order = [int(i) for i in np.argsort(gain, kind="stable") if np.isfinite(gain[i])]

    def told(i: int) -> Comparison:
        rows = pairs[i]
        looks = [_look(folder, data, metric, row) for row in rows]
        return Comparison(str(data["prompt"][rows[0]]), int(data["seed"][rows[0]]), float(gain[i]), looks)

    losses = [told(i) for i in order[:SHOWN] if gain[i] < 0]
    gains = [told(i) for i in order[::-1][:SHOWN] if gain[i] > 0]
    scored = max(len(order), 1)
    return Section(metric, other, steps, float((gain > 0).sum() / scored), float((gain < 0).sum() / scored), losses, gains)


def contact(folder: Path, data: dict[str, NDArray[Any]], model: str, steps: int, seeds: Sequence[int]) -> list[tuple[str, str]]:
    """The first kept images of a lone model, with their prompts."""
    rows = [row for _, row in sorted(_rows(data, model, steps, seeds).items())][: 2 * SHOWN]
    files = [image_path(folder, model, steps, int(data["seed"][r]), int(data["place"][r])) for r in rows]
    return [(str(data["prompt"][r]), f.relative_to(folder).as_posix()) for r, f in zip(rows, files, strict=True) if f.exists()]
