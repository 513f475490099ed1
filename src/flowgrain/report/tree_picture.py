"""The tree of one prompt as groups of images, with their rewards and advantages."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from flowgrain.core.tree import ROOT
from flowgrain.report.render import data_uri, tiles
from flowgrain.training.recorder import TREE_COLUMNS

_SIZE = 160
"""Largest size of an image in pixels. A page may show hundreds of them."""


@dataclass(frozen=True)
class ScoredImage:
    """An image of the tree.

    Attributes:
        image: the image as a data URI.
        rewards: name and value of every reward.
        steps: sampling steps from the trained step to the image.
    """

    image: str
    rewards: list[tuple[str, float]]
    steps: int = 0


@dataclass(frozen=True)
class Branch:
    """A trained step: its advantage, and the images that it is credited for."""

    advantage: float
    images: list[ScoredImage]


@dataclass(frozen=True)
class BranchGroup:
    """Branches that are compared with each other, best first.

    Attributes:
        grid_steps: grid indices of the steps. Steps with the same images and advantages are one
            group, for example all steps of an unbranched trajectory.
        branches: the branches.
        stochastic: whether the steps are stochastic. If not, the method trains on the images.
    """

    grid_steps: list[int]
    branches: list[Branch]
    stochastic: bool

    @property
    def title(self) -> str:
        """The grid steps and the number of branches in words."""
        first, last, count = self.grid_steps[0], self.grid_steps[-1], len(self.branches)
        if not self.stochastic:
            return f"{count} images"
        if first == last:
            steps = f"step {first}"
        elif self.grid_steps == list(range(first, last + 1)):
            steps = f"steps {first} to {last}"
        else:
            steps = f"steps {', '.join(map(str, self.grid_steps))}"
        return f"Grid {steps}: {count} branches"


@dataclass(frozen=True)
class TreePicture:
    """The tree of one prompt at one training step.

    Attributes:
        step: training step.
        prompt: text of the prompt.
        anchor: image of the ODE trajectory without noise, if it was scored.
        groups: groups of branches in the order of their grid steps.
        largest_advantage: largest absolute advantage, which has the strongest color.
        several_lengths: whether branches have images after different numbers of steps.
        rewards: names of the rewards.
    """

    step: int
    prompt: str
    anchor: ScoredImage | None
    groups: list[BranchGroup]
    largest_advantage: float
    several_lengths: bool
    rewards: list[str]


class _Edge(NamedTuple):
    """A trained edge: its advantage, the leaves that it is credited for, and its row."""

    advantage: float
    leaves: tuple[int, ...]
    row: int


@dataclass(frozen=True)
class _TreeFile:
    """The content of a tree-STEP.json, and its images by row."""

    values: Mapping[str, Any]
    images: Mapping[int, str]

    @cached_property
    def edges_above(self) -> dict[int, list[int]]:
        """Trained edges on the way from every leaf to the root, the last one first."""
        trained, parent = set(self.values["edges"]), self.values["parent"]
        above: dict[int, list[int]] = {}
        for leaf in self.values["leaves"]:
            row, edges = leaf, []
            while row != ROOT:
                if row in trained:
                    edges.append(row)
                row = parent[row]
            above[leaf] = edges
        return above

    @property
    def channel_per_state(self) -> bool:
        """Whether channel k contains the completions of the states at grid index k."""
        return any(channel == self.values["num_steps"] for channel in self.values["channel"])

    def image(self, leaf: int, edge: int | None) -> ScoredImage:
        """The image of row `leaf` below the trained edge `edge`."""
        place = self.values["leaves"].index(leaf)
        rewards = [(name, scores[place]) for name, scores in self.values["rewards"].items()]
        steps, row = 0, leaf
        while edge is not None and row != edge:
            row, steps = self.values["parent"][row], steps + 1
        return ScoredImage(self.images[leaf], rewards, steps)

    def branch(self, edge: _Edge) -> Branch:
        """The branch of a trained edge."""
        return Branch(edge.advantage, [self.image(leaf, edge.row) for leaf in edge.leaves])


def read_tree_picture(path: Path) -> TreePicture:
    """The tree in the file `path`, images/tree-STEP.json of a run."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if any(not ROOT <= parent < row for row, parent in enumerate(values["parent"])):
        raise ValueError("a row comes before its parent")  # the way to the root might not end
    sheet = tiles(path.with_suffix(".png"), TREE_COLUMNS, len(values["leaves"]))
    images = {
        leaf: data_uri(tile, _SIZE) for leaf, tile in zip(values["leaves"], sheet, strict=True)
    }
    file = _TreeFile(values, images)
    groups = _groups(file)
    branches = [branch for group in groups for branch in group.branches]
    return TreePicture(
        step=values["step"],
        prompt=values["prompt"],
        anchor=_anchor(file),
        groups=groups,
        largest_advantage=max((abs(a) for a in values["advantage"]), default=0) or 1.0,
        rewards=list(values["rewards"]),
        several_lengths=any(
            len({image.steps for image in branch.images}) > 1 for branch in branches
        ),
    )


def _anchor(file: _TreeFile) -> ScoredImage | None:
    """The image without a trained step above it."""
    if file.channel_per_state:
        return None
    pairs = zip(file.values["image"], file.values["channel"], strict=True)
    leaves = [leaf for leaf, channel in pairs if channel == 0 and not file.edges_above[leaf]]
    return file.image(leaves[-1], None) if leaves else None


def _groups(file: _TreeFile) -> list[BranchGroup]:
    values, leaves = file.values, _credited_leaves(file)
    by_step: dict[int, list[_Edge]] = defaultdict(list)
    for row, advantage in zip(values["edges"], values["advantage"], strict=True):
        step = values["grid_index"][values["parent"][row]]
        by_step[step].append(_Edge(advantage, tuple(leaves[row]), row))
    groups: dict[tuple[tuple[float, tuple[int, ...]], ...], BranchGroup] = {}
    for step in sorted(by_step):
        edges = sorted(by_step[step], key=lambda edge: -edge.advantage)
        content = tuple(sorted((edge.advantage, edge.leaves) for edge in edges))
        if content in groups:
            groups[content].grid_steps.append(step)
        else:
            branches = [file.branch(edge) for edge in edges]
            stochastic = values["stochastic"][edges[0].row]
            groups[content] = BranchGroup([step], branches, stochastic)
    return list(groups.values())


def _credited_leaves(file: _TreeFile) -> dict[int, list[int]]:
    """The leaves that every edge is credited for, by channel."""
    values = file.values
    found: dict[int, list[tuple[int, int]]] = {edge: [] for edge in values["edges"]}
    for leaf, channel in zip(values["image"], values["channel"], strict=True):
        for edge in file.edges_above[leaf]:
            if not file.channel_per_state or channel == values["grid_index"][edge]:
                found[edge].append((channel, leaf))
    return {
        edge: [leaf for _, leaf in sorted(pairs, key=lambda pair: pair[0])]
        for edge, pairs in found.items()
    }
