"""Reading and writing of groups/step-NNNNNN.zip.

Shapes: see `flowgrain.records.groups`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgrain.records.groups import (
    FORMAT,
    ROOT,
    GroupRecord,
    GroupTree,
    PromptGroup,
    image_name,
)
from flowgrain.records.images import (
    LOSSLESS,
    DamagedRecord,
    Pixels,
    encode_image,
    read_member,
    write_zip,
)
from flowgrain.records.json_text import columns, is_number, numbers, parse_json, to_json

_NAME = re.compile(r"step-(\d{6,})\.zip")


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
