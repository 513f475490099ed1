"""Preprocessing of images for CLIP-like models: resizing, cropping and normalization.

Letters: I images, H x W pixels.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

Mode = Literal["crop", "torchvision", "squash", "pad"]

# Offset of the resized image in the square if the difference of the sizes is odd. transformers
# rounds down, torchvision rounds half to even, HPS makes the first bar the narrower one.
_ROUND: dict[str, Callable[[float], int]] = {
    "crop": math.floor,
    "torchvision": round,
    "squash": math.floor,
    "pad": math.ceil,
}


def fit(
    images: Tensor, size: int, mode: Mode, edge: int | None = None, resample: str = "bicubic"
) -> Tensor:
    """Images resized to squares [I, 3, size, size], with antialiasing as in Pillow.

    Args:
        images: images [I, 3, H, W] in 0..1.
        size: side of the square in pixels.
        mode: "crop" resizes the shorter side to `edge` and crops the center. "torchvision" does the
            same with the rounding of torchvision. "squash" resizes both sides to `edge` and crops
            the center. "pad" resizes the longer side to `edge` and pads with black, as in HPS.
        edge: size after resizing, in pixels. Default: `size`.
        resample: "bilinear" or "bicubic".
    """
    h, w = images.shape[-2:]
    edge = edge or size
    if mode == "squash":
        shape = edge, edge
    elif mode == "pad":
        shape = max(round(h * (edge / max(h, w))), 1), max(round(w * (edge / max(h, w))), 1)
    else:
        shape = int(edge * h / min(h, w)), int(edge * w / min(h, w))
    for part in ((h, shape[1]), shape):  # two passes, as in Pillow
        if part != images.shape[-2:]:
            images = F.interpolate(images, part, mode=resample, antialias=True, align_corners=False)
            if mode != "pad":  # Pillow resizes bytes, which cannot overshoot. HPS resizes floats.
                images = images.clamp(0, 1)
    top, left = (_ROUND[mode]((side - size) / 2) for side in shape)
    # A negative width of F.pad crops.
    return F.pad(images, (-left, size - shape[1] + left, -top, size - shape[0] + top))


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of a model: `fit`, then normalization.

    Args:
        size: side of the model's input in pixels.
        mode: see `fit`.
        edge: see `fit`.
        resample: see `fit`.
        mean: mean of each channel.
        std: standard deviation of each channel.
    """

    size: int
    mode: Mode = "crop"
    edge: int | None = None
    resample: str = "bicubic"
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD

    def __call__(self, images: Tensor) -> Tensor:
        """Model inputs [I, 3, size, size] of images [I, 3, H, W] in 0..1."""
        mean, std = (
            torch.tensor(values, device=images.device).reshape(1, 3, 1, 1)
            for values in (self.mean, self.std)
        )
        return (fit(images, self.size, self.mode, self.edge, self.resample) - mean) / std


_FILTERS = {2: "bilinear", 3: "bicubic"}  # numbers of Pillow's resampling filters

_REQUIREMENTS = {
    "do_resize": "it must be true, because the input of the model is {size} x {size}",
    "do_rescale": "it must be true, because images are in 0..1",
    "resample": "only 2 (bilinear) and 3 (bicubic) are supported",
    "size": "height and width must be equal, or shortest_edge must be given with do_center_crop, "
    "and the result must be {size} x {size}",
    "crop_size": "it must be {size} x {size}, the input of the model",
}


def read_preprocess(config: Mapping[str, Any], size: int, siglip: bool) -> Preprocess:
    """The preprocessing that a preprocessor_config.json of transformers describes.

    Args:
        config: entries of the file. Missing entries have the defaults of the CLIP or SigLIP
            processor of transformers.
        size: side of the model's input in pixels.
        siglip: use the defaults of SigLIP.

    Raises:
        ValueError: an entry has a value that is not supported.
    """
    entries = _defaults(size, siglip)
    entries |= {entry: value for entry, value in config.items() if value is not None}
    crop, target, crop_size = entries["do_center_crop"], entries["size"], entries["crop_size"]
    if isinstance(target, int):
        target = {"shortest_edge": target} if crop else {"height": target, "width": target}
    squash = set(target) == {"height", "width"} and target["height"] == target["width"]
    edge = target["height"] if squash else target.get("shortest_edge")
    unsupported = {
        "do_resize": not entries["do_resize"],
        "do_rescale": not entries["do_rescale"],
        "resample": entries["resample"] not in _FILTERS,
        "size": (not squash and set(target) != {"shortest_edge"})
        or (not crop and (not squash or edge != size)),
        "crop_size": crop and crop_size not in (size, {"height": size, "width": size}),
    }
    for entry, wrong in unsupported.items():
        if wrong:
            raise ValueError(
                f"preprocessor_config.json: {entry}={entries[entry]} is not supported: "
                f"{_REQUIREMENTS[entry].format(size=size)}"
            )
    mean, std = (0.0,) * 3, (1.0,) * 3
    if entries["do_normalize"]:
        mean, std = tuple(entries["image_mean"]), tuple(entries["image_std"])
    mode: Mode = "squash" if squash else "crop"
    return Preprocess(size, mode, edge, _FILTERS[entries["resample"]], mean, std)


def _defaults(size: int, siglip: bool) -> dict[str, Any]:
    """The defaults of the image processors of CLIP and SigLIP in transformers."""
    shared = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "crop_size": size,
    }
    if siglip:
        return shared | {
            "do_center_crop": False,
            "size": {"height": size, "width": size},
            "image_mean": SIGLIP_MEAN,
            "image_std": SIGLIP_STD,
        }
    return shared | {
        "do_center_crop": True,
        "size": {"shortest_edge": size},
        "image_mean": OPENAI_MEAN,
        "image_std": OPENAI_STD,
    }
