"""Curves as inline SVG, in colors that suit a light and a dark page."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

PALETTE = (
    "#2f6fde",
    "#d9822b",
    "#2a9d63",
    "#b44ac0",
    "#c23b3b",
    "#1f9eb0",
    "#8a6d3b",
    "#7d84a0",
    "#8fae2c",
    "#e06c9f",
)
INK = "#123456"  # replaced by the text color of the page
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "flowgrain",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "legend.frameon": False,
}
_LEGEND_WIDTH = 80  # characters
Floats = Sequence[float]


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes:
        x: positions.
        y: values.
        label: entry in the legend.
        low: lower ends of an interval at every position.
        high: upper ends.
        raw: values before smoothing, drawn as a faint line.
        markers: whether to mark every value.
        dashed: whether the line is dashed.
        color: a color of the palette. Default: the next one.
    """

    x: Floats
    y: Floats
    label: str = ""
    low: Floats | None = None
    high: Floats | None = None
    raw: Floats | None = None
    markers: bool = False
    dashed: bool = False
    color: str | None = None


@dataclass(frozen=True)
class Figure:
    """A figure of a page: its title and its SVG."""

    title: str
    svg: str


def draw_figure(
    title: str,
    curves: Sequence[Curve],
    xlabel: str,
    ylabel: str,
    *,
    yscale: Literal["linear", "log"] = "linear",
    ylim: tuple[float, float] | None = None,
) -> Figure:
    """The figure with `curves`. It has no background, and its text has the color of the page."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 3.1), layout="constrained")
        for number, curve in enumerate(curves):
            _draw_curve(axes, curve, curve.color or PALETTE[number % len(PALETTE)])
        axes.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
        if ylim is not None:
            axes.set_ylim(*ylim)
        if all(isinstance(x, int) for curve in curves for x in curve.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        labels = [curve.label for curve in curves if curve.label]
        if labels:
            figure.legend(loc="outside upper left", ncols=_legend_columns(labels), fontsize=8)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = file.getvalue()
    return Figure(title, text[text.index("<svg") :].replace(INK, "currentColor"))


def _legend_columns(labels: Sequence[str]) -> int:
    """Columns of the legend above the axes, with about as many entries in every row."""
    most = max(1, _LEGEND_WIDTH // (max(map(len, labels)) + 6))
    rows = math.ceil(len(labels) / most)
    return math.ceil(len(labels) / rows)


def _draw_curve(axes: Axes, curve: Curve, color: str) -> None:
    if curve.raw is not None:
        axes.plot(curve.x, curve.raw, color=color, alpha=0.3, linewidth=1)
    if curve.low is not None and curve.high is not None:
        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.16, linewidth=0)
    axes.plot(
        curve.x,
        curve.y,
        linestyle="--" if curve.dashed else "-",
        marker="o" if curve.markers else "",
        markersize=4,
        linewidth=2,
        color=color,
        label=curve.label or None,
    )
