"""The curve of every method of a comparison, for its page in docs: held-out metrics against cost, the others faint behind it.

python benchmarks/method_curves.py comparisons/full docs/images
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt

from flowgrain.training.evaluate import interval
from flowgrain.report.comparison import curve_of, finished_runs, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    c = load(args.comparison)
    reward_set, rewards = next(iter(c.rewards.items()))
    runs = finished_runs(c, args.comparison, reward_set)
    plt.rcParams |= {"svg.hashsalt": "flowgrain", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    for label in runs:
        figure, both = plt.subplots(1, 2, figsize=(8, 2.7), layout="constrained")
        for axes, metric in zip(both, (str(rewards).split(",")[0], "oracle"), strict=True):
            for other in sorted(runs, key=lambda name: name == label):
                found = [curve_of(out, metric) for out in runs[other]]
                each = np.array([curve[: min(map(len, found))] for curve in found])  # (seeds, points, 3)
                where, bounds = each[:, :, 0].mean(0), np.array([interval(values) for values in each[:, :, 2].T])
                mine = other == label
                axes.plot(
                    where, bounds[:, 0], color="#2f6fde" if mine else "#b9bdc6", lw=2 if mine else 0.9, zorder=2 if mine else 1
                )
                if mine and len(each) > 1:
                    axes.fill_between(where, bounds[:, 1], bounds[:, 2], color="#2f6fde", alpha=0.15)
            axes.set(xlabel="units (forward passes, decodes, reward calls)", ylabel=f"held-out {metric}")
        figure.suptitle(
            f"{label}: mean of {len(runs[label])} seeds and 95% interval, trained on {reward_set}; grey: the others", fontsize=9
        )
        figure.savefig(args.out / f"curve-{label}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
