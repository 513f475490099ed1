"""Templates of the pages, and images inside a page."""

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from flowgrain.records.files import write_atomically

SMALL = 128
"""Images up to this size in pixels are shown with sharp pixels."""


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> Path:
    """Write the page of `template`, a file in templates/. Returns `path`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flowgrain.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    write_atomically(path, environment.get_template(template).render(values))
    return path


def tiles(path: Path, columns: int, count: int) -> list[Image.Image]:
    """The first `count` images of a contact sheet with `columns` columns, row by row.

    `count` is the number of images on the sheet. Positions without an image are left out.
    """
    with Image.open(path) as file:
        sheet = file.convert("RGB")
    width, height = sheet.width // columns, sheet.height // math.ceil(count / columns)
    corners = [(i % columns * width, i // columns * height) for i in range(count)]
    return [sheet.crop((x, y, x + width, y + height)) for x, y in corners]


def data_uri(image: Image.Image, size: int = 256) -> str:
    """`image` as a data URI, scaled down to at most `size` pixels on its longer side.

    Small images become PNG, which is lossless. Large images become JPEG, which is smaller.
    """
    file = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(file, format="png", optimize=True)
        kind = "png"
    else:
        image = image.copy()
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        image.save(file, format="jpeg", quality=90)
        kind = "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()
