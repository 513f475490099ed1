"""Object detection for GenEval: boxes, their colors, and detectors of transformers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgrain.rewards.checkpoints import loading
from flowgrain.rewards.options import check_device

_RGB = {
    "red": (0.8, 0.1, 0.1),
    "orange": (0.95, 0.55, 0.1),
    "yellow": (0.95, 0.9, 0.2),
    "green": (0.15, 0.6, 0.2),
    "blue": (0.15, 0.3, 0.85),
    "purple": (0.5, 0.15, 0.6),
    "pink": (0.95, 0.6, 0.75),
    "brown": (0.45, 0.28, 0.12),
    "black": (0.05, 0.05, 0.05),
    "white": (0.95, 0.95, 0.95),
}
COLORS = tuple(_RGB)
"""The ten colors of GenEval."""


@dataclass(frozen=True)
class Box:
    """A detected object.

    Attributes:
        name: name of the class.
        score: confidence of the detector.
        x0: left edge in pixels.
        y0: top edge in pixels.
        x1: right edge in pixels.
        y1: bottom edge in pixels.
        color: a color of `COLORS`, or None if the color does not matter.
    """

    name: str
    score: float
    x0: float
    y0: float
    x1: float
    y1: float
    color: str | None = None


Detector = Callable[[Tensor, Sequence[str]], list[Box]]
"""A function of an image [3, H, W] in 0..1 and the classes whose color matters.

It returns boxes in descending order of their scores.
"""


class TransformersDetector:
    """A detector with an object detection model of transformers, such as DETR.

    The color of an object is the nearest of the ten colors of GenEval to the middle of its box.

    Args:
        path: directory or Hugging Face repository of the model.
        device: "cpu", "cuda" or "cuda:INDEX".
        threshold: lowest score of a box.
    """

    def __init__(self, path: str, device: str = "cpu", threshold: float = 0.5) -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self.device, self.threshold = check_device(device), threshold
        with loading(path):
            processor_class: Any = AutoImageProcessor
            self.processor = processor_class.from_pretrained(path)
            self.model: Any = AutoModelForObjectDetection.from_pretrained(path)
        self.model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, image: Tensor, colored: Sequence[str]) -> list[Box]:
        """Boxes of an image [3, H, W] in 0..1, with colors for the classes in `colored`."""
        pixels = (image.clamp(0, 1) * 255).byte().cpu()
        inputs = self.processor(images=pixels.permute(1, 2, 0).numpy(), return_tensors="pt")
        detections = self.processor.post_process_object_detection(
            self.model(**inputs.to(self.device)),
            threshold=self.threshold,
            target_sizes=[tuple(image.shape[-2:])],
        )[0]
        columns = (detections[key].tolist() for key in ("scores", "labels", "boxes"))
        boxes = []
        for score, label, (x0, y0, x1, y1) in zip(*columns, strict=True):
            name = self.model.config.id2label[label]
            color = nearest_color(image, x0, y0, x1, y1) if name in colored else None
            boxes.append(Box(name, score, x0, y0, x1, y1, color))
        return sorted(boxes, key=lambda box: -box.score)


def nearest_color(image: Tensor, x0: float, y0: float, x1: float, y1: float) -> str:
    """The color of GenEval that is nearest to the median of the inner half of a box.

    Args:
        image: image [3, H, W] in 0..1.
        x0: left edge in pixels.
        y0: top edge in pixels.
        x1: right edge in pixels.
        y1: bottom edge in pixels.
    """
    width, height = x1 - x0, y1 - y0
    inner = image[
        :,
        round(y0 + height / 4) : max(round(y1 - height / 4), 1),
        round(x0 + width / 4) : max(round(x1 - width / 4), 1),
    ]
    median = inner.flatten(1).median(1).values.cpu().numpy()
    return min(COLORS, key=lambda name: float(np.square(np.array(_RGB[name]) - median).sum()))
