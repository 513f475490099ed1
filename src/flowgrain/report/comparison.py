"""The table and the page of a comparison.

Letters: S seeds, R finished runs.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes

from flowgrain.methods.calibration import calibration_price
from flowgrain.training.checkpoint import write_atomically
from flowgrain.studies.compare import BASE, Comparison, by_seed, entries, results, units_of_step
from flowgrain.training.evaluate import interval
from flowgrain.training.recorder import read_settings
from flowgrain.report.curves import picture
from flowgrain.report.page import data_uri, template, tiles
from flowgrain.config.schema import SettingsError

SMALLER_IS_BETTER = ("frechet",)
Number = tuple[float, float, float]  # mean and the ends of its 95% interval


@dataclass(frozen=True)
class Row:
    """One method on one reward set at one number of inference steps: each metric, and its difference to the baseline."""

    label: str
    baseline: str
    seeds: int
    rollouts: float
    updates: float
    seconds: float
    metrics: dict[str, Number]
    against: dict[str, Number]
    stopped: int


def load(folder: Path) -> Comparison:
    """The comparison that `folder` holds. Raises SettingsError if there is none."""
    try:
        return Comparison(**yaml.safe_load((folder / "comparison.yaml").read_text(encoding="utf-8"))["comparison"])
    except OSError:
        raise SettingsError(f"{folder}: there is no comparison here (no comparison.yaml)") from None


def labels(c: Comparison) -> list[str]:
    """The methods, as the table names them, in its order."""
    return list(dict.fromkeys(entry.label for entry in entries(c)))


def table(c: Comparison, found: Sequence[Mapping[str, Any]], reward_set: str, num_steps: int) -> list[Row]:
    """Mean and 95% interval over seeds of every metric, and of the difference to the baseline, paired by seed."""
    rows = []
    names = labels(c)
    for label in names:
        runs = [r for r in found if r["label"] == label and r["reward_set"] == reward_set]
        if not runs:
            continue
        metrics, against, baseline = {}, {}, c.baselines.get(label, names[0])
        for metric in runs[0]["steps"][str(num_steps)]:
            own = by_seed(found, label, reward_set, num_steps, metric)
            first = by_seed(found, baseline, reward_set, num_steps, metric)
            both = [own[seed] - first[seed] for seed in own if seed in first]
            metrics[metric] = interval(np.array(list(own.values())))
            against[metric] = interval(np.array(both))
        mean = {key: float(np.mean([r[key] for r in runs])) for key in ("rollouts", "updates", "seconds")}
        stopped = sum(bool(r["stopped"]) for r in runs)
        rows.append(Row(label, baseline, len(runs), **mean, metrics=metrics, against=against, stopped=stopped))
    return rows


def write_comparison(folder: Path) -> Path:
    """Writes comparison.json, .md and .html into `folder` from its finished runs. Raises SettingsError if there is none."""
    c, found = load(folder), results(folder)
    base = next((r for r in found if r["label"] == BASE), None)
    tables = {
        reward_set: {num_steps: table(c, found, reward_set, num_steps) for num_steps in c.eval_steps} for reward_set in c.rewards
    }
    if not any(rows for of_steps in tables.values() for rows in of_steps.values()):
        raise SettingsError(f"{folder}: no run of this comparison is finished yet; go on with `flowgrain compare`")
    plain = {name: {str(n): [vars(row) for row in rows] for n, rows in of_steps.items()} for name, of_steps in tables.items()}
    write_atomically(folder / "comparison.json", json.dumps({"base": base, "tables": plain}, indent=1))
    shown = sorted({metric for r in found for of_steps in r["steps"].values() for metric in of_steps if "/" not in metric})
    write_atomically(folder / "comparison.md", "".join(markdown(base, tables, shown)))
    page = template("comparison.html").render(
        c=c,
        base=base,
        tables=tables,
        metrics=shown,
        best={
            (name, n, m): _best(rows, m)
            for name, of_steps in tables.items()
            for n, rows in of_steps.items()
            for m in shown
            if rows and m != "diversity"  # more of it is not better by itself: noise is diverse
        },
        curves={reward_set: curves(c, folder, reward_set) for reward_set in c.rewards},
        pictures={reward_set: pictures(c, folder, reward_set) for reward_set in c.rewards},
        finished=len(found),
        planned=len(entries(c)) + 1,
    )
    write_atomically(folder / "comparison.html", page)
    return folder / "comparison.html"


def markdown(
    base: Mapping[str, Any] | None, tables: Mapping[str, Mapping[int, list[Row]]], metrics: Sequence[str]
) -> Iterator[str]:
    """The tables as text: mean ± half of the 95% interval, and in brackets the interval of the difference to the first method."""
    for reward_set, of_steps in tables.items():
        for num_steps, rows in of_steps.items():
            yield f"Trained on {reward_set}, {num_steps} inference steps\n\n"
            yield f"| method | seeds | {' | '.join(metrics)} | updates |\n|{'---|' * (len(metrics) + 3)}\n"
            if base is not None:
                before = [f"{base['steps'][str(num_steps)].get(m, math.nan):.3f}" for m in metrics]
                yield f"| base | | {' | '.join(before)} | |\n"
            for row in rows:
                cells = []
                for m in metrics:
                    if m not in row.metrics:
                        cells.append("-")
                        continue
                    mean, low, high = row.metrics[m]
                    several = row.seeds > 1
                    cell = f"{mean:.3f}" + (f" ± {(high - low) / 2:.3f}" if several else "")
                    _, low, high = row.against[m]
                    cells.append(cell + (f" [{low:+.3f}, {high:+.3f}]" if several and row.baseline != row.label else ""))
                told = f"{row.label} ({row.stopped} diverged)" if row.stopped else row.label
                yield f"| {told} | {row.seeds} | {' | '.join(cells)} | {row.updates:.0f} |\n"
            yield "\n"


def _best(rows: Sequence[Row], metric: str) -> str:
    """The method with the best mean of `metric`; none where it was not measured."""
    sign = -1 if metric in SMALLER_IS_BETTER else 1
    return max((row for row in rows if metric in row.metrics), key=lambda row: sign * row.metrics[metric][0], default=rows[0]).label


def finished_runs(c: Comparison, folder: Path, reward_set: str) -> dict[str, list[Path]]:
    """The folders of finished runs on `reward_set`, by method."""
    found: dict[str, list[Path]] = {}
    for entry in entries(c):
        out = folder / "runs" / entry.name
        if entry.reward_set == reward_set and (out / "result.json").exists():
            found.setdefault(entry.label, []).append(out)
    return found


def curve_of(out: Path, metric: str) -> list[tuple[float, float, float]]:
    """(units spent, updates done, value) at every evaluation of a run."""
    s = read_settings(out)
    units, updates = calibration_price(s).units, 0.0
    points = []
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        if "forward_passes" in line:
            units += units_of_step(line, len(s.rewards))
            updates += line["updates"]
        if f"eval/{metric}" in line:
            points.append((units, updates, line[f"eval/{metric}"]))
    return points


def curves(c: Comparison, folder: Path, reward_set: str) -> list[tuple[str, str]]:
    """Held-out metrics while training, mean over seeds with the 95% interval, against cost and against updates."""
    if not c.curve_points:
        return []
    runs = finished_runs(c, folder, reward_set)
    drawn = []
    if not runs:
        return []
    trained = read_settings(next(iter(runs.values()))[0]).rewards
    for metric in dict.fromkeys([*trained, "oracle"]):
        for axis, title in ((0, "units (see above)"), (1, "optimizer updates")):

            def draw(axes: Axes, metric: str = metric, axis: int = axis, title: str = title) -> None:
                for label, folders in runs.items():
                    each = [curve_of(out, metric) for out in folders]
                    length = min(map(len, each))
                    if not length:
                        continue
                    values = np.array([[point[2] for point in points[:length]] for points in each])  # (S, points)
                    where = np.mean([[point[axis] for point in points[:length]] for points in each], 0)
                    bounds = np.array([interval(column) for column in values.T])
                    (line,) = axes.plot(where, bounds[:, 0], "o-", lw=1.8, ms=3, label=label)
                    if len(each) > 1:
                        axes.fill_between(where, bounds[:, 1], bounds[:, 2], color=line.get_color(), alpha=0.13)
                axes.set(xlabel=title, ylabel=f"held-out {metric}")
                axes.legend(fontsize=7)

            drawn.append((f"{metric} against {title.split(' (')[0]}", picture(draw)))
    return drawn


def pictures(c: Comparison, folder: Path, reward_set: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Prompts, and for each method the images of its first seed: the same noise in a column."""
    prompts: list[str] = []
    rows = []
    num_steps = 16 if 16 in c.eval_steps else c.eval_steps[0]
    base = folder / "runs" / BASE
    for label, out in [(BASE, base), *((label, found[0]) for label, found in finished_runs(c, folder, reward_set).items())]:
        if (out / f"pictures-{num_steps}.png").exists():
            rows.append((label, [data_uri(tile) for tile in tiles(out / f"pictures-{num_steps}.png", 8)]))
            prompts = prompts or json.loads((out / "result.json").read_text()).get("prompts", [])
    return prompts, rows
