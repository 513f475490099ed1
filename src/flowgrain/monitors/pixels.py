"""Monitors of single images, computed from their pixels.

Shapes: I images, H x W pixels. A value is NaN for an image with NaN or infinity.
"""

import math

import torch
from torch import Tensor

EDGE = 0.1
"""Gradient of the luminance at an edge, per pixel."""
DARK = 0.1
"""Luminance below which a pixel is dark."""
SATURATED = 0.8
"""Difference of the largest and the smallest channel above which a pixel is saturated."""
LEVELS = 8
"""Levels per channel in the histogram of colors."""
_CONSTANT = 1e-10
"""Variance of the luminance below which an image has a single color, except for rounding."""
_PIXELS = 2**22
"""Pixels that are measured together. It limits the memory."""


@torch.no_grad()
def measure(images: Tensor) -> dict[str, Tensor]:
    """All monitors of this file by name, [I] each in float32, on the device of the images.

    Args:
        images: [I, 3, H, W] in 0..1.
    """
    together = max(1, _PIXELS // max(images.shape[-2] * images.shape[-1], 1))
    parts = [_measure(part.float()) for part in torch.split(images, together)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _measure(images: Tensor) -> dict[str, Tensor]:
    finite = images.isfinite().flatten(1).all(1)
    images = images.nan_to_num(0.0, 0.0, 0.0)
    gray = luminance(images)
    values = {
        "edge_density": edge_density(gray),
        "dark": (gray < DARK).flatten(1).float().mean(1),
        "saturated": saturated(images),
        "color_entropy": color_entropy(images),
        "high_frequency": high_frequency(gray),
    }
    return {name: torch.where(finite, value, torch.nan) for name, value in values.items()}


def luminance(images: Tensor) -> Tensor:
    """Luminance [I, H, W] in 0..1 of images [I, 3, H, W] (ITU-R BT.601)."""
    red, green, blue = images.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def edge_density(gray: Tensor) -> Tensor:
    """Share of pixels [I] where the gradient of the luminance [I, H, W] is above `EDGE`.

    The gradient is the difference to the next pixel to the right and below. The last row and the
    last column have no next pixel and do not count.
    """
    corner = gray[:, :-1, :-1]
    across, down = gray[:, :-1, 1:] - corner, gray[:, 1:, :-1] - corner
    edges = across.square() + down.square() > EDGE**2
    return edges.flatten(1).float().mean(1)


def saturated(images: Tensor) -> Tensor:
    """Share of pixels [I] with a chroma, max - min of the channels, above `SATURATED`."""
    low, high = images.aminmax(dim=1)
    return (high - low > SATURATED).flatten(1).float().mean(1)


def color_entropy(images: Tensor) -> Tensor:
    """Entropy [I] in bits of the histogram of colors, with `LEVELS` levels per channel."""
    levels = (images * LEVELS).long().clamp(0, LEVELS - 1)
    red, green, blue = levels.unbind(1)
    colors = (red * LEVELS + green) * LEVELS + blue  # (I, H, W)
    number = torch.arange(len(images), device=images.device) * LEVELS**3
    found = (colors.flatten(1) + number[:, None]).flatten()
    counts = torch.bincount(found, minlength=len(images) * LEVELS**3).reshape(len(images), -1)
    share = counts / colors[0].numel()
    entropy: Tensor = torch.special.entr(share).sum(1) / math.log(2)
    return entropy


def high_frequency(gray: Tensor) -> Tensor:
    """Share [I] of the variance of the luminance at frequencies above a quarter cycle per pixel.

    That is half of the largest frequency of a row. An image of a single color has 0.
    """
    height, width = gray.shape[1:]
    power = torch.fft.rfft2(gray - gray.mean((1, 2), keepdim=True), norm="forward").abs().square()
    # rfft2 leaves out the negative frequencies of a row, which have the same power.
    copies = torch.full((width // 2 + 1,), 2.0, device=gray.device)
    copies[0] = 1
    if width % 2 == 0:
        copies[-1] = 1
    power = power * copies
    down = torch.fft.fftfreq(height, device=gray.device)[:, None]
    across = torch.fft.rfftfreq(width, device=gray.device)
    high = (down.square() + across.square()).sqrt() > 0.25
    total = power.sum((1, 2))
    share = (power * high).sum((1, 2)) / total.clamp(min=_CONSTANT)
    return torch.where(total > _CONSTANT, share, 0.0)
