"""The page of a comparison: comparison.html in its directory, with the tables as JSON and Markdown.

Shapes: S seeds, K points of a curve.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flowgrain.evaluation.table import json_text
from flowgrain.methods.calibration import calibration_cost
from flowgrain.report.comparison_table import (
    best_label,
    make_tables,
    markdown,
    method_labels,
    shown_metrics,
)
from flowgrain.report.render import data_uri, tiles, write_page
from flowgrain.report.run_data import undamaged
from flowgrain.report.svg import Curve, Figure, draw_figure
from flowgrain.settings import SettingsError
from flowgrain.statistics import confidence_interval
from flowgrain.studies.comparison import Comparison
from flowgrain.studies.entries import plan_entries
from flowgrain.studies.measure import NUM_SHOWN
from flowgrain.studies.results import (
    BASE,
    read_comparison,
    read_result,
    result_file,
    results,
    units_of_step,
)
from flowgrain.training.files import write_atomically
from flowgrain.training.run_files import read_metrics, read_run_config

_AXES = {"units": "cost in units", "updates": "optimizer updates"}


@dataclass(frozen=True)
class RewardSetSection:
    """The part of the page about one reward set.

    Attributes:
        name: label of the reward set.
        tables: rows by number of inference steps.
        best: label of the best method by number of inference steps and metric.
        figures: held-out scores during training.
        prompts: prompts of the images.
        images: label of a method, and its images of the prompts as data URIs.
    """

    name: str
    tables: dict[int, Any]
    best: dict[tuple[int, str], str | None]
    figures: list[Figure]
    prompts: list[str]
    images: list[tuple[str, list[str]]]


def write_comparison(folder: Path) -> Path:
    """Write comparison.json, .md and .html from the finished runs in `folder`.

    Returns:
        The path of the page.

    Raises:
        SettingsError: the directory contains no comparison, or no finished run of it.
    """
    comparison, found = read_comparison(folder), results(folder)
    base = next((result for result in found if result["label"] == BASE), None)
    tables = make_tables(comparison, found)
    if not any(rows for by_steps in tables.values() for rows in by_steps.values()):
        raise SettingsError(
            f"{folder}: no run of this comparison is finished. Continue it with flowgrain compare."
        )
    metrics = shown_metrics(found)
    plain = {
        name: {str(steps): [asdict(row) for row in rows] for steps, rows in by_steps.items()}
        for name, by_steps in tables.items()
    }
    write_atomically(folder / "comparison.json", json_text({"base": base, "tables": plain}))
    text = "\n".join(markdown(base, tables, metrics))
    write_atomically(folder / "comparison.md", text + "\n")
    sections = [
        _section(comparison, folder, name, by_steps, metrics)
        for name, by_steps in tables.items()
        if any(by_steps.values())
    ]
    values = {
        "comparison": comparison,
        "base": base,
        "metrics": metrics,
        "sections": sections,
        "finished": len(found),
        "planned": len(plan_entries(comparison)) + 1,
        "open_steps": _middle_steps(comparison),
    }
    return write_page(folder / "comparison.html", "comparison.html", values)


def _section(
    comparison: Comparison,
    folder: Path,
    reward_set: str,
    tables: dict[int, Any],
    metrics: list[str],
) -> RewardSetSection:
    runs = finished_runs(comparison, folder, reward_set)
    prompts, images = _images(comparison, folder, runs)
    return RewardSetSection(
        name=reward_set,
        tables=tables,
        best={
            (steps, metric): best_label(rows, metric)
            for steps, rows in tables.items()
            for metric in metrics
        },
        figures=_figures(comparison, runs),
        prompts=prompts,
        images=images,
    )


def finished_runs(comparison: Comparison, folder: Path, reward_set: str) -> dict[str, list[Path]]:
    """The directories of the finished runs on `reward_set`, by method."""
    runs: dict[str, list[Path]] = {label: [] for label in method_labels(comparison)}
    for entry in plan_entries(comparison):
        file = result_file(folder, entry.name)
        if entry.reward_set == reward_set and read_result(file) is not None:
            runs[entry.label].append(file.parent)
    return {label: folders for label, folders in runs.items() if folders}


@dataclass(frozen=True)
class CurvePoint:
    """An evaluation during training: the cost and the updates so far, and the value of a metric."""

    units: float
    updates: float
    value: float


def curve_points(run: Path) -> dict[str, list[CurvePoint]]:
    """The evaluations of a run by reward, trained rewards first."""
    config = read_run_config(run)
    num_rewards, num_steps = len(config.rewards), config.sampling.num_steps
    units, updates = calibration_cost(config.method, num_steps, num_rewards).units, 0.0
    evaluated = (*config.rewards, *config.evaluation.rewards)
    points: dict[str, list[CurvePoint]] = {reward.name: [] for reward in evaluated}
    for line in read_metrics(run):
        if "forward_passes" in line:
            units += units_of_step(line, num_rewards)
            updates += line["updates"]
        for metric, of_metric in points.items():
            if f"eval/{metric}" in line:
                of_metric.append(CurvePoint(units, updates, line[f"eval/{metric}"]))
    return points


def _figures(comparison: Comparison, runs: dict[str, list[Path]]) -> list[Figure]:
    """Held-out scores during training, mean over seeds, against the cost and the updates."""
    if not comparison.curve_points:
        return []
    of_runs = {label: [curve_points(run) for run in folders] for label, folders in runs.items()}
    metrics = dict.fromkeys(m for seeds in of_runs.values() for points in seeds for m in points)
    figures = []
    for metric in metrics:
        for axis, xlabel in _AXES.items():
            curves = []
            for label, seeds in of_runs.items():
                of_seeds = [points.get(metric, []) for points in seeds]
                if min(map(len, of_seeds)):
                    curves.append(_mean_curve(label, of_seeds, axis))
            if curves:
                title = f"{metric} by {xlabel}"
                figures.append(draw_figure(title, curves, xlabel, f"held-out {metric}"))
    return figures


def _mean_curve(label: str, of_seeds: list[list[CurvePoint]], axis: str) -> Curve:
    """Mean and 95% confidence interval over seeds, at the points that all seeds have."""
    length = min(map(len, of_seeds))
    values = np.array([[point.value for point in points[:length]] for points in of_seeds])  # [S, K]
    x = np.mean([[getattr(point, axis) for point in points[:length]] for points in of_seeds], 0)
    intervals = [confidence_interval(column) for column in values.T]
    several = len(of_seeds) > 1
    return Curve(
        x=x.tolist(),
        y=[interval.mean for interval in intervals],
        label=label,
        low=[interval.low for interval in intervals] if several else None,
        high=[interval.high for interval in intervals] if several else None,
        markers=True,
    )


def _middle_steps(comparison: Comparison) -> int:
    """The number of inference steps that the page shows first."""
    steps = sorted(comparison.measurement.num_steps)
    return steps[len(steps) // 2]


def _images(
    comparison: Comparison, folder: Path, runs: dict[str, list[Path]]
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Prompts, and the images of them by the base model and by every method's first seed."""
    prompts: list[str] = []
    rows = []
    name = f"pictures-{_middle_steps(comparison)}.png"
    base = result_file(folder, BASE).parent
    first_runs = {BASE: base, **{label: folders[0] for label, folders in runs.items()}}
    for label, run in first_runs.items():
        own = (read_result(run / "result.json") or {}).get("prompts", [])
        sheet = undamaged(run / name, partial(tiles, columns=NUM_SHOWN, count=len(own)))
        if sheet:
            prompts = prompts or own
            rows.append((label, [data_uri(tile) for tile in sheet]))
    return prompts, rows
