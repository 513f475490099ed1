"""Draw the curve of every method of a comparison for the documentation.

    python scripts/method_curves.py comparisons/full [--out docs/images]

Each figure shows held-out rewards against cost: one method in color with its 95% confidence
interval, the others in gray.
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
from flowgrain.report.comparison import finished_runs
from flowgrain.statistics import confidence_interval
from flowgrain.studies.results import read_comparison, units_of_step
from flowgrain.training.run_files import read_metrics, read_run_config

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


def draw(axes: Axes, curves: Sequence[Curve], highlight: bool) -> None:
    """Draw the mean of the curves of a method over seeds."""
    length = min(map(len, curves))
    values = np.array([points[:length] for points in curves])  # [S, K, 2]
    x, intervals = values[:, :, 0].mean(0), [confidence_interval(v) for v in values[:, :, 1].T]
    color, width = (LIGHT["noise"], 2.0) if highlight else (LIGHT["ode"], 0.9)
    axes.plot(x, [i.mean for i in intervals], color=color, lw=width, zorder=1 + highlight)
    if highlight and len(values) > 1:
        low, high = [i.low for i in intervals], [i.high for i in intervals]
        axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def method_figure(curves: Mapping[str, Mapping[str, Sequence[Curve]]], label: str) -> Figure:
    """The figure of method `label`. `curves` are by metric and by method."""
    figure, places = plt.subplots(1, len(curves), figsize=(8, 2.7), layout="constrained")
    for axes, (metric, of_methods) in zip(np.atleast_1d(places), curves.items(), strict=True):
        for method, of_seeds in of_methods.items():
            draw(axes, of_seeds, method == label)
        axes.set_xlabel("cost in units", color=LIGHT["muted"])
        axes.set_ylabel(f"held-out {metric}", color=LIGHT["muted"])
        axes.tick_params(colors=LIGHT["muted"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LIGHT["grid"])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path, help="directory of a comparison")
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
    for label in runs:
        save(method_figure(curves, label), args.out / f"curve-{label}.svg")


if __name__ == "__main__":
    main()
