"""Draw the figures of the documentation: the architecture, and the trees of the methods.

The trees are the real plans of the methods at a small size.

    python scripts/draw_figures.py [--out docs/images]
"""

import argparse
from pathlib import Path
from typing import Any

from architecture_figure import architecture_figure
from figure_style import save
from tree_figures import tree_figure, trees_figure

from flowgrain.core.tree import Tree
from flowgrain.methods import METHODS
from flowgrain.methods.cost import plan_tree

PLANS: dict[str, tuple[int, dict[str, Any]]] = {  # method: (num_steps, options)
    "flow_grpo": (6, {"group_size": 4}),
    "dancegrpo": (6, {"group_size": 4}),
    "mixgrpo": (7, {"group_size": 4, "window_size": 2, "window_interval": 1}),
    "g2rpo": (6, {"group_size": 2, "granularities": (1, 2)}),
    "densegrpo": (5, {"group_size": 2}),
    "tempflow_grpo": (5, {"group_size": 2}),
    "branchgrpo": (6, {"group_size": 8, "split_steps": (0, 2, 4)}),
    "diffusionnft": (6, {"group_size": 4}),
    "mend": (6, {"group_size": 4}),
    "draft": (6, {"group_size": 2}),
    "refl": (8, {"group_size": 3, "first_step": 0.5}),
}
TRAINING_STEP = 3
"""The training step whose tree is drawn. By then MixGRPO's window has moved away from the start."""
TOGETHER = ("flow_grpo", "dancegrpo", "mixgrpo", "g2rpo", "densegrpo")
"""The methods of the figure that shows several trees."""


def plan_of(name: str) -> Tree:
    """The tree of method `name` at the size that is drawn."""
    num_steps, options = PLANS[name]
    return plan_tree(METHODS.get(name)(**options), num_steps, step=TRAINING_STEP)


def main() -> None:
    """Write every figure to the output directory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="output directory")
    out = parser.parse_args().out
    trees = {name: plan_of(name) for name in PLANS}
    save(architecture_figure(), out / "architecture.svg")
    save(
        trees_figure({METHODS.get(name).title: trees[name] for name in TOGETHER}), out / "trees.svg"
    )
    for name, tree in trees.items():
        save(tree_figure(tree), out / f"tree-{name}.svg")


if __name__ == "__main__":
    main()
