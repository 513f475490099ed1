"""Colors of objects, as in GenEval: CLIP zero-shot on a crop of the image.

Letters: K objects, D dimensions of the embedding, H x W pixels of the image.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flowgrain.rewards.clip import ClipReward
from flowgrain.rewards.detection import Box
from flowgrain.rewards.options import OptionError

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""The ten colors of GenEval."""

TEMPLATES = (
    "a photo of a {c} {name}",
    "a photo of a {c}-colored {name}",
    "a photo of a {c} object",
)
"""Texts of a color `c` for objects of the class `name`."""

BACKGROUND = 0x99 / 255
"""Gray value of the pixels outside of the mask, #999."""


class ColorClassifier(Protocol):
    """A function that names the colors of objects."""

    def __call__(self, image: Tensor, boxes: Sequence[Box], name: str) -> list[str]:
        """Colors of the `boxes` of the class `name` in an image [3, H, W] in 0..1."""
        ...


def crop(image: Tensor, box: Box) -> Tensor:
    """The pixels of a box, without the background if the box has a mask.

    Edges are rounded to whole pixels, half to even. The crop has at least one pixel and ends at the
    edges of the image.

    Args:
        image: image [3, H, W] in 0..1.
        box: the box.

    Returns:
        image [3, h, w] in 0..1.
    """
    height, width = image.shape[-2:]
    left, top = min(max(round(box.x0), 0), width - 1), min(max(round(box.y0), 0), height - 1)
    right, bottom = max(round(box.x1), left + 1), max(round(box.y1), top + 1)
    if box.mask is not None:
        image = torch.where(box.mask.to(image.device), image, BACKGROUND)
    return image[:, top:bottom, left:right]


def color_texts(color: str, name: str) -> list[str]:
    """The texts of a color for objects of the class `name`."""
    return [template.format(c=color, name=name) for template in TEMPLATES]


def best_colors(logits: Tensor) -> list[str]:
    """The colors with the highest of the logits [K, 10]."""
    return [COLORS[index] for index in logits.argmax(-1).tolist()]


class ClipColors:
    """Colors by CLIP zero-shot: the color whose texts are most similar to the crop of the object.

    The embedding of a color is the normalized mean over the embeddings of its texts.

    Args:
        path: directory or Hugging Face repository of a CLIP model and its tokenizer.
        device: "cpu", "cuda" or "cuda:INDEX".
    """

    def __init__(self, path: str = "openai/clip-vit-large-patch14", device: str = "cpu") -> None:
        try:
            self.clip = ClipReward(path, device, mode="torchvision")  # as in open_clip
        except OptionError as error:
            raise OptionError(str(error).replace("path=", "color_model=", 1)) from error
        self.texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: Tensor, boxes: Sequence[Box], name: str) -> list[str]:
        """Colors of the `boxes` of the class `name` in an image [3, H, W] in 0..1."""
        return best_colors(self.logits(image, boxes, name)) if boxes else []

    @torch.no_grad()
    def logits(self, image: Tensor, boxes: Sequence[Box], name: str) -> Tensor:
        """Cosine similarities [K, 10] of the crops of K boxes and the colors."""
        image = image.float().to(self.clip.device)
        embeds = [self.clip.image_embeds(crop(image, box)[None]) for box in boxes]
        return torch.cat(embeds) @ self._embeds(name).T

    def _embeds(self, name: str) -> Tensor:
        """The embeddings [10, D] of the colors for objects of the class `name`."""
        if name not in self.texts:
            texts = [text for color in COLORS for text in color_texts(color, name)]
            embeds = self.clip.text_embeds(texts)
            means = embeds.reshape(len(COLORS), len(TEMPLATES), -1).mean(1)
            self.texts[name] = F.normalize(means, dim=-1)
        return self.texts[name]
