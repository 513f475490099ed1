"""Recording of a training step's groups while the next step runs.

Shapes: P prompts, N rows of the tree of one prompt, I images and E credited rows of one prompt.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flowgrain.config.record import RecordConfig
from flowgrain.config.schema import Config
from flowgrain.records.group_files import group_files, group_name, write_group
from flowgrain.records.groups import GroupRecord, GroupTree, PromptGroup
from flowgrain.records.images import LOSSLESS, Pixels
from flowgrain.training.retention import Retention
from flowgrain.training.rollout_batch import RolloutBatch


class GroupWriter:
    """Writes groups/ of a run, and deletes old steps. Only the main rank has one.

    Images are encoded in a thread, one step at a time. An error of the thread is raised by the next
    call of `write` or `wait`.

    Args:
        folder: directory groups/ of the run.
        config: settings of the run.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self._settings = config.training.record
        every = config.evaluation.every
        limit = self._settings.megabytes * 1_000_000
        self.retention = Retention(self._settings.steps, limit, every)
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def write(self, batch: RolloutBatch, sigmas: list[float]) -> None:
        """Start to write the groups of a step. Waits for the step before.

        Args:
            batch: the step. Its images must not change afterwards.
            sigmas: [T + 1] noise levels of the grid.

        Raises:
            OSError: the step before could not be written.
        """
        self.wait()
        if not self._settings.prompts or not self._settings.steps:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "groups")
        path = self.folder / group_name(batch.step)
        group = group_of(batch, self._settings, self.config.method.name, sigmas, path)
        self._pending = self._pool.submit(self._write, group, images_of(batch, group))

    def wait(self) -> None:
        """Wait until all steps are on the disk.

        Raises:
            OSError: a step could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load_state_dict(self, state: Mapping[str, Any] | list[Any], last: int) -> None:
        """Restore the state of `retention`.

        Args:
            state: the state. In runs of an earlier version it is a list without the levels.
            last: step of the checkpoint. Files of later steps will be deleted.
        """
        files = group_files(self.folder)
        sizes = {step: path.stat().st_size for step, path in files.items() if step <= last}
        known = state if isinstance(state, Mapping) else {"every": None}
        self.retention.load_state_dict(known, sizes)

    def _write(self, group: GroupRecord, images: dict[tuple[int, int], Tensor]) -> None:
        pixels = {place: to_image(image) for place, image in images.items()}
        size = write_group(group, pixels, self._settings.thumbnail)
        self.retention.add(group.step, size)
        files = group_files(self.folder)
        for step in self.retention.dropped(files):
            files[step].unlink()


def group_of(
    batch: RolloutBatch, settings: RecordConfig, method: str, sigmas: list[float], path: Path
) -> GroupRecord:
    """The groups of a step, without images.

    Args:
        batch: the step, on the main rank.
        settings: number of recorded prompts and of images in full size.
        method: name of the method.
        sigmas: [T + 1] noise levels of the grid.
        path: the file.
    """
    tree, count = batch.tree, len(batch.prompts)
    rows = len(tree) // tree.num_prompts
    leaves, of_first = tree.leaves[tree.leaves < rows], tree.image < rows
    group_tree = GroupTree(
        parent=tree.parent[:rows].tolist(),
        grid_index=tree.grid_index[:rows].tolist(),
        stochastic=tree.stochastic[:rows].tolist(),
        leaves=leaves.tolist(),
        image=tree.image[of_first].tolist(),
        channel=tree.channel[of_first].tolist(),
        edges=batch.credited[batch.credited < rows].tolist(),
    )
    rewards = {name: _by_prompt(scores.values, count) for name, scores in batch.scores.items()}
    monitors = {name: _by_prompt(values, count) for name, values in batch.monitors.items()}
    advantage = _by_prompt(batch.advantage, count)
    recorded = range(0, count, batch.world.data_size)[: settings.prompts]
    height, width = batch.images.shape[-2:]
    group = GroupRecord(
        step=batch.step,
        method=method,
        num_steps=tree.num_steps,
        sigmas=sigmas,
        tree=group_tree,
        rewards=list(rewards),
        reward_weights={name: float(batch.reward_weights[name]) for name in rewards},
        image_size=[height, width],
        prompts=[
            PromptGroup(
                text=prompt.text,
                recorded=number in recorded,
                rewards={name: values[number] for name, values in rewards.items()},
                monitors={name: values[number] for name, values in monitors.items()},
                advantage=advantage[number],
                full=[],
            )
            for number, prompt in enumerate(batch.prompts)
        ],
        path=path,
    )
    if max(height, width) > LOSSLESS:  # smaller thumbnails have the full size
        for number in recorded:
            group.prompts[number].full.extend(_best_and_worst(group, number, settings.full_size))
    return group


def images_of(batch: RolloutBatch, group: GroupRecord) -> dict[tuple[int, int], Tensor]:
    """Images [3, H, W] of the recorded prompts by prompt and place."""
    recorded = [number for number, prompt in enumerate(group.prompts) if prompt.recorded]
    count = len(group.tree.leaves)
    return {  # the images of this rank's prompts follow each other
        (number, place): batch.images[local * count + place]
        for local, number in enumerate(recorded)
        for place in range(count)
    }


def to_image(image: Tensor) -> Pixels:
    """An image [3, H, W] in 0..1 as bytes [H, W, 3].

    It computes with NumPy: a second thread that computes with torch would start its own threads.
    NaN becomes 0.
    """
    values = np.clip(np.nan_to_num(image.float().numpy()), 0, 1) * 255
    return np.ascontiguousarray(np.rint(values).astype(np.uint8).transpose(1, 2, 0))


def _by_prompt(values: Tensor, prompts: int) -> list[list[float]]:
    """Values of all prompts, [P * n] to P lists of n."""
    found: list[list[float]] = values.float().cpu().reshape(prompts, -1).tolist()
    return found


def _best_and_worst(group: GroupRecord, prompt: int, count: int) -> list[int]:
    """Places of at most `count` leaves: the best, the worst, the second best and so on.

    Leaves are sorted by advantage, then by reward. A leaf without an advantage is left out.
    """
    weights, rewards = group.reward_weights, group.prompts[prompt].rewards
    advantage = np.array(group.leaf_advantage(prompt))
    total = sum((weights[name] * np.array(rewards[name]) for name in rewards), np.zeros(1))
    order = np.lexsort((np.nan_to_num(np.broadcast_to(total, advantage.shape)), advantage))
    known = [int(place) for place in order if np.isfinite(advantage[place])]
    chosen: list[int] = []
    while known and len(chosen) < count:
        chosen.append(known.pop(-1 if len(chosen) % 2 == 0 else 0))
    return sorted(chosen)
