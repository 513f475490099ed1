"""Held-out images before and after training, and the parts of their scores."""

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from flowgrain.records.evaluations import EvaluationRecord
from flowgrain.report.render import data_uri
from flowgrain.report.run_data import RunData, undamaged

MAX_PAIRS = 16


@dataclass(frozen=True)
class ImagePair:
    """A held-out prompt before and after training, with the same noise.

    Attributes:
        prompt: text of the prompt.
        before: image at the first evaluation, as a data URI.
        after: image at the last evaluation.
        scores: name of a reward, score before, score after.
    """

    prompt: str
    before: str
    after: str
    scores: list[tuple[str, float, float]]


@dataclass(frozen=True)
class PartChange:
    """The mean of a part over held-out images.

    Attributes:
        name: "reward/part".
        before: mean at the first evaluation.
        after: mean at the last evaluation.
        scale: largest value of the parts of this reward, at least 1.
    """

    name: str
    before: float
    after: float
    scale: float

    @property
    def is_error(self) -> bool:
        """Whether the part is an error of the bundled oracle, which reports shares of images."""
        return self.name.startswith("oracle/")

    def percent(self, value: float) -> float:
        """Length of the bar for `value`, in percent. 0 for negative and unknown values."""
        return 100 * max(value, 0.0) / self.scale if math.isfinite(value) else 0.0


def image_pairs(run: RunData) -> list[ImagePair]:
    """The first held-out prompts before and after training. Empty for one evaluation or none."""
    if len(run.evaluations) < 2:
        return []
    first, last = run.evaluations[0], run.evaluations[-1]
    before, after = _images(first), _images(last)
    return [
        ImagePair(
            prompt=first.prompts[i],
            before=data_uri(before[i]),
            after=data_uri(after[i]),
            scores=[
                (name, first.scores[name][i], last.scores[name][i])
                for name in run.evaluated_rewards
            ],
        )
        for i in range(min(len(before), len(after)))
    ]


def _images(evaluation: EvaluationRecord) -> list[Image.Image]:
    def read(_: Path) -> list[Image.Image]:
        return [evaluation.image(place) for place in range(min(MAX_PAIRS, evaluation.num_images))]

    return undamaged(evaluation.images_path, read) or []


def part_changes(run: RunData) -> list[PartChange]:
    """Means of the parts before and after training. Empty for one evaluation or none."""
    if len(run.evaluations) < 2:
        return []
    first, last = run.evaluations[0].parts, run.evaluations[-1].parts
    names = [name for name in first if name in last]
    scales = dict[str, float]()
    for name in names:
        reward = name.partition("/")[0]
        scales[reward] = max(
            scales.get(reward, 1.0), *filter(math.isfinite, (first[name], last[name]))
        )
    return [
        PartChange(name, first[name], last[name], scales[name.partition("/")[0]]) for name in names
    ]
