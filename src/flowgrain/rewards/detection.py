"""Object detection for GenEval with models of transformers: boxes, and masks if available.

Letters: Q queries of the model, C classes, K detected objects, H x W pixels of the image,
h x w pixels of the predicted masks.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flowgrain.rewards.checkpoints import loading
from flowgrain.rewards.options import check_device

_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_DIVISOR = 32
_MAX_OBJECTS = 100

_GENEVAL_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "hair dryer": "hair drier",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "sofa": "couch",
    "tv monitor": "tv",
    "tvmonitor": "tv",
}


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
        color: a color of GenEval, or None if the color does not matter.
        mask: pixels [H, W] of the object as booleans, or None if the detector has no masks.
    """

    name: str
    score: float
    x0: float
    y0: float
    x1: float
    y1: float
    color: str | None = None
    mask: Tensor | None = field(default=None, compare=False, repr=False)


class Detector(Protocol):
    """An object detector."""

    @property
    def classes(self) -> Collection[str]:
        """Names of the classes that it can detect."""
        ...

    def __call__(self, image: Tensor, threshold: float) -> list[Box]:
        """Boxes with scores above `threshold` in an image [3, H, W] in 0..1."""
        ...


def geneval_name(name: str) -> str:
    """GenEval's name of a COCO class, which has different names in different label files."""
    name = name.strip().lower().replace("_", " ")
    return _GENEVAL_NAMES.get(name, name)


def load_detector(path: str, device: str = "cpu") -> Detector:
    """The detector at `path`: with masks if it is a Mask2Former model, otherwise with boxes only.

    Args:
        path: directory or Hugging Face repository of the model.
        device: "cpu", "cuda" or "cuda:INDEX".

    Raises:
        OptionError: the model cannot be loaded, or the machine does not have the device.
    """
    from transformers import AutoConfig, Mask2FormerConfig

    with loading(path):
        masks = isinstance(AutoConfig.from_pretrained(path), Mask2FormerConfig)
    if masks:
        return MaskDetector(path, device)
    return BoxDetector(path, device)


class BoxDetector:
    """A detector without masks: an object detection model of transformers, such as DETR.

    Args:
        path: directory or Hugging Face repository of the model.
        device: "cpu", "cuda" or "cuda:INDEX".
    """

    def __init__(self, path: str, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self.device = check_device(device)
        with loading(path):
            processor_class: Any = AutoImageProcessor
            self.processor = processor_class.from_pretrained(path)
            self.model: Any = AutoModelForObjectDetection.from_pretrained(path)
        self.model.eval().requires_grad_(False).to(device)
        self.names = _names(self.model.config)
        self.classes = frozenset(self.names.values())

    @torch.no_grad()
    def __call__(self, image: Tensor, threshold: float) -> list[Box]:
        """Boxes with scores above `threshold` in an image [3, H, W] in 0..1."""
        pixels = (image.clamp(0, 1) * 255).round().byte().cpu()
        inputs = self.processor(images=pixels.permute(1, 2, 0).numpy(), return_tensors="pt")
        found = self.processor.post_process_object_detection(
            self.model(**inputs.to(self.device)),
            threshold=threshold,
            target_sizes=[tuple(image.shape[-2:])],
        )[0]
        columns = (found[key].tolist() for key in ("scores", "labels", "boxes"))
        return [
            Box(self.names[label], score, *corners)
            for score, label, corners in zip(*columns, strict=True)
        ]


class MaskDetector:
    """A detector with masks: Mask2Former (Cheng et al. 2022, arXiv:2112.01527) of transformers.

    Preprocessing and postprocessing follow the detector of GenEval, which is the Mask2Former of
    mmdetection. The image processor of transformers is not used, because it rescales masks to
    384 x 384 pixels.

    Args:
        path: directory or Hugging Face repository of the model.
        device: "cpu", "cuda" or "cuda:INDEX".
        short_side: the shorter side of the image is resized to this number of pixels.
        long_side: largest size of the longer side in pixels.
    """

    def __init__(
        self, path: str, device: str = "cpu", short_side: int = 800, long_side: int = 1333
    ) -> None:
        from transformers import Mask2FormerForUniversalSegmentation

        self.device, self.short_side, self.long_side = check_device(device), short_side, long_side
        with loading(path):
            model: Any = Mask2FormerForUniversalSegmentation.from_pretrained(path)
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.names = _names(self.model.config)
        self.classes = frozenset(self.names.values())

    @torch.no_grad()
    def __call__(self, image: Tensor, threshold: float) -> list[Box]:
        """Boxes with scores above `threshold` in an image [3, H, W] in 0..1, with their masks."""
        resized = self._resize(image.float().to(self.device))
        height, width = resized.shape[-2:]
        bottom, right = -height % _DIVISOR, -width % _DIVISOR
        mean, std = (
            torch.tensor(values, device=self.device).reshape(3, 1, 1) for values in (_MEAN, _STD)
        )
        padded = F.pad((resized - mean) / std, (0, right, 0, bottom))
        output = self.model(pixel_values=padded[None])

        def masks_of_image(logits: Tensor) -> Tensor:
            # One channel, because F.interpolate does not accept zero channels.
            logits = F.interpolate(logits[:, None], padded.shape[-2:], mode="bilinear")
            logits = logits[..., :height, :width]
            return F.interpolate(logits, image.shape[-2:], mode="bilinear")[:, 0]

        class_logits, mask_logits = output.class_queries_logits[0], output.masks_queries_logits[0]
        scores, labels, query = best_classes(class_logits, threshold)
        scores, masks = scored_masks(scores, masks_of_image(mask_logits[query].float()))
        return [
            Box(self.names[label], score, *mask_corners(mask), mask=mask)
            for score, label, mask in zip(scores.tolist(), labels.tolist(), masks, strict=True)
            if score > threshold
        ]

    def _resize(self, image: Tensor) -> Tensor:
        """The image with 8-bit values 0..255 and the size for the model, without antialiasing."""
        sides = image.shape[-2:]
        factor = min(self.short_side / min(sides), self.long_side / max(sides))
        size = [int(side * factor + 0.5) for side in sides]
        pixels = (image.clamp(0, 1) * 255).round()
        return F.interpolate(pixels[None], size, mode="bilinear")[0].round()


def best_classes(class_logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Probability, class and query of the 100 most probable pairs of query and class.

    A query can be an object of several classes. Pairs with probabilities up to `threshold` are left
    out, because the score of an object is at most its probability.

    Args:
        class_logits: logits [Q, C + 1]. The last class means that there is no object.
        threshold: lowest score.

    Returns:
        probabilities [K] in descending order, classes [K] and queries [K].
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    best = probabilities.flatten().topk(min(_MAX_OBJECTS, probabilities.numel()))
    chosen = best.values > threshold
    index = best.indices[chosen]
    classes = probabilities.shape[1]
    return best.values[chosen], index % classes, index // classes


def scored_masks(probabilities: Tensor, mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [K] and masks [K, H, W] of objects.

    A score is the probability of the class times the mean probability of the mask's pixels. An
    object without pixels has the score 0.

    Args:
        probabilities: probabilities [K] of the classes.
        mask_logits: logits [K, H, W] of the masks.
    """
    masks = mask_logits > 0
    inside = (mask_logits.sigmoid() * masks).sum((1, 2))
    return probabilities * inside / (masks.sum((1, 2)) + 1e-6), masks


def mask_corners(mask: Tensor) -> tuple[float, float, float, float]:
    """Left, top, right and bottom edge of a mask [H, W] that has pixels."""
    rows, columns = (mask.any(dim).nonzero().flatten() for dim in (1, 0))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def _names(config: Any) -> dict[int, str]:
    return {int(label): geneval_name(name) for label, name in config.id2label.items()}
