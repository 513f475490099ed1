"""Monitors, alarms and the best checkpoint on the page of a run."""

import math
from dataclasses import dataclass

import numpy as np

from flowgrain.monitors import MONITORS
from flowgrain.report.run_data import RunData, SavedDifference
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
        difference = last.base.get(name)
        if difference is None or difference.mean is None or name not in first.monitors:
            continue
        values = np.array(first.monitors[name], dtype=float)
        base = float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
        spreads = _in_spreads(name, difference) if monitor.spread else None
        low, high = (math.nan if v is None else v for v in (difference.low, difference.high))
        rows.append(
            MonitorRow(
                name, base, difference.mean, low, high, spreads, monitor.unit, monitor.meaning
            )
        )
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
            if name in evaluation.base and evaluation.base[name].mean is not None
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
        (evaluation.step, difference.mean)
        for evaluation in run.evaluations
        if (difference := evaluation.base.get("path_kl")) and difference.mean is not None
    ]
    if not means:
        return None
    steps, values = zip(*means, strict=True)
    curve = Curve(list(steps), list(values), markers=True)
    ylabel = MONITORS["path_kl"].unit
    return draw_figure("KL along the sampling path", [curve], "training step", ylabel)


def _in_spreads(name: str, difference: SavedDifference) -> float:
    spread = max(difference.std or 0.0, MONITORS[name].least)
    return (difference.mean or 0.0) / spread
