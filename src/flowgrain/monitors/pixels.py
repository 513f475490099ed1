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
    finite = images.sum((1, 2, 3)).isfinite()  # a sum with NaN or infinity is not finite
    if images.device.type != "cpu" or not finite.all():  # a question to a GPU would wait for it
        images = images.nan_to_num(0.0, 0.0, 0.0)
    gray = luminance(images)
    values = {
        "edge_density": edge_density(gray),
        "dark": share(gray < DARK),
        "saturated": saturated(images),
        "color_entropy": color_entropy(images),
        "high_frequency": high_frequency(gray),
    }
    return {name: torch.where(finite, value, torch.nan) for name, value in values.items()}


def luminance(images: Tensor) -> Tensor:
    """Luminance [I, H, W] in 0..1 of images [I, 3, H, W] (ITU-R BT.601)."""
    red, green, blue = images.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def share(pixels: Tensor) -> Tensor:
    """Share [I] of the pixels [I, H, W] that are true."""
    count = pixels.flatten(1).sum(1, dtype=torch.int32)
    return count / max(pixels[0].numel() if len(pixels) else 1, 1)


def edge_density(gray: Tensor) -> Tensor:
    """Share of pixels [I] where the gradient of the luminance [I, H, W] is above `EDGE`.

    The gradient is the difference to the next pixel to the right and below. The last row and the
    last column have no next pixel and do not count.
    """
    corner = gray[:, :-1, :-1]
    across, down = gray[:, :-1, 1:] - corner, gray[:, 1:, :-1] - corner
    return share(across.square_() + down.square_() > EDGE**2)


def saturated(images: Tensor) -> Tensor:
    """Share of pixels [I] with a chroma, max - min of the channels, above `SATURATED`."""
    red, green, blue = images.unbind(1)  # much faster than aminmax of three channels
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    return share(high - low > SATURATED)


def color_entropy(images: Tensor) -> Tensor:
    """Entropy [I] in bits of the histogram of colors, with `LEVELS` levels per channel."""
    # Small integers are exact in float32, whose operations are faster than those of int64.
    red, green, blue = (images * LEVELS).clamp(0, LEVELS - 1).floor_().unbind(1)
    colors = ((red * LEVELS + green) * LEVELS + blue).flatten(1).int()  # (I, H * W)
    number = torch.arange(len(images), device=images.device, dtype=torch.int32) * LEVELS**3
    found = (colors + number[:, None]).flatten()
    counts = _histogram(found, len(images) * LEVELS**3).reshape(len(images), -1)
    pixels = colors.shape[1]
    # The terms of all possible counts, because a logarithm is slower than a lookup.
    terms = torch.special.entr(torch.arange(pixels + 1, device=images.device) / pixels)
    entropy: Tensor = terms[counts].sum(1) / math.log(2)
    return entropy


def _histogram(values: Tensor, size: int) -> Tensor:
    """How often each of 0 .. `size` - 1 occurs in the integers `values`."""
    if values.device.type == "cpu":
        return torch.bincount(values, minlength=size)
    # On a GPU, bincount waits for the largest value.
    counts = torch.zeros(size, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, values.long(), torch.ones_like(values, dtype=torch.int64))


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
    of_high = (power * high).sum((1, 2)) / total.clamp(min=_CONSTANT)
    return torch.where(total > _CONSTANT, of_high, 0.0)
