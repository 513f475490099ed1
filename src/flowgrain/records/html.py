"""HTML of records in notebooks. All texts are escaped."""

import base64
import math
from collections.abc import Sequence
from html import escape
from typing import Any


def page(title: str, *parts: str) -> str:
    """A title and parts that are HTML."""
    return f"<div><b>{escape(title)}</b>{''.join(parts)}</div>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of texts and numbers."""
    columns = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(text_of(value))}</td>' for value in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table>"


def figure(webp: bytes, caption: str, size: int) -> str:
    """An image with a caption of one or more lines.

    Args:
        webp: bytes of a WebP file.
        caption: lines of text.
        size: width on the page in pixels.
    """
    source = f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
    lines = "<br>".join(escape(line) for line in caption.splitlines())
    return (
        f'<figure style="display:inline-block;margin:2px;text-align:center;font-size:11px">'
        f'<img src="{source}" width="{size}" style="image-rendering:auto">'
        f"<figcaption>{lines}</figcaption></figure>"
    )


def text_of(value: Any) -> str:
    """A value as text. Numbers have four digits."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return str(value)
