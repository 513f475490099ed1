"""Images as pixels and as contact sheets."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Images [I, 3, H, W] in 0..1 as bytes [I, H, W, 3]."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    array: NDArray[np.uint8] = pixels.cpu().numpy()
    return array


def contact_sheet(pixels: NDArray[np.uint8], columns: int) -> Image.Image:
    """Images [I, H, W, 3] in rows of `columns` tiles, in their original size."""
    count, h, w, _ = pixels.shape
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, h, w, 3), dtype=np.uint8)
    sheet[:count] = pixels
    grid = sheet.reshape(rows, columns, h, w, 3).swapaxes(1, 2)
    return Image.fromarray(grid.reshape(rows * h, columns * w, 3))


def enlarge(image: Image.Image, tile: int, least: int = 128) -> Image.Image:
    """`image` enlarged by an integer factor, so that its tiles are at least `least` pixels wide.

    Args:
        image: contact sheet.
        tile: width of its tiles in pixels.
        least: minimum width of the enlarged tiles in pixels.
    """
    factor = max(1, math.ceil(least / tile))
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)
