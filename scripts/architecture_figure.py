"""Draw the architecture: plan, rollout, credit, update, and the data between these stages."""

from figure_style import LIGHT, MINUS, SIGMA
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from tree_figures import draw_edge

WIDTH, HEIGHT = 11.8, 4.5
CARD, GAP, TOP, BOTTOM, ARROWS = 2.1, 0.92, 3.4, 1.0, 2.32
STAGES = {
    "Plan": "The method writes a tree.\nStructure only: it can be\npriced and drawn.",
    "Rollout": "Each velocity is computed\nonce. All ready rows share\na batch.",
    "Credit": "Rewards of the images\nbecome one advantage for\neach trained edge.",
    "Update": "One gradient forward per\ndistinct parent. Loss is\nsum / global count.",
}
INPUTS = {
    "Plan": "method.plan",
    "Rollout": f"velocity(x, {SIGMA}, cond)",
    "Credit": "rewards, method.credit",
    "Update": "method.objective",
}
PASSED = ("Tree", "latents,\nimages", "advantages\n[E]")
FAN = (0.385, 0.0, -0.385)
ADVANTAGES = (1.2, -0.3, -0.9)


def architecture_figure() -> Figure:
    """The four stages as cards with arrows between them."""
    figure = plt.figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    left = (WIDTH - 4 * CARD - 3 * GAP) / 2
    centers = [left + number * (CARD + GAP) + CARD / 2 for number in range(4)]
    source = {"family": "monospace", "fontsize": 10, "ha": "center", "va": "bottom"}
    passed = {"fontsize": 9, "ha": "center", "va": "bottom", "linespacing": 1.25}
    for x, (title, text) in zip(centers, STAGES.items(), strict=True):
        _card(axes, x, title, text)
        _arrow(axes, (x, TOP + 0.66), (x, TOP + 0.08))
        axes.text(x, TOP + 0.74, INPUTS[title], color=LIGHT["noise"], **source)
        _fan(axes, title, x, TOP - 1.08)
    for x, text in zip(centers, PASSED, strict=False):
        start, end = x + CARD / 2 + 0.05, x + CARD / 2 + GAP - 0.05
        _arrow(axes, (start, ARROWS), (end, ARROWS))
        axes.text((start + end) / 2, ARROWS + 0.11, text, color=LIGHT["muted"], **passed)
    back, front, below = centers[1], centers[3], BOTTOM - 0.06
    axes.plot([front, front, back], [below, 0.5, 0.5], color=LIGHT["ode"], lw=1.4)
    _arrow(axes, (back, 0.5), (back, below))
    loop = {"fontsize": 9.5, "ha": "center", "va": "top", "color": LIGHT["muted"]}
    axes.text((back + front) / 2, 0.4, "the updated policy samples the next rollout", **loop)
    return figure


def _card(axes: Axes, x: float, title: str, text: str) -> None:
    """The box of one stage, centered at `x`, from BOTTOM to TOP."""
    box = FancyBboxPatch(
        (x - CARD / 2, BOTTOM),
        CARD,
        TOP - BOTTOM,
        boxstyle="round,pad=0,rounding_size=0.12",
        facecolor=LIGHT["card"],
        edgecolor=LIGHT["edge"],
        lw=1.2,
    )
    axes.add_patch(box)
    style = {"ha": "center", "color": LIGHT["ink"]}
    axes.text(x, TOP - 0.14, title, fontsize=13, fontweight="bold", va="top", **style)
    lines = text.split("\n")
    for number, line in enumerate(reversed(lines)):
        axes.text(x, BOTTOM + 0.16 + 0.165 * number, line, fontsize=8.6, va="bottom", **style)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=LIGHT["ode"], lw=1.4, **style))


def _fan(axes: Axes, stage: str, x: float, y: float) -> None:
    """One fan of a tree around (x, y), as `stage` sees it."""
    root, parent, child, leaf = x - 0.75, x - 0.35, x + 0.15, x + 0.72
    filled = stage != "Plan"
    axes.plot([root, parent], [y, y], color=LIGHT["ode"], lw=1.3, zorder=1)
    for dy, advantage in zip(FAN, ADVANTAGES, strict=True):
        color, width = LIGHT["noise"], 2.4
        if stage in ("Credit", "Update"):
            color = LIGHT["good" if advantage > 0 else "bad"]
            width = 1.2 + 1.8 * abs(advantage)
        draw_edge(axes, (parent, y), (child, y + dy), {"color": color, "lw": width})
        _dot(axes, child, y + dy, 6, LIGHT["ode"], filled)
        if stage == "Update":
            continue
        axes.plot([child, leaf], [y + dy, y + dy], color=LIGHT["ode"], lw=1.3, zorder=1)
        face = LIGHT["image1" if filled else "card"]
        axes.plot(leaf, y + dy, "s", ms=8, mfc=face, mec=LIGHT["image1"], mew=1.4, zorder=4)
        if stage == "Credit":
            text = f"{advantage:+.1f}".replace("-", MINUS)
            place = {"fontsize": 8.5, "ha": "center", "va": "bottom"}
            axes.text(child + 0.28, y + dy + 0.05, text, color=color, **place)
    if stage == "Update":
        axes.text(x + 0.52, y, "∇ loss", fontsize=11, ha="center", va="center", color=LIGHT["ink"])
    _dot(axes, root, y, 8, LIGHT["ink"], filled)
    _dot(axes, parent, y, 6, LIGHT["ode"], filled)


def _dot(axes: Axes, x: float, y: float, size: float, color: str, filled: bool) -> None:
    face = color if filled else LIGHT["card"]
    axes.plot(x, y, "o", ms=size, mfc=face, mec=color, mew=1.4, zorder=4)
