"""Data sets of images with prompts: pairs of a preferred and a rejected image, or single images.

Shapes: K images of a prompt, H x W pixels.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowgrain.data import Prompt, existing_file, read_prompts
from flowgrain.settings import SettingsError, one_line, printable

DataKind = Literal["pairs", "images"]
COLUMNS: dict[DataKind, tuple[str, ...]] = {
    "pairs": ("image_chosen", "image_rejected"),
    "images": ("image",),
}
IMAGES_OF_PROMPT: dict[DataKind, int] = {kind: len(names) for kind, names in COLUMNS.items()}
PICK_A_PIC = ("jpg_0", "jpg_1", "label_0", "label_1")
"""Columns of a pair in the layout of Pick-a-Pic. A label is 1 for the preferred image."""
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_DEEP = ("I", "F")
"""Modes of images with more than 8 bits per channel. Pillow does not scale them to 8 bits."""
_DEPTH = "has more than 8 bits per channel. Convert it to 8 bits"


@dataclass(frozen=True)
class ImagePrompt(Prompt):
    """A prompt with its images from a data set.

    Attributes:
        images: K paths of image files, or contents of image files. Of a pair, the first image is
            preferred to the second.
        place: setting, file and row, for error messages.
    """

    images: tuple[Path | bytes, ...] = ()
    place: str = ""


@dataclass(frozen=True)
class ImageData:
    """The rows of a data set, and the number of pairs without a preference that were left out."""

    prompts: list[ImagePrompt]
    ties: int = 0


def read_image_data(kind: DataKind, path: str) -> ImageData:
    """The rows of a .jsonl, .json, .csv or .parquet file. No image is opened.

    A row has a prompt in one of the columns of a prompt file, and images: paths relative to the
    file, or contents of image files. Other columns are kept for rewards.

    Args:
        kind: "pairs" has the columns image_chosen and image_rejected, or those of Pick-a-Pic.
            "images" has the column image.
        path: the file.

    Raises:
        SettingsError: the file cannot be read, a column is missing, or there is no row. The message
            names the row.
    """
    setting = f"data.{kind}"
    file = existing_file(setting, path, "data set of images")
    if file.suffix.lower() not in _SUFFIXES:
        raise SettingsError(
            f"{setting}={printable(path)}: not a data set. Use a {', '.join(_SUFFIXES)} file."
        )
    prompts, ties = [], 0
    for row, prompt in enumerate(read_prompts(setting, path), 1):
        place = f"{setting}={printable(path)}: row {row}"
        columns = _image_columns(kind, prompt.fields, place)
        if columns is None:
            ties += 1
            continue
        images = tuple(_image(prompt.fields, name, file.parent, place) for name in columns)
        used = {*COLUMNS[kind], *PICK_A_PIC}
        fields = {name: value for name, value in prompt.fields.items() if name not in used}
        prompts.append(ImagePrompt(prompt.text, fields, images, place))
    if not prompts:
        raise SettingsError(
            f"{setting}={printable(path)}: all {ties} pairs are ties. "
            "Use a file with pairs of which one image is preferred."
        )
    return ImageData(prompts, ties)


def _image_columns(kind: DataKind, fields: Mapping[str, Any], place: str) -> tuple[str, ...] | None:
    """The columns of the images of a row, the preferred image first. None: a tie."""
    expected = COLUMNS[kind]
    if all(fields.get(name) is not None for name in expected):
        return expected
    if kind == "pairs" and all(fields.get(name) is not None for name in PICK_A_PIC):
        first, second = fields["label_0"], fields["label_1"]
        if not all(isinstance(label, int | float) for label in (first, second)):
            raise SettingsError(f"{place}: label_0 and label_1 are not numbers. Use 0, 0.5 and 1.")
        if first == second:
            return None
        return ("jpg_0", "jpg_1") if first > second else ("jpg_1", "jpg_0")
    known = ", ".join(fields) or "none"
    other = f", or {', '.join(PICK_A_PIC)}" if kind == "pairs" else ""
    raise SettingsError(
        f"{place} has no value in the columns {', '.join(expected)}{other}. "
        f"Its columns besides the prompt: {one_line(known, 200)}."
    )


def _image(fields: Mapping[str, Any], name: str, folder: Path, place: str) -> Path | bytes:
    """The path or the content of an image. `datasets` stores a content as {"bytes": ...}."""
    value = fields[name]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value:
        return folder / Path(value).expanduser()
    raise SettingsError(
        f"{place}: {name} is neither a path nor the content of an image file. "
        "Write a path relative to the file."
    )


def check_image_files(prompts: Iterable[ImagePrompt]) -> None:
    """Check that all images exist and have the header of an image file.

    Raises:
        SettingsError: an image does not. The message names the row.
    """
    for prompt in prompts:
        for image in prompt.images:
            try:
                _open(image).close()
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise SettingsError(_unreadable(prompt, image, error, removable=True)) from None


def load_images(prompt: ImagePrompt, height: int, width: int) -> Tensor:
    """The images [K, 3, H, W] of a prompt in 0..1, resized and cropped around the center.

    Raises:
        ValueError: an image cannot be read. The message names its row.
    """
    return torch.stack([_pixels(prompt, image, height, width) for image in prompt.images])


def _pixels(prompt: ImagePrompt, image: Path | bytes, height: int, width: int) -> Tensor:
    try:
        with _open(image) as opened:
            whole = _on_white(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(_unreadable(prompt, image, error, removable=False)) from None
    fitted = ImageOps.fit(whole, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255


def _open(image: Path | bytes) -> Image.Image:
    opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    if opened.mode.startswith(_DEEP):
        opened.close()
        raise _TooDeep
    return opened


class _TooDeep(ValueError):
    """An image has more than 8 bits per channel."""


def _on_white(image: Image.Image) -> Image.Image:
    """`image` as RGB. The color of a transparent pixel is arbitrary, so it becomes white."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _unreadable(
    prompt: ImagePrompt, image: Path | bytes, error: Exception, *, removable: bool
) -> str:
    """The message about an image that is missing or broken.

    `removable`: the row can be removed. A resumed run needs all rows of the run.
    """
    remove = ", or remove the row." if removable else "."
    if isinstance(image, bytes):
        number = [other is image for other in prompt.images].index(True) + 1
        if isinstance(error, _TooDeep):
            return f"{prompt.place}: image {number} {_DEPTH}{remove}"
        return f"{prompt.place}: image {number} is not an image file. Replace it{remove}"
    if isinstance(error, _TooDeep):
        return f"{prompt.place}: {image} {_DEPTH}{remove}"
    if isinstance(error, FileNotFoundError):
        fix = "Correct the path" if removable else "Restore it"
        return f"{prompt.place}: there is no file {image}. {fix}{remove}"
    reason = getattr(error, "strerror", None) or "not a complete image file"
    return f"{prompt.place}: {image} cannot be read ({reason}). Replace it{remove}"


def identity(prompts: Sequence[Prompt]) -> Iterator[bytes]:
    """What identifies the images of `prompts`: their paths and contents, in parts to be hashed."""
    separator = b""
    for prompt in prompts:
        for image in prompt.images if isinstance(prompt, ImagePrompt) else ():
            yield separator
            yield image if isinstance(image, bytes) else image.as_posix().encode()
            separator = b"\0"
