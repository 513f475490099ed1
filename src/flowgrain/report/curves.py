"""Curves as inline SVG, drawn twice: for a light page and for a dark one."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

PALETTE = ("#2f6fde", "#d9822b", "#2a9d63", "#b44ac0", "#c23b3b", "#1f9eb0", "#8a6d3b", "#7d84a0", "#8fae2c", "#e06c9f")


@dataclass(frozen=True)
class Picture:
    """The same drawing in two colour schemes, as SVG text."""

    light: str
    dark: str


def _svg(draw: Callable[[Axes], None], ink: str, ground: str) -> str:
    style = {
        "svg.hashsalt": "flowgrain",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.facecolor": ground,
        "figure.facecolor": ground,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
        "font.size": 10,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(5.2, 3.1), layout="constrained")
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = file.getvalue()
    return text[text.index("<svg") :]


def picture(draw: Callable[[Axes], None]) -> Picture:
    """Runs `draw` on fresh axes for each colour scheme."""
    return Picture(light=_svg(draw, "#333333", "#ffffff"), dark=_svg(draw, "#d6d6d6", "#1b1d21"))
