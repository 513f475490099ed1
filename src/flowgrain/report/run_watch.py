"""Monitors, alarms and the best checkpoint on the page of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flowgrain.monitors import MONITORS
from flowgrain.records import EvaluationRecord
from flowgrain.report.run_data import RunData
from flowgrain.report.svg import Curve, Figure, draw_figure


@dataclass(frozen=True)
class MonitorRow:
    """A monitor at the last evaluation.

    Attributes:
        name: name of the monitor.
        base: mean of the base model.
        difference: paired difference to the base model.
        low: lower end of its 95% interval. NaN: not known.
        high: upper end.
        spreads: the difference in standard deviations of the base model's images. None: the monitor
            is not compared with them.
        unit: unit of the values.
        meaning: what the monitor measures.
    """

    name: str
    base: float
    difference: float
    low: float
    high: float
    spreads: float | None
    unit: str
    meaning: str


def monitor_rows(run: RunData) -> list[MonitorRow]:
    """All monitors of the last evaluation, compared with the base model."""
    if not run.evaluations:
        return []
    first, last = run.evaluations[0], run.evaluations[-1]
    rows = []
    for name, monitor in MONITORS.items():
        if name not in first.monitors or not _is_known(last, name):
            continue
        difference = last.base[name]
        values = np.array(first.monitors[name], dtype=float)
        base = float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
        spreads = _in_spreads(name, difference) if monitor.spread else None
        mean, low, high = (difference.get(key, math.nan) for key in ("mean", "low", "high"))
        rows.append(MonitorRow(name, base, mean, low, high, spreads, monitor.unit, monitor.meaning))
    return rows


def alarm_messages(run: RunData) -> list[str]:
    """The message of every alarm, the first alarm first."""
    return [str(alarm.get("message", alarm)) for alarm in run.alarms]


def monitor_changes(run: RunData) -> Figure | None:
    """Change of every monitor from the base model, in standard deviations of its images."""
    curves = []
    for name, monitor in MONITORS.items():
        points = [
            (evaluation.step, evaluation.base[name])
            for evaluation in run.evaluations
            if _is_known(evaluation, name)
        ]
        if monitor.spread and points:
            steps = [run.evaluations[0].step, *(step for step, _ in points)]
            changes = [0.0, *(_in_spreads(name, difference) for _, difference in points)]
            curves.append(Curve(steps, changes, name, markers=True))
    if not curves:
        return None
    ylabel = "change in standard deviations of the base model"
    return draw_figure("Monitors", curves, "training step", ylabel)


def distance_from_base(run: RunData) -> Figure | None:
    """KL to the base model along its sampling path."""
    means = [
        (evaluation.step, evaluation.base["path_kl"]["mean"])
        for evaluation in run.evaluations
        if _is_known(evaluation, "path_kl")
    ]
    if not means:
        return None
    steps, values = zip(*means, strict=True)
    curve = Curve(list(steps), list(values), markers=True)
    ylabel = MONITORS["path_kl"].unit
    return draw_figure("KL along the sampling path", [curve], "training step", ylabel)


def _is_known(evaluation: EvaluationRecord, name: str) -> bool:
    """Whether the difference of a monitor to the base model is known."""
    return math.isfinite(evaluation.base.get(name, {}).get("mean", math.nan))


def _in_spreads(name: str, difference: Mapping[str, float]) -> float:
    spread = difference.get("std", math.nan)
    least = MONITORS[name].least
    return difference["mean"] / (max(spread, least) if math.isfinite(spread) else least)
