"""Draw trees: rows as dots, steps as lines, from noise on the left to images on the right."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from figure_style import LIGHT, SIGMA
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from flowgrain.core.tree import ROOT, Tree

TRAINED = {"color": LIGHT["noise"], "lw": 2.6}
NOT_TRAINED = {"color": LIGHT["noise"], "lw": 1.5, "ls": (0, (1.5, 1.5))}
DETERMINISTIC = {"color": LIGHT["ode"], "lw": 1.3}


@dataclass(frozen=True)
class Layout:
    """Height [N] of each row, counted in lines from the top, and the number of lines."""

    height: list[float]
    lines: int


def layout(tree: Tree) -> Layout:
    """Heights at which no two edges cross.

    A row is drawn on the line of the child that continues it, or in the middle of its children.
    """
    children: dict[int, list[int]] = defaultdict(list)
    for row, parent in enumerate(tree.parent.tolist()):
        children[parent].append(row)
    height = [0.0] * len(tree)
    lines = 0

    def place(row: int) -> None:
        nonlocal lines
        onward = _continuation(tree, children[row])
        if onward is not None:
            place(onward)
        branches = [child for child in children[row] if child != onward]
        for child in branches:
            place(child)
        if onward is not None:
            height[row] = height[onward]
        elif branches:
            height[row] = (height[branches[0]] + height[branches[-1]]) / 2
        else:
            height[row] = float(lines)
            lines += 1

    for root in children[ROOT]:
        place(root)
    return Layout(height, lines)


def _continuation(tree: Tree, children: Sequence[int]) -> int | None:
    """The child drawn on its parent's line: the trunk of a fan, or the trajectory itself."""
    if len(children) == 1:
        return children[0]
    stochastic = [row for row in children if tree.stochastic[row]]
    deterministic = [row for row in children if not tree.stochastic[row]]
    if len(stochastic) == 1:
        return stochastic[0]
    return deterministic[0] if stochastic and deterministic else None


def draw_tree(axes: Axes, tree: Tree) -> int:
    """Draw `tree` and return the number of lines that it takes."""
    found = layout(tree)
    x, y = tree.grid_index.tolist(), found.height
    for index in range(tree.num_steps + 1):
        axes.axvline(index, color=LIGHT["grid"], lw=0.8, zorder=0)
    for row, parent in enumerate(tree.parent.tolist()):
        if parent != ROOT:
            draw_edge(axes, (x[parent], y[parent]), (x[row], y[row]), _edge_style(tree, row))
    images = set(tree.leaves.tolist())
    for row in range(len(tree)):
        if tree.parent[row] == ROOT:
            axes.plot(x[row], y[row], "o", ms=7.5, color=LIGHT["ink"], zorder=4)
        elif row not in images:
            axes.plot(x[row], y[row], "o", ms=3.2, color=LIGHT["ode"], zorder=3)
    granularities = _granularities(tree)
    for image, channel in zip(tree.image.tolist(), tree.channel.tolist(), strict=True):
        color = LIGHT[f"image{channel + 1}" if granularities > 1 else "image1"]
        axes.plot(x[image], y[image], "s", ms=7.5, color=color, zorder=4)
    axes.set(xlim=(-0.35, tree.num_steps + 0.35), ylim=(found.lines - 0.5, -0.6))
    axes.axis("off")
    return found.lines


def _granularities(tree: Tree) -> int:
    """Number of granularities. 1 if channels are not granularities."""
    return tree.num_channels if tree.num_channels <= 3 else 1


def _edge_style(tree: Tree, row: int) -> dict[str, Any]:
    if not tree.stochastic[row]:
        return DETERMINISTIC
    return TRAINED if tree.trained[row] else NOT_TRAINED


def draw_edge(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], style: dict[str, Any]
) -> None:
    """Draw a smooth line between two points. A long line bends within its first grid step."""
    (x0, y0), (x1, y1) = start, end
    if y0 == y1:
        axes.plot([x0, x1], [y0, y1], solid_capstyle="round", zorder=2, **style)
        return
    bend = x0 + min(x1 - x0, 1.0)
    middle = (x0 + bend) / 2
    points = [(x0, y0), (middle, y0), (middle, y1), (bend, y1), (x1, y1)]
    codes = [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4, Curve.LINETO]
    axes.add_patch(PathPatch(Curve(points, codes), fill=False, zorder=2, capstyle="round", **style))


def _entries(trees: Sequence[Tree]) -> list[Line2D]:
    """Legend entries for the kinds of steps and images in `trees`."""

    def dot(label: str, marker: str, color: str) -> Line2D:
        return Line2D([], [], label=label, marker=marker, ls="", ms=7, color=LIGHT[color])

    entries = [dot("initial noise", "o", "ink")]
    if any(tree.trained.any() for tree in trees):
        entries.append(Line2D([], [], label="stochastic step, trained", **TRAINED))
    if any((tree.stochastic & ~tree.trained).any() for tree in trees):
        entries.append(Line2D([], [], label="stochastic step, not trained", **NOT_TRAINED))
    entries.append(Line2D([], [], label="ODE step", marker="o", ms=3, **DETERMINISTIC))
    entries.append(dot("image", "s", "image1"))
    for number in range(2, 1 + max(map(_granularities, trees))):
        entries.append(dot(f"image, granularity {number}", "s", f"image{number}"))
    return entries


def tree_figure(tree: Tree) -> Figure:
    """One tree with its noise axis and legend."""
    height = 0.3 * layout(tree).lines + 0.75
    figure = plt.figure(figsize=(7.6, height))
    axes = figure.add_axes((0.02, 0.65 / height, 0.96, 1 - 0.7 / height))
    lines = draw_tree(axes, tree)
    label = {"color": LIGHT["muted"], "fontsize": 9, "va": "top", "clip_on": False}
    axes.text(-0.2, lines - 0.45, f"{SIGMA} = 1, noise", ha="left", **label)
    axes.text(tree.num_steps + 0.2, lines - 0.45, f"{SIGMA} = 0, images", ha="right", **label)
    entries = _entries([tree])
    figure.legend(
        handles=entries,
        loc="lower center",
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        labelcolor=LIGHT["ink"],
        handletextpad=0.6,
        columnspacing=1.6,
        borderaxespad=0,
        borderpad=0.1,
    )
    return figure


def trees_figure(trees: dict[str, Tree]) -> Figure:
    """Five trees by title in two rows, with the legend in the sixth place."""
    figure, places = plt.subplots(2, 3, figsize=(11.5, 6.0))
    figure.subplots_adjust(0.015, 0.02, 0.985, 0.93, wspace=0.1, hspace=0.28)
    for axes, (title, tree) in zip(places.flat, trees.items(), strict=False):
        draw_tree(axes, tree)
        axes.set_title(title, color=LIGHT["ink"], fontsize=12, fontweight="bold", loc="left")
    last = places.flat[-1]
    last.axis("off")
    last.legend(
        handles=_entries(list(trees.values())),
        loc="center left",
        frameon=False,
        fontsize=11,
        labelcolor=LIGHT["ink"],
        labelspacing=0.9,
        handletextpad=0.9,
    )
    return figure
