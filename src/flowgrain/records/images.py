"""Images in the ZIP files of a run: WebP members, stored without another compression.

Shapes: H x W pixels.
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowgrain.records.files import write_atomically

Pixels = NDArray[np.uint8]
"""An image [H, W, 3]."""

LOSSLESS = 64
"""Images up to this size in pixels are lossless."""
QUALITY = 95
"""WebP quality of a large image."""
THUMBNAIL_QUALITY = 85
"""WebP quality of a thumbnail."""
_TIME = (1980, 1, 1, 0, 0, 0)
"""Time of every member, so that equal content gives equal files."""


class DamagedRecord(ValueError):
    """A file of a run is not readable. The message names the file and what is wrong."""


def encode_image(pixels: Pixels, size: int | None = None) -> bytes:
    """An image as WebP: lossless up to 64 pixels, else lossy.

    Args:
        pixels: the image.
        size: largest number of pixels on the longer side. Default: the size of the image.
    """
    image = Image.fromarray(pixels)
    lossless = max(image.size) <= LOSSLESS
    smaller = size is not None and max(image.size) > size
    if smaller and not lossless:
        assert size is not None
        # Halving with box averages first is much faster than one Lanczos filter.
        image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
    stream = io.BytesIO()
    if lossless:
        image.save(stream, format="WEBP", lossless=True, method=0, quality=20)
    else:
        quality = THUMBNAIL_QUALITY if size is not None else QUALITY
        image.save(stream, format="WEBP", quality=quality, method=0)
    return stream.getvalue()


def decode_image(content: bytes) -> Image.Image:
    """The image in the bytes of a WebP file.

    Raises:
        ValueError: they are no WebP image.
    """
    try:
        with Image.open(io.BytesIO(content), formats=["WEBP"]) as file:
            return file.convert("RGB")
    except Exception as error:  # Pillow raises many errors for damaged files
        raise ValueError(f"not a WebP image ({error})") from None


def write_zip(path: Path, members: Mapping[str, bytes]) -> int:
    """Write a ZIP file of stored members atomically. Returns its size in bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, _TIME), content)
    content = stream.getvalue()
    write_atomically(path, content)
    return len(content)


def read_member(path: Path, name: str) -> bytes:
    """The bytes of a member of a ZIP file that `write_zip` wrote.

    Raises:
        KeyError: there is no such member.
        DamagedRecord: the file is not readable.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(name)
            if member.compress_type != zipfile.ZIP_STORED:  # might expand to any size
                raise DamagedRecord(f"{path}: {name} is compressed")
            return archive.read(member)
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError) as error:
        raise DamagedRecord(f"{path}: not readable ({error})") from None


def member_names(path: Path) -> list[str]:
    """The names of the members of a ZIP file.

    Raises:
        DamagedRecord: the file is not readable.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        raise DamagedRecord(f"{path}: not readable ({error})") from None
