"""The tree of one prompt as groups of images, with their rewards and advantages."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flowgrain.records.group_files import read_group
from flowgrain.records.groups import GroupRecord
from flowgrain.report.render import data_uri

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
    """A credited row: its advantage, the leaves that it is credited for, and its row."""

    advantage: float
    leaves: tuple[int, ...]
    row: int


@dataclass(frozen=True)
class _Drawn:
    """The first prompt of a step, and its images by row."""

    group: GroupRecord
    images: Mapping[int, str]

    def image(self, leaf: int, edge: int | None) -> ScoredImage:
        """The image of row `leaf` below the credited row `edge`."""
        place = self.group.tree.leaves.index(leaf)
        scores = self.group.prompts[0].rewards
        rewards = [(name, values[place]) for name, values in scores.items()]
        steps, row = 0, leaf
        while edge is not None and row != edge:
            row, steps = self.group.tree.parent[row], steps + 1
        return ScoredImage(self.images[leaf], rewards, steps)

    def branch(self, edge: _Edge) -> Branch:
        """The branch of a credited row."""
        return Branch(edge.advantage, [self.image(leaf, edge.row) for leaf in edge.leaves])


def read_tree_picture(path: Path) -> TreePicture:
    """The tree of the first prompt in the file `path`, groups/step-NNNNNN.zip of a run.

    Raises:
        DamagedRecord: the file is not readable.
    """
    group = read_group(path)
    images = {
        leaf: data_uri(group.image(0, place), _SIZE) for place, leaf in enumerate(group.tree.leaves)
    }
    drawn, prompt = _Drawn(group, images), group.prompts[0]
    groups = _groups(drawn)
    branches = [branch for part in groups for branch in part.branches]
    return TreePicture(
        step=group.step,
        prompt=prompt.text,
        anchor=_anchor(drawn),
        groups=groups,
        largest_advantage=max(map(abs, filter(math.isfinite, prompt.advantage)), default=0) or 1.0,
        rewards=group.rewards,
        several_lengths=any(
            len({image.steps for image in branch.images}) > 1 for branch in branches
        ),
    )


def _anchor(drawn: _Drawn) -> ScoredImage | None:
    """The image without a credited row above it."""
    tree = drawn.group.tree
    if tree.channel_per_state:
        return None
    pairs = zip(tree.image, tree.channel, strict=True)
    leaves = [leaf for leaf, channel in pairs if channel == 0 and not tree.edges_above[leaf]]
    return drawn.image(leaves[-1], None) if leaves else None


def _groups(drawn: _Drawn) -> list[BranchGroup]:
    tree, prompt = drawn.group.tree, drawn.group.prompts[0]
    by_step: dict[int, list[_Edge]] = defaultdict(list)
    for row, advantage in zip(tree.edges, prompt.advantage, strict=True):
        step = tree.grid_index[tree.parent[row]]
        by_step[step].append(_Edge(advantage, tuple(tree.credited_leaves[row]), row))
    groups: dict[tuple[tuple[float, tuple[int, ...]], ...], BranchGroup] = {}
    for step in sorted(by_step):
        edges = sorted(by_step[step], key=lambda edge: -edge.advantage)
        content = tuple(sorted((edge.advantage, edge.leaves) for edge in edges))
        if content in groups:
            groups[content].grid_steps.append(step)
        else:
            branches = [drawn.branch(edge) for edge in edges]
            stochastic = tree.stochastic[edges[0].row]
            groups[content] = BranchGroup([step], branches, stochastic)
    return list(groups.values())
