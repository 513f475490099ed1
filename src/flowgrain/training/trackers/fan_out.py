"""The trackers of a run together: converts records once, and passes them to every tracker.

Shapes: I images, T sampling steps.
"""

import json
import math
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowgrain.config.record import RecordConfig
from flowgrain.config.schema import Config
from flowgrain.records.evaluations import EVALUATION_IMAGES
from flowgrain.records.files import write_atomically
from flowgrain.records.images import Pixels
from flowgrain.training.evaluate import Evaluation
from flowgrain.training.groups import group_of, images_of, to_image
from flowgrain.training.rollout_batch import Metrics, RolloutBatch
from flowgrain.training.trackers.base import ImageTable, TrackedRun, Tracker, finite
from flowgrain.training.trackers.tensorboard import TensorBoard
from flowgrain.training.trackers.trackio import Trackio
from flowgrain.training.trackers.wandb import Wandb
from flowgrain.training.trackers.worker import Task, Worker

IDENTITY = "trackers.json"
"""File with the identity of the run, in its directory."""
GROUP_IMAGES = 32
"""Largest number of images of a comparison group."""
IMAGE_SIZE = 256
"""Largest size of an image in pixels. The directory of the run has the full size."""
_KINDS: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


class Trackers:
    """The trackers of a run. Nothing is computed if there are none.

    No method raises an error of a tracker, or waits for one, except `close`.

    Args:
        workers: one for each tracker.
        max_steps: the last training step.
        is_evaluated: whether a training step is evaluated.
    """

    def __init__(
        self,
        workers: Sequence[Worker] = (),
        max_steps: int = 0,
        is_evaluated: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._workers, self._max_steps, self._is_evaluated = workers, max_steps, is_evaluated

    def scalars(self, line: Metrics) -> None:
        """Log a line of metrics.jsonl."""
        step, values = line["step"], finite(line)
        self._submit(lambda tracker: tracker.scalars(step, values))

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Log the first images of an evaluation, with their prompts, rewards and monitors."""
        if not self._workers:
            return
        images = [_small(to_image(image)) for image in evaluation.images[:EVALUATION_IMAGES].cpu()]
        count = len(images)
        columns: dict[str, list[Any]] = {
            "prompt": [prompt.text for prompt in evaluation.prompts[:count]]
        }
        for kind, of_images in (("reward", evaluation.scores), ("monitor", evaluation.monitors)):
            for name, values in of_images.items():
                columns[f"{kind}/{name}"] = _known(values[:count])
        table = ImageTable(step, images, columns)
        self._submit(lambda tracker: tracker.images("evaluation", table))

    def group(self, batch: RolloutBatch, sigmas: list[float]) -> None:
        """Log the group of the first prompt with rewards and advantages.

        Only of the first, the last and evaluated steps.

        Args:
            batch: the training step, on the main rank.
            sigmas: [T + 1] noise levels of the grid.
        """
        step = batch.step
        logged = step in (1, self._max_steps) or self._is_evaluated(step)
        if self._workers and logged:
            table = group_table(batch, sigmas)
            self._submit(lambda tracker: tracker.images("group", table))

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """Log a line of alarms.jsonl."""
        step, title, message = alarm["step"], f"Alarm: {alarm['monitor']}", alarm["message"]
        self._submit(lambda tracker: tracker.alarm(step, title, message))

    def artifact(self, folder: Path) -> None:
        """Log exported parameters. The files must not change afterwards."""
        self._submit(lambda tracker: tracker.artifact(folder))

    def close(self) -> None:
        """Wait until the trackers have written all records, for a limited time."""
        for worker in self._workers:
            worker.close()
        self._workers = ()

    def _submit(self, task: Task) -> None:
        for worker in self._workers:
            worker.submit(task)


def open_trackers(config: Config, folder: Path, first_step: int | None) -> Trackers:
    """Start the trackers of a run. Returns at once.

    Args:
        config: settings.
        folder: directory of the run.
        first_step: first step that a resumed run writes again. None: a new run.
    """
    names = list(dict.fromkeys(config.runtime.trackers))
    if not names:
        return Trackers()
    identity = _identity(folder, first_step is not None)
    run = TrackedRun(folder, identity, config.to_dict(), first_step)
    workers = [Worker(name, partial(_KINDS[name], run)) for name in names]
    is_evaluated = partial(config.evaluation.is_due, last=False)
    return Trackers(workers, config.training.max_steps, is_evaluated)


def group_table(batch: RolloutBatch, sigmas: list[float]) -> ImageTable:
    """The group of the first prompt: images, prompt, rewards, monitors and advantages.

    Of more than 32 images, those with the highest and the lowest advantages are chosen.

    Args:
        batch: the training step, on the main rank.
        sigmas: [T + 1] noise levels of the grid.
    """
    settings = RecordConfig(prompts=1, full_size=0)
    record = group_of(batch, settings, "", sigmas, Path())
    images, columns = images_of(batch, record), record.table(0)
    places = _highest_and_lowest(columns["advantage"], GROUP_IMAGES)
    return ImageTable(
        batch.step,
        [_small(to_image(images[0, place])) for place in places],
        {
            "prompt": [record.prompts[0].text] * len(places),
            **{name: _known([values[i] for i in places]) for name, values in columns.items()},
        },
    )


def _highest_and_lowest(values: Sequence[float], count: int) -> list[int]:
    """Places of the `count` highest and lowest values, in ascending order.

    All places if there are not more values than `count`. Otherwise without those of NaN.
    """
    if len(values) <= count:
        return list(range(len(values)))
    order = [
        int(place) for place in np.argsort(values, kind="stable") if not np.isnan(values[place])
    ]
    half = count // 2
    return sorted(order if len(order) <= count else order[:half] + order[half - count :])


def _known(values: Iterable[Any]) -> list[float | int | None]:
    """Plain numbers. None for a number that is not finite."""
    return [(v if isinstance(v, int) else float(v)) if math.isfinite(v) else None for v in values]


def _small(pixels: Pixels) -> Pixels:
    """`pixels` [H, W, 3], reduced to at most `IMAGE_SIZE`."""
    image = Image.fromarray(pixels)
    image.thumbnail((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(image)


def _identity(folder: Path, resumed: bool) -> str:
    """The identity of the run. A resumed run reads it, if its file is not missing or damaged."""
    path = folder / IDENTITY
    if resumed:
        try:
            found = json.loads(path.read_bytes())["id"]
            if isinstance(found, str) and found.isalnum():
                return found
        except (OSError, ValueError, KeyError, TypeError):
            pass
    new = uuid.uuid4().hex[:8]
    write_atomically(path, json.dumps({"id": new}))
    return new
