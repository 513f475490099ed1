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
    """A file of a run is not readable.

    Attributes:
        path: the file.
        reason: what is wrong.
    """

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(f"{path}: damaged ({reason})")
        self.path, self.reason = path, str(reason)


def encode_image(pixels: Pixels, size: int | None = None) -> bytes:
    """An image as WebP: lossless up to 64 pixels, else lossy.

    Args:
        pixels: the image.
        size: largest number of pixels on the longer side. Default: the size of the image.
    """
    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    if max(image.size) <= LOSSLESS:  # the fastest encoder, whose files are only a tenth larger
        image.save(stream, format="WEBP", lossless=True, exact=True, method=0, quality=0)
        return stream.getvalue()
    quality = QUALITY
    if size is not None:
        quality = THUMBNAIL_QUALITY
        image.thumbnail((size, size), Image.Resampling.BOX)  # much faster than Lanczos
    image.save(stream, format="WEBP", quality=quality, method=0)  # twice as fast as 2
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
                raise DamagedRecord(path, f"{name} is compressed")
            return archive.read(member)
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError) as error:
        raise DamagedRecord(path, error) from None


def member_names(path: Path) -> list[str]:
    """The names of the members of a ZIP file.

    Raises:
        DamagedRecord: the file is not readable.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        raise DamagedRecord(path, error) from None
