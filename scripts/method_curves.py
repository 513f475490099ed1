"""Draw the methods of a comparison for the documentation: a figure of all, and a curve of each.

    python scripts/method_curves.py comparisons/full
    python scripts/method_curves.py comparisons/family --beside diffusionnft,g2rpo,mixgrpo

comparison-NAME.svg shows the final measurement of all methods. curve-METHOD.svg shows held-out
rewards against cost: one method in color with its 95% confidence interval, the others in gray.
With --beside, only the named methods are shown in gray, and get no figure of their own.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from figure_style import LIGHT, save
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowgrain.config import Config
from flowgrain.methods.calibration import calibration_cost
from flowgrain.records.metrics import read_metrics
from flowgrain.report.comparison import finished_runs
from flowgrain.statistics import confidence_interval
from flowgrain.studies.results import (
    BASE,
    Result,
    by_seed,
    read_comparison,
    results,
    units_of_step,
)
from flowgrain.training.run_files import read_run_config

ORACLE = "oracle"

Curve = list[tuple[float, float]]


def curve(run: Path, config: Config, metric: str) -> Curve:
    """(cost in units, held-out value) at every evaluation of a run."""
    num_rewards = len(config.rewards)
    units = calibration_cost(config.method, config.sampling.num_steps, num_rewards).units
    points = []
    for line in read_metrics(run):
        if "forward_passes" in line:
            units += units_of_step(line, num_rewards)
        if f"eval/{metric}" in line:
            points.append((units, line[f"eval/{metric}"]))
    return points


def draw(axes: Axes, curves: Sequence[Curve], highlight: bool, name: str = "") -> None:
    """Draw the mean of the curves of a method over seeds, with its name at the end."""
    length = min(map(len, curves))
    values = np.array([points[:length] for points in curves])  # [S, K, 2]
    x, intervals = values[:, :, 0].mean(0), [confidence_interval(v) for v in values[:, :, 1].T]
    color, width = (LIGHT["noise"], 2.0) if highlight else (LIGHT["ode"], 0.9)
    axes.plot(x, [i.mean for i in intervals], color=color, lw=width, zorder=1 + highlight)
    if name:
        end = (x[-1], intervals[-1].mean)
        style = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
        axes.annotate(name, end, color=LIGHT["muted"], annotation_clip=False, **style)
    if highlight and len(values) > 1:
        low, high = [i.low for i in intervals], [i.high for i in intervals]
        axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def method_figure(
    curves: Mapping[str, Mapping[str, Sequence[Curve]]], label: str, named: Sequence[str]
) -> Figure:
    """The figure of method `label`. `curves` are by metric and by method.

    If `named` is not empty, it lists the only other methods of the figure.
    """
    figure, places = plt.subplots(1, len(curves), figsize=(8, 2.7), layout="constrained")
    for axes, (metric, of_methods) in zip(np.atleast_1d(places), curves.items(), strict=True):
        for method, of_seeds in of_methods.items():
            if method == label or method in named or not named:
                draw(axes, of_seeds, method == label, method if method in named else "")
        axes.set_xlabel("cost in units", color=LIGHT["muted"])
        axes.set_ylabel(f"held-out {metric}", color=LIGHT["muted"])
        axes.tick_params(colors=LIGHT["muted"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LIGHT["grid"])
    return figure


def summary_figure(
    found: Sequence[Result], labels: Sequence[str], reward_set: str, metrics: Sequence[str]
) -> Figure:
    """Every metric at the end of training: mean and 95% interval of each method, best first."""
    steps = next(iter(found[0]["steps"]))
    base = next(r["steps"][steps] for r in found if r["label"] == BASE)
    of_metric = {
        metric: {
            label: confidence_interval(
                np.array(list(by_seed(found, label, reward_set, int(steps), metric).values()))
            )
            for label in labels
        }
        for metric in metrics
    }
    order = sorted(labels, key=lambda label: of_metric[metrics[0]][label].mean)
    size = (8, 0.6 + 0.22 * len(labels))
    figure, places = plt.subplots(1, len(metrics), figsize=size, layout="constrained", sharey=True)
    for axes, (metric, intervals) in zip(np.atleast_1d(places), of_metric.items(), strict=True):
        for place, label in enumerate(order):
            interval = intervals[label]
            axes.plot([interval.low, interval.high], [place] * 2, color=LIGHT["noise"], lw=1.5)
            axes.plot(interval.mean, place, "o", color=LIGHT["noise"], ms=4)
        axes.axvline(base[metric], color=LIGHT["muted"], lw=0.8, ls=":")
        axes.annotate(
            "base",
            (base[metric], len(order) - 0.4),
            color=LIGHT["muted"],
            fontsize=7,
            ha="center",
            annotation_clip=False,
        )
        axes.set_xlabel(f"held-out {metric}, {steps} steps", color=LIGHT["muted"])
        axes.tick_params(colors=LIGHT["muted"], length=0)
        axes.grid(axis="y", color=LIGHT["grid"], lw=0.5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(LIGHT["grid"])
    np.atleast_1d(places)[0].set_yticks(range(len(order)), order, color=LIGHT["ink"])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path, help="directory of a comparison")
    parser.add_argument("--beside", type=lambda text: text.split(","), default=[])
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    comparison = read_comparison(args.comparison)
    reward_set, rewards = next(iter(comparison.rewards.items()))
    runs = finished_runs(comparison, args.comparison, reward_set)
    configs = {run: read_run_config(run) for folders in runs.values() for run in folders}
    curves = {
        metric: {
            label: [curve(run, configs[run], metric) for run in folders]
            for label, folders in runs.items()
        }
        for metric in dict.fromkeys([rewards[0].name, ORACLE])
    }
    summary = summary_figure(results(args.comparison), list(runs), reward_set, list(curves))
    save(summary, args.out / f"comparison-{comparison.name}.svg")
    for label in runs:
        if label not in args.beside:
            save(method_figure(curves, label, args.beside), args.out / f"curve-{label}.svg")


if __name__ == "__main__":
    main()
