"""TensorBoard: event files in the directory of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flowgrain.training.trackers.base import ImageTable, TrackedRun, import_library

FOLDER = "tensorboard"
"""Directory of the event files in the directory of a run."""


class TensorBoard:
    """Writes event files. TensorBoard has no alarms and no tables: both are texts.

    A resumed run hides the earlier events of the steps that it trains again.
    """

    def __init__(self, run: TrackedRun) -> None:
        library = import_library("tensorboard")
        self._writer = library.SummaryWriter(str(run.folder / FOLDER), purge_step=run.first_step)
        text = yaml.safe_dump(dict(run.config), sort_keys=False)
        self._text("config", f"```yaml\n{text}```", run.first_step or 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def images(self, name: str, table: ImageTable) -> None:
        self._writer.add_images(name, np.stack(table.images), table.step, dataformats="NHWC")
        self._text(name, _markdown(table), table.step)

    def alarm(self, step: int, title: str, message: str) -> None:
        self._text("alarms", f"**{title}**: {message}", step)

    def artifact(self, folder: Path) -> None:
        """TensorBoard has no artifacts."""

    def close(self) -> None:
        self._writer.close()

    def _text(self, tag: str, text: str, step: int) -> None:
        self._writer.add_text(tag, text, step)
        self._writer.flush()


def _markdown(table: ImageTable) -> str:
    """The values as a Markdown table. Row n belongs to image n of the grid, row by row from 1."""
    lines = [["", *table.columns], ["---"] * (len(table.columns) + 1)]
    lines += [[str(n), *map(_cell, row)] for n, row in enumerate(table.rows, 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else " ".join(str(value).replace("|", "\\|").split())
