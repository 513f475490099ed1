"""The table of an evaluation: means with confidence intervals, and differences to the first model.

Shapes: I images, K pairs of place and seed, P distinct prompts.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowgrain.core.tree import Ints
from flowgrain.evaluation.published import PublishedRow, published
from flowgrain.evaluation.request import read_record
from flowgrain.evaluation.storage import PART_WEIGHT, Columns, read_scores
from flowgrain.settings import SettingsError
from flowgrain.statistics import Interval, confidence_interval
from flowgrain.training.evaluate import mean

Floats = NDArray[np.floating[Any]]
Parts = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Cell:
    """One metric of one model.

    Attributes:
        value: mean over prompts.
        difference: mean difference to the first model, paired by prompt. None for the first model.
        scored: number of images with a score.
        failed: number of images without a score.
    """

    value: Interval
    difference: Interval | None
    scored: int
    failed: int


@dataclass(frozen=True)
class Row:
    """One model at one number of steps: cells by metric, means of parts by metric and part."""

    model: str
    steps: int
    cells: dict[str, Cell]
    parts: Parts


@dataclass(frozen=True)
class Table:
    """A table of an evaluation.

    Attributes:
        metrics: names of the metrics.
        rows: rows by number of steps. The first row of each number is the baseline of the others.
        published: rows from papers.
        mean_of_parts: metrics whose overall result is the mean over parts.
    """

    metrics: list[str]
    rows: list[Row]
    published: list[PublishedRow]
    mean_of_parts: list[str]

    def to_json(self) -> str:
        """The table as JSON. Numbers that are not known are null."""
        return json_text(asdict(self))


class _Images(NamedTuple):
    """All scored images of an evaluation.

    Attributes:
        columns: columns [I].
        pair: number [I] of the image's place and seed.
        prompt: number [K] of the prompt of every pair.
    """

    columns: Columns
    pair: Ints
    prompt: Ints


def make_table(
    folder: Path,
    models: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> Table:
    """The table of the evaluation in `folder`.

    Intervals are over distinct prompts. The images of a prompt are averaged first.

    Args:
        folder: output directory of the evaluation.
        models: labels of models to include. Default: all.
        steps: numbers of steps to include. Default: all.
        seeds: seeds to include. Default: all.

    Raises:
        SettingsError: the directory contains no evaluation.
    """
    record = read_record(folder)
    images = _numbered(read_scores(folder))
    columns, metrics = images.columns, record["metrics"]
    for metric in metrics:
        if metric not in columns:
            raise SettingsError(f"{folder}: no file in scores/ has a column {metric!r}.")
    models = list(record["models"]) if models is None else models
    steps = sorted(set(columns["steps"].tolist())) if steps is None else steps
    rows = []
    for count in steps:
        baseline: dict[str, Floats] | None = None
        for model in models:
            chosen = (columns["model"] == model) & (columns["steps"] == count)
            if seeds is not None:
                chosen &= np.isin(columns["seed"], list(seeds))
            if not chosen.any():
                continue
            values = {metric: _by_pair(images, metric, chosen) for metric in metrics}
            cells = {metric: _cell(images, metric, chosen, values, baseline) for metric in metrics}
            baseline = baseline or values
            parts = _part_means(columns, chosen, metrics, record["mean_of_parts"])
            rows.append(Row(model, count, cells, parts))
    first_parts = rows[0].parts if rows else {}
    names = [*metrics, *(f"{m}/{part}" for m in metrics for part in first_parts.get(m, {}))]
    of_papers = published(record["settings"]["model"]["name"], names, steps)
    return Table(metrics, rows, of_papers, record["mean_of_parts"])


def _numbered(columns: Columns) -> _Images:
    texts = columns["prompt"].tolist()
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    of_image = np.array([number[text] for text in texts])
    place_and_seed = np.stack([columns["place"], columns["seed"]], 1)
    pair = np.unique(place_and_seed, axis=0, return_inverse=True)[1].reshape(-1)
    prompt = np.zeros(pair.max() + 1, dtype=np.int64)
    prompt[pair] = of_image
    return _Images(columns, pair, prompt)


def _by_pair(images: _Images, metric: str, chosen: NDArray[np.bool_]) -> Floats:
    """Scores [K] of the `chosen` images [I] by pair of place and seed, NaN for other pairs."""
    values = np.full(len(images.prompt), np.nan)
    values[images.pair[chosen]] = images.columns[metric][chosen]
    return values


def _cell(
    images: _Images,
    metric: str,
    chosen: NDArray[np.bool_],
    values: Mapping[str, Floats],
    baseline: Mapping[str, Floats] | None,
) -> Cell:
    scores = images.columns[metric][chosen]
    difference = None
    if baseline is not None:
        # If an image has no score for one model, it is left out for the other model too.
        gains = values[metric] - baseline[metric]
        difference = confidence_interval(_by_prompt(gains, images.prompt))
    return Cell(
        value=confidence_interval(_by_prompt(values[metric], images.prompt)),
        difference=difference,
        scored=int(np.isfinite(scores).sum()),
        failed=int(np.isnan(scores).sum()),
    )


def _by_prompt(values: Floats, prompt: Ints) -> Floats:
    """Mean [P] of the finite `values` [K] of every prompt, NaN for a prompt without values."""
    finite, count = np.isfinite(values), int(prompt.max()) + 1
    total = np.bincount(prompt[finite], weights=values[finite], minlength=count)
    number = np.bincount(prompt[finite], minlength=count)
    means: Floats = np.divide(total, number, out=np.full(count, np.nan), where=number > 0)
    return means


def _part_means(
    columns: Columns,
    chosen: NDArray[np.bool_],
    metrics: Sequence[str],
    mean_of_parts: Sequence[str],
) -> Parts:
    means: Parts = {}
    for metric in metrics:
        of_metric = {}
        for name in columns:
            if not name.startswith(f"{metric}/") or name.endswith(PART_WEIGHT):
                continue
            weights = columns.get(f"{name}{PART_WEIGHT}")
            of_images = None if weights is None else weights[chosen].astype(float)
            value = mean(columns[name][chosen].astype(float), of_images)
            if math.isfinite(value):
                of_metric[name.removeprefix(f"{metric}/")] = value
        if of_metric and metric in mean_of_parts:
            of_metric = {"overall": float(np.mean(list(of_metric.values()))), **of_metric}
        if of_metric:
            means[metric] = of_metric
    return means


def json_text(values: Mapping[str, Any]) -> str:
    """Plain nested values as JSON, with null for numbers that are not finite."""
    return json.dumps(_finite(values), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


class PartTable(NamedTuple):
    """The parts of one metric as text.

    Attributes:
        metric: name of the metric.
        names: names of the parts.
        lines: model, steps, and the value of every part.
    """

    metric: str
    names: list[str]
    lines: list[tuple[str, str, list[str]]]


def part_tables(table: Table) -> Iterator[PartTable]:
    """The parts of every metric that has parts."""
    for metric in table.metrics:
        of_rows = [row.parts.get(metric, {}) for row in table.rows]
        names = list(dict.fromkeys(name for parts in of_rows for name in parts))
        if not names:
            continue
        lines = [
            (row.model, str(row.steps), [_number(parts.get(name)) for name in names])
            for row, parts in zip(table.rows, of_rows, strict=True)
            if parts
        ]
        for row in table.published:
            values = [row.scores.get(f"{metric}/{name}") for name in names]
            if any(value is not None for value in values):
                lines.append((*_published_name(row), [_number(value) for value in values]))
        yield PartTable(metric, names, lines)


def cell_lines(cell: Cell, wide: bool = False) -> list[str]:
    """The lines of a cell: mean, interval, difference, its interval, number of unscored images.

    Args:
        cell: the cell.
        wide: whether an interval is on the line of its mean.
    """
    intervals = [_interval_lines(cell.value, "")]
    if cell.difference is not None:
        mean, *interval = _interval_lines(cell.difference, "+")
        intervals.append([f"Δ {mean}", *interval])
    lines = [line for parts in intervals for line in ([" ".join(parts)] if wide else parts)]
    return [*lines, f"{cell.failed} not scored"] if cell.failed else lines


def _interval_lines(interval: Interval, sign: str) -> list[str]:
    if not math.isfinite(interval.mean):
        return ["-"]
    lines = [f"{interval.mean:{sign}.3f}"]
    if math.isfinite(interval.low):
        lines.append(f"[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]")
    return lines


def markdown(table: Table) -> str:
    """The table and the tables of its parts as Markdown. Δ: difference to the first model."""
    lines = [_line("model", "steps", *table.metrics), _rule(2 + len(table.metrics))]
    for row in table.rows:
        cells = ["<br>".join(cell_lines(row.cells[metric], wide=True)) for metric in table.metrics]
        lines.append(_line(row.model, str(row.steps), *cells))
    for published_row in table.published:
        scores = [published_row.scores.get(metric) for metric in table.metrics]
        if any(score is not None for score in scores):
            lines.append(_line(*_published_name(published_row), *map(_number, scores)))
    for metric, names, values in part_tables(table):
        lines += ["", f"Parts of {metric}", "", _line("model", "steps", *names)]
        lines += [_rule(2 + len(names))]
        lines += [_line(model, steps, *of_row) for model, steps, of_row in values]
    return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return f"|{'---|' * columns}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _published_name(row: PublishedRow) -> tuple[str, str]:
    return f"{row.label} (published, {row.paper})", str(row.steps or "-")
