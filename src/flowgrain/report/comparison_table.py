"""The tables of a comparison: means over seeds with confidence intervals, and paired differences.

Shapes: S seeds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flowgrain.statistics import Interval, confidence_interval
from flowgrain.studies.comparison import Comparison
from flowgrain.studies.entries import plan_entries
from flowgrain.studies.results import Result, by_seed

LOWER_IS_BETTER = ("frechet",)
NO_BEST = ("diversity",)
"""Metrics without a best value. Images of noise also have a high diversity."""

Tables = Mapping[str, Mapping[int, "list[Row]"]]
"""Rows by reward set and by number of inference steps."""


@dataclass(frozen=True)
class Row:
    """A method, trained on one reward set and measured at one number of inference steps.

    Attributes:
        label: the method.
        baseline: the method with which the row is compared.
        seeds: number of finished runs.
        rollouts: mean number of rollouts of a run.
        updates: mean number of optimizer updates of a run.
        seconds: mean training time of a run in seconds.
        metrics: mean over seeds by metric.
        differences: mean difference to the baseline by metric, paired by seed.
        diverged: number of runs whose training diverged.
    """

    label: str
    baseline: str
    seeds: int
    rollouts: float
    updates: float
    seconds: float
    metrics: dict[str, Interval]
    differences: dict[str, Interval]
    diverged: int


def method_labels(comparison: Comparison) -> list[str]:
    """The labels of the methods, in the order of the table."""
    return list(dict.fromkeys(entry.label for entry in plan_entries(comparison)))


def make_tables(comparison: Comparison, found: Sequence[Result]) -> dict[str, dict[int, list[Row]]]:
    """All tables of a comparison. A table without finished runs is empty.

    Args:
        comparison: what is compared.
        found: results of the finished runs.
    """
    labels = method_labels(comparison)
    return {
        reward_set: {
            num_steps: make_rows(comparison, labels, found, reward_set, num_steps)
            for num_steps in comparison.measurement.num_steps
        }
        for reward_set in comparison.rewards
    }


def make_rows(
    comparison: Comparison,
    labels: Sequence[str],
    found: Sequence[Result],
    reward_set: str,
    num_steps: int,
) -> list[Row]:
    """A row for every method with a finished run on `reward_set`, measured at `num_steps`."""
    rows = []
    for label in labels:
        runs = [r for r in found if r["label"] == label and r["reward_set"] == reward_set]
        if not runs:
            continue
        baseline = comparison.baselines.get(label, labels[0])
        metrics, differences = {}, {}
        for metric in runs[0]["steps"][str(num_steps)]:
            own = by_seed(found, label, reward_set, num_steps, metric)
            other = by_seed(found, baseline, reward_set, num_steps, metric)
            both = [own[seed] - other[seed] for seed in own if seed in other]
            metrics[metric] = confidence_interval(np.array(list(own.values())))
            differences[metric] = confidence_interval(np.array(both, dtype=float))
        rows.append(
            Row(
                label=label,
                baseline=baseline,
                seeds=len(runs),
                rollouts=float(np.mean([run["rollouts"] for run in runs])),
                updates=float(np.mean([run["updates"] for run in runs])),
                seconds=float(np.mean([run["seconds"] for run in runs])),
                metrics=metrics,
                differences=differences,
                diverged=sum(bool(run["stopped"]) for run in runs),
            )
        )
    return rows


def best_label(rows: Sequence[Row], metric: str) -> str | None:
    """The method with the best mean of `metric`. None if the metric has no best value."""
    if metric in NO_BEST:
        return None
    sign = -1 if metric in LOWER_IS_BETTER else 1
    means = {row.label: sign * row.metrics[metric].mean for row in rows if metric in row.metrics}
    return max(means, key=lambda label: means[label], default=None)


def markdown(base: Result | None, tables: Tables, metrics: Sequence[str]) -> Iterator[str]:
    """The tables as Markdown, line by line.

    A cell is the mean ± half of the 95% confidence interval, and in brackets the interval of the
    difference to the baseline.

    Args:
        base: result of the base model, if it was measured.
        tables: the tables.
        metrics: metrics to show.
    """
    for reward_set, by_steps in tables.items():
        for num_steps, rows in by_steps.items():
            yield f"Trained on {reward_set}, {num_steps} inference steps"
            yield ""
            yield _line("method", "seeds", *metrics, "updates")
            yield f"|{'---|' * (len(metrics) + 3)}"
            if base is not None:
                values = base["steps"][str(num_steps)]
                yield _line("base", "", *(f"{values.get(m, math.nan):.3f}" for m in metrics), "")
            for row in rows:
                name = f"{row.label} ({row.diverged} diverged)" if row.diverged else row.label
                cells = [_cell(row, metric) for metric in metrics]
                yield _line(name, str(row.seeds), *cells, f"{row.updates:.0f}")
            yield ""


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(row: Row, metric: str) -> str:
    if metric not in row.metrics:
        return "-"
    value, difference = row.metrics[metric], row.differences[metric]
    if row.seeds < 2:
        return f"{value.mean:.3f}"
    cell = f"{value.mean:.3f} ± {(value.high - value.low) / 2:.3f}"
    if row.baseline == row.label:
        return cell
    return f"{cell} [{difference.low:+.3f}, {difference.high:+.3f}]"


def shown_metrics(found: Sequence[Result]) -> list[str]:
    """The metrics of all results without their parts. Rewards come first."""
    values = [by_metric for result in found for by_metric in result["steps"].values()]
    names = dict.fromkeys(name for by_metric in values for name in by_metric)
    return [name for name in names if "/" not in name]
