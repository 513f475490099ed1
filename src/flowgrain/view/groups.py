"""The comparison groups of a run."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from flowgrain.records.group_files import group_name, read_group
from flowgrain.records.groups import GroupRecord, PromptGroup, image_name
from flowgrain.records.images import read_member
from flowgrain.view.catalog import Entry
from flowgrain.view.readable import Missing


def content(entry: Entry, step: int) -> dict[str, Any]:
    """The answer to /api/runs/ID/groups/STEP.

    Raises:
        Missing: the step was not recorded.
        DamagedRecord: the file is not readable.
    """
    return _group(entry, step).as_dict()


def summary(entry: Entry, step: int) -> dict[str, Any]:
    """The answer to /api/runs/ID/groups/STEP/summary: numbers of every prompt. See `content`."""
    group = _group(entry, step)
    return {"step": step, "prompts": [_summary(prompt) for prompt in group.prompts]}


def image(entry: Entry, step: int, prompt: int, place: int, full: bool = False) -> bytes:
    """The image of a leaf as WebP, in full size if `full` and if it was recorded.

    Raises:
        Missing: the image was not recorded.
        DamagedRecord: the file is not readable.
    """
    path = _file(entry, step)
    for size in (True, False) if full else (False,):
        try:
            return read_member(path, image_name(prompt, place, size))
        except KeyError:
            continue
    raise Missing(f"{entry.id}: step {step} has no image {place} of prompt {prompt}.")


def _group(entry: Entry, step: int) -> GroupRecord:
    return entry.of_file("group", _file(entry, step), read_group)


def _file(entry: Entry, step: int) -> Path:
    path = entry.file("groups", group_name(step))
    if not path.is_file():
        raise Missing(f"{entry.id}: the groups of step {step} were not recorded.")
    return path


def _summary(prompt: PromptGroup) -> dict[str, Any]:
    rewards = {name: np.array(values, dtype=float) for name, values in prompt.rewards.items()}
    scored = {name: values[np.isfinite(values)] for name, values in rewards.items()}
    failed = [~np.isfinite(values) for values in rewards.values()]
    advantage = [value for value in prompt.advantage if math.isfinite(value)]
    return {
        "text": prompt.text,
        "recorded": prompt.recorded,
        "mean": {name: values.mean() if len(values) else None for name, values in scored.items()},
        "std": {name: values.std() if len(values) else None for name, values in scored.items()},
        "failed": int(np.any(failed, axis=0).sum()) if failed else 0,
        "zero": not any(advantage),
        "advantage": [min(advantage), max(advantage)] if advantage else [0.0, 0.0],
    }
