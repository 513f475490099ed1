"""The groups of a training step: groups/step-NNNNNN.zip.

A file has the tree of the step, the rewards and advantages of all prompts, and the images of the
first prompts. It is written once and never changed.

Shapes: N rows of the tree of one prompt, I leaves, J credit entries, E credited rows, T steps.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
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
    Pixels,
    decode_image,
    encode_image,
    read_member,
    write_zip,
)
from flowgrain.records.json_text import columns, is_number, numbers, parse_json, to_json

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
        """Mean advantage [I] of the credited rows above every leaf. NaN for a leaf without any."""
        of_edge = dict(zip(self.tree.edges, self.prompts[prompt].advantage, strict=True))
        above = [self.tree.edges_above[leaf] for leaf in self.tree.leaves]
        return [
            sum(of_edge[edge] for edge in edges) / len(edges) if edges else math.nan
            for edges in above
        ]

    def table(self, prompt: int) -> dict[str, list[Any]]:
        """Columns with one value per leaf, for pandas.DataFrame.

        place and row of the leaf, every reward as reward/NAME, every monitor as monitor/NAME, and
        the mean advantage of the credited rows above the leaf.
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


class GroupStore(Mapping[int, GroupRecord]):
    """The recorded groups of a run by training step. A file is read when its step is.

    Args:
        folder: directory groups/ of the run, which may not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def steps(self) -> list[int]:
        """Recorded training steps in ascending order."""
        return sorted(group_files(self.folder))

    def __getitem__(self, step: int) -> GroupRecord:
        """The groups of a training step.

        Raises:
            KeyError: the step was not recorded.
            DamagedRecord: the file is not readable.
        """
        path = self.folder / group_name(step)
        if not path.exists():
            raise KeyError(f"step {step} is not recorded. Recorded steps: {self.steps}")
        return read_group(path)

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"GroupStore({str(self.folder)!r}, {len(self)} steps)"


def group_name(step: int) -> str:
    """Name of the file of a training step."""
    return f"step-{step:06d}.zip"


def group_files(folder: Path) -> dict[int, Path]:
    """The files in a directory groups/ by training step."""
    found = {}
    for path in folder.glob("step-*.zip"):
        match = _NAME.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
    return found


def write_group(
    group: GroupRecord, images: Mapping[tuple[int, int], Pixels], thumbnail: int
) -> int:
    """Write the groups of a step to `group.path`.

    Args:
        group: the groups.
        images: the image of every leaf of every recorded prompt, by prompt and place.
        thumbnail: largest number of pixels on the longer side of a thumbnail.

    Returns:
        The size of the file in bytes.
    """
    members = {"step.json": to_json(group.as_dict()).encode()}
    for (prompt, place), pixels in images.items():
        members[image_name(prompt, place, False)] = encode_image(pixels, thumbnail)
        if place in group.prompts[prompt].full and max(group.image_size) > LOSSLESS:
            members[image_name(prompt, place, True)] = encode_image(pixels)
    group.path.parent.mkdir(parents=True, exist_ok=True)
    return write_zip(group.path, members)


def read_group(path: Path) -> GroupRecord:
    """The groups in a file, without the images.

    Raises:
        DamagedRecord: the file is not readable.
    """
    try:
        return _group(parse_json(read_member(path, "step.json")), path)
    except DamagedRecord:
        raise
    except KeyError as error:
        raise DamagedRecord(path, f"{error} is missing") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise DamagedRecord(path, error) from None


def image_name(prompt: int, place: int, full: bool) -> str:
    """Name of the member with an image."""
    return f"{prompt:03d}/{place:03d}{'.full' if full else ''}.webp"


def _group(values: Any, path: Path) -> GroupRecord:
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']!r}, but this version reads format {FORMAT}")
    tree = _tree(values["tree"])
    prompts = [_prompt(prompt, tree) for prompt in values["prompts"]]
    sigmas, size = numbers(values["sigmas"], "sigmas"), _ints(values["image_size"], "image_size")
    rewards = _texts(values["rewards"], "rewards")
    weights = {
        str(name): numbers([weight], "reward_weights")[0]
        for name, weight in values["reward_weights"].items()
    }
    if not all(is_number(values[key]) for key in ("step", "num_steps")):
        raise ValueError("step and num_steps must be numbers")
    if not isinstance(values["method"], str) or len(size) != 2:
        raise ValueError("method or image_size is wrong")
    return GroupRecord(
        values["step"],
        values["method"],
        values["num_steps"],
        sigmas,
        tree,
        rewards,
        weights,
        size,
        prompts,
        path,
    )


def _tree(values: Any) -> GroupTree:
    names = ("parent", "grid_index", "leaves", "image", "channel", "edges")
    lists = {name: _ints(values[name], name) for name in names}
    tree = GroupTree(stochastic=[bool(value) for value in values["stochastic"]], **lists)
    rows = len(tree.parent)
    if not rows == len(tree.grid_index) == len(tree.stochastic):
        raise ValueError("columns of the tree have different lengths")
    if any(not ROOT <= parent < row for row, parent in enumerate(tree.parent)):
        raise ValueError("a row comes before its parent")  # the way to the root might not end
    if any(not 0 <= row < rows for row in (*tree.leaves, *tree.image, *tree.edges)):
        raise ValueError("a leaf or an edge is not a row")
    if not set(tree.image) <= set(tree.leaves) or len(tree.image) != len(tree.channel):
        raise ValueError("image and channel of the tree are wrong")
    return tree


def _prompt(values: Any, tree: GroupTree) -> PromptGroup:
    leaves = len(tree.leaves)
    group = PromptGroup(
        text=values["text"],
        recorded=values["recorded"],
        rewards=columns(values["rewards"], "rewards", leaves),
        monitors=columns(values["monitors"], "monitors", leaves),
        advantage=numbers(values["advantage"], "advantage"),
        full=_ints(values["full"], "full"),
    )
    if not isinstance(group.text, str) or not isinstance(group.recorded, bool):
        raise ValueError("text or recorded of a prompt is wrong")
    if len(group.advantage) != len(tree.edges):
        raise ValueError("advantage of a prompt has another length than edges")
    return group


def _ints(values: Any, what: str) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{what} is not a list of integers")
    return values


def _texts(values: Sequence[Any], what: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{what} is not a list of texts")
    return values
