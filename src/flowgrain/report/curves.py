"""Curves as inline SVG."""

import io
from collections.abc import Callable

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

PALETTE = ("#2f6fde", "#d9822b", "#2a9d63", "#b44ac0", "#c23b3b", "#1f9eb0", "#8a6d3b", "#7d84a0", "#8fae2c", "#e06c9f")


INK = "#123456"  # stands for the page's own text colour


def picture(draw: Callable[[Axes], None]) -> str:
    """What `draw` draws on fresh axes, as SVG on no ground in the page's own text colour: it suits a light and a dark page."""
    style = {
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
    return text[text.index("<svg") :].replace(INK, "currentColor")
