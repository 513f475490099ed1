"""The groups of a training step: groups/step-NNNNNN.zip.

A file has the tree of the step, the rewards and advantages of all prompts, and the images of the
first prompts. It is written once and never changed.

Shapes: N rows of the tree of one prompt, I leaves, J credit entries, E credited rows, T steps.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from flowgrain.records import html
from flowgrain.records.images import (
    LOSSLESS,
    DamagedRecord,
    decode_image,
    read_member,
)

FORMAT = 1
"""Version of the format of a file."""
SHOWN = 64
"""Images of a prompt that a notebook shows."""
FIGURE = 96
"""Width of an image in a notebook in pixels."""
ROOT = -1
"""Parent of a row without a parent."""
_NAME = re.compile(r"step-(\d{6,})\.zip")


@dataclass(frozen=True)
class GroupTree:
    """The tree of one prompt. All prompts of a step have the same tree.

    Attributes:
        parent: [N] row of the parent, or -1. Parents come before their children.
        grid_index: [N] grid index of the noise level of every row.
        stochastic: [N] whether a stochastic step reached the row.
        leaves: [I] rows with an image, in ascending order.
        image: [J] row of the image of every credit entry.
        channel: [J] channel in which the reward of the entry counts.
        edges: [E] rows with an advantage: trained steps, or leaves if the method trains on images.
    """

    parent: list[int]
    grid_index: list[int]
    stochastic: list[bool]
    leaves: list[int]
    image: list[int]
    channel: list[int]
    edges: list[int]

    @cached_property
    def edges_above(self) -> dict[int, list[int]]:
        """Credited rows on the way from every leaf to the root, the last one first."""
        credited = set(self.edges)
        above: dict[int, list[int]] = {}
        for leaf in self.leaves:
            row, edges = leaf, []
            while row != ROOT:
                if row in credited:
                    edges.append(row)
                row = self.parent[row]
            above[leaf] = edges
        return above

    @cached_property
    def credited_leaves(self) -> dict[int, list[int]]:
        """Leaves that count for every credited row, in the order of their channels."""
        found: dict[int, list[tuple[int, int]]] = {edge: [] for edge in self.edges}
        for leaf, channel in zip(self.image, self.channel, strict=True):
            for edge in self.edges_above[leaf]:
                if not self.channel_per_state or channel == self.grid_index[edge]:
                    found[edge].append((channel, leaf))
        return {
            edge: [leaf for _, leaf in sorted(pairs, key=lambda pair: pair[0])]
            for edge, pairs in found.items()
        }

    @cached_property
    def credited_edges(self) -> dict[int, list[int]]:
        """Credited rows for which every leaf counts, the last one first."""
        pairs = {(leaf, edge) for edge, leaves in self.credited_leaves.items() for leaf in leaves}
        return {
            leaf: [edge for edge in edges if (leaf, edge) in pairs]
            for leaf, edges in self.edges_above.items()
        }

    @cached_property
    def channel_per_state(self) -> bool:
        """Whether channel k contains the completions of the states at grid index k."""
        num_steps = max(self.grid_index)
        return any(channel == num_steps for channel in self.channel)


@dataclass(frozen=True)
class PromptGroup:
    """Rewards and advantages of one prompt.

    Attributes:
        text: text of the prompt.
        recorded: whether the file has its images.
        rewards: [I] by name, NaN where the reward failed.
        monitors: [I] by name, NaN where the value is not available.
        advantage: [E] advantage of every credited row.
        full: places of the leaves with an image in full size. A place is a position in the leaves.
    """

    text: str
    recorded: bool
    rewards: dict[str, list[float]]
    monitors: dict[str, list[float]]
    advantage: list[float]
    full: list[int]


@dataclass(frozen=True)
class GroupRecord:
    """The groups of one training step. `run.groups[step]` reads one.

    Attributes:
        step: training step.
        method: name of the method.
        num_steps: T, steps of the sampling grid.
        sigmas: [T + 1] noise levels of the grid.
        tree: the tree of one prompt.
        rewards: names of the trained rewards.
        reward_weights: weight of every reward.
        image_size: height and width of the images in pixels.
        prompts: all prompts of the step.
        path: the file.
    """

    step: int
    method: str
    num_steps: int
    sigmas: list[float]
    tree: GroupTree
    rewards: list[str]
    reward_weights: dict[str, float]
    image_size: list[int]
    prompts: list[PromptGroup]
    path: Path

    def as_dict(self) -> dict[str, Any]:
        """The content of step.json."""
        values = {"format": FORMAT} | dataclasses.asdict(self)
        del values["path"]
        return values

    def image(self, prompt: int, place: int, full: bool = False) -> Image.Image:
        """The image of a leaf.

        Args:
            prompt: number of a recorded prompt.
            place: position of the leaf in `tree.leaves`.
            full: whether to read the image in full size. Of images of more than 64 pixels, only
                the places in `prompts[prompt].full` have it.

        Raises:
            KeyError: the image was not recorded.
            DamagedRecord: the file is not readable.
        """
        try:
            return decode_image(self.image_bytes(prompt, place, full))
        except DamagedRecord:
            raise
        except ValueError as error:
            raise DamagedRecord(self.path, f"image {place} of prompt {prompt}: {error}") from None

    def image_bytes(self, prompt: int, place: int, full: bool = False) -> bytes:
        """The image of a leaf as the bytes of a WebP file. See `image`."""
        full = full and max(self.image_size) > LOSSLESS
        return read_member(self.path, image_name(prompt, place, full))

    def leaf_advantage(self, prompt: int) -> list[float]:
        """Mean advantage [I] of the rows for which every leaf counts, see `credited_leaves`.

        NaN advantages are left out. NaN for a leaf without any other.
        """
        of_edge = dict(zip(self.tree.edges, self.prompts[prompt].advantage, strict=True))
        found = [
            [of_edge[edge] for edge in self.tree.credited_edges[leaf]] for leaf in self.tree.leaves
        ]
        known = [[value for value in values if not math.isnan(value)] for values in found]
        return [sum(values) / len(values) if values else math.nan for values in known]

    def table(self, prompt: int) -> dict[str, list[Any]]:
        """Columns with one value per leaf, for pandas.DataFrame.

        place and row of the leaf, every reward as reward/NAME, every monitor as monitor/NAME, and
        the mean advantage of the rows for which the leaf counts.
        """
        group, leaves = self.prompts[prompt], self.tree.leaves
        return {
            "place": list(range(len(leaves))),
            "row": list(leaves),
            **{f"reward/{name}": list(values) for name, values in group.rewards.items()},
            **{f"monitor/{name}": list(values) for name, values in group.monitors.items()},
            "advantage": self.leaf_advantage(prompt),
        }

    def _repr_html_(self) -> str:
        parts = []
        for number, group in enumerate(self.prompts):
            if group.recorded:
                parts.append(f"<h4>{escape(group.text)}</h4>{self._figures(number)}")
        failed = sum(math.isnan(v) for g in self.prompts for c in g.rewards.values() for v in c)
        title = f"Step {self.step}: {len(self.prompts)} prompts, method {self.method}"
        return html.page(title + (f". Failed rewards: {failed}" if failed else ""), *parts)

    def _figures(self, prompt: int) -> str:
        """The first images of a prompt with rewards and advantages."""
        table = self.table(prompt)
        names = [name for name in table if name not in ("place", "row")]
        found = []
        for place in table["place"][:SHOWN]:
            lines = [f"{n.partition('/')[2] or n} {html.text_of(table[n][place])}" for n in names]
            found.append(html.figure(self.image_bytes(prompt, place), "\n".join(lines), FIGURE))
        more = len(table["place"]) - len(found)
        return "".join(found) + (f"<p>and {more} more images</p>" if more else "")


def image_name(prompt: int, place: int, full: bool) -> str:
    """Name of the member with an image."""
    return f"{prompt:03d}/{place:03d}{'.full' if full else ''}.webp"
