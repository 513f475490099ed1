"""Files of an evaluation: scores as Parquet, one file per chunk, and images as PNG.

Shapes: I images, H x W pixels.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray
from PIL import Image
from pyarrow import parquet

from flowgrain.evaluation.request import EvaluationRequest
from flowgrain.evaluation.targets import Target
from flowgrain.settings import SettingsError, one_line
from flowgrain.training.evaluate import Evaluation
from flowgrain.training.pictures import to_pixels

log = logging.getLogger(__name__)
CHUNK_SIZE = 64
"""Images of a chunk. An interruption loses at most the unfinished chunk."""
PART_WEIGHT = "#weight"
"""Suffix of the columns with the weights of a part."""

Columns = dict[str, NDArray[Any]]
"""Columns [I]: model, steps, seed, place, prompt, metrics, "metric/part", weights of parts."""


@dataclass(frozen=True)
class Chunk:
    """Images that are sampled, scored and saved together.

    Attributes:
        target: the model.
        steps: ODE steps.
        seed: seed of the initial noise.
        first: place of the first image among all prompts.
        count: number of images.
    """

    target: Target
    steps: int
    seed: int
    first: int
    count: int

    @property
    def places(self) -> range:
        """Places of the images among all prompts."""
        return range(self.first, self.first + self.count)

    def file(self, folder: Path) -> Path:
        """The file of the scores."""
        name = f"{self.steps:04d}-{self.seed}-{self.first:06d}.parquet"
        return folder / "scores" / self.target.label / name

    def image(self, folder: Path, place: int) -> Path:
        """The file of the image at `place`."""
        return image_path(folder, self.target.label, self.steps, self.seed, place)


def chunks(request: EvaluationRequest, num_prompts: int) -> Iterator[Chunk]:
    """All chunks of a request, model by model."""
    for target in request.targets:
        for steps in request.steps:
            for seed in request.seeds:
                for first in range(0, num_prompts, CHUNK_SIZE):
                    count = min(CHUNK_SIZE, num_prompts - first)
                    yield Chunk(target, steps, seed, first, count)


def image_path(folder: Path, label: str, steps: int, seed: int, place: int) -> Path:
    """The file of the image at `place` among all prompts."""
    return folder / "images" / label / f"{steps:04d}-{seed}" / f"{place:06d}.png"


def read_chunk(folder: Path, chunk: Chunk, metrics: Iterable[str] = ()) -> Columns | None:
    """The columns of a finished chunk. None if its file is missing or damaged.

    Args:
        folder: output directory of the evaluation.
        chunk: the chunk.
        metrics: columns that the file must contain.
    """
    file = chunk.file(folder)
    if not file.exists():
        return None
    try:
        table = _read_table(file, metrics)
        if table.column("place").to_pylist() != list(chunk.places):
            raise ValueError("it contains other images")
        return _columns(table)
    except _DAMAGED as error:
        log.warning("%s is damaged (%s). Its images are evaluated again.", file, one_line(error))
        _set_aside(file)
        return None


def write_chunk(folder: Path, chunk: Chunk, evaluation: Evaluation) -> None:
    """Write the scores of a chunk atomically."""
    columns: dict[str, Any] = {
        "model": [chunk.target.label] * chunk.count,
        "steps": [chunk.steps] * chunk.count,
        "seed": [chunk.seed] * chunk.count,
        "place": list(chunk.places),
        "prompt": [prompt.text for prompt in evaluation.prompts],
        **evaluation.scores,
        **evaluation.parts,
        **{f"{name}{PART_WEIGHT}": values for name, values in evaluation.part_weights.items()},
    }
    file = chunk.file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_table(pyarrow.table(columns), file)


def write_images(folder: Path, chunk: Chunk, evaluation: Evaluation) -> None:
    """Write the images of a chunk."""
    for place, pixels in zip(chunk.places, to_pixels(evaluation.images), strict=True):
        file = chunk.image(folder, place)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)


def read_scores(folder: Path) -> Columns:
    """All finished chunks of an evaluation as columns. Also writes them to `folder`/scores.parquet.

    Damaged files are reported as a warning, renamed to damaged-NAME.old, and left out.

    Raises:
        SettingsError: no chunk is finished.
    """
    files = sorted((folder / "scores").glob("*/*.parquet"))
    tables = []
    for file in files:
        try:
            tables.append(_read_table(file))
        except _DAMAGED as error:
            log.warning(
                "%s is damaged (%s). It is left out. Repeat the command that evaluated it.",
                *(file, one_line(error)),
            )
            _set_aside(file)
    if not tables:
        raise SettingsError(
            f"{folder}: contains no scores yet. Run `flowgrain evaluate ... --out {folder}`."
        )
    table = pyarrow.concat_tables(tables, promote_options="default")
    _write_table(table, folder / "scores.parquet")
    return _columns(table)


def _set_aside(file: Path) -> None:
    """Rename a damaged file, so that it is not read again."""
    with contextlib.suppress(OSError):  # a read-only directory
        file.rename(file.with_name(f"damaged-{file.name}.old"))


def _read_table(file: Path, metrics: Iterable[str] = ()) -> Any:
    """The table in `file`, with all columns that a table of scores has.

    Raises:
        ValueError: a column is missing or has another type, or one of `_DAMAGED`.
    """
    table = parquet.read_table(file)
    required = {"model": "text", "prompt": "text", **dict.fromkeys(metrics, "number")}
    required |= dict.fromkeys(("steps", "seed", "place"), "integer")
    missing = [name for name in required if name not in table.column_names]
    if missing or not table.num_rows:
        raise ValueError(f"it has no column {missing[0]}" if missing else "it has no rows")
    for name in table.column_names:
        kind, column = table.schema.field(name).type, table.column(name)
        expected = required.get(name, "number")
        if not _IS[expected](kind) or (name in required and column.null_count):
            raise ValueError(f"its column {name} is not {expected}")
    return table


_IS: Mapping[str, Callable[[Any], bool]] = {
    "text": lambda kind: pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind),
    "integer": pyarrow.types.is_integer,
    "number": pyarrow.types.is_floating,
}
_DAMAGED = (pyarrow.ArrowException, OSError, ValueError, KeyError)
"""What reading a damaged file raises."""


def _columns(table: Any) -> Columns:
    return {
        name: np.asarray(table.column(name).to_numpy(zero_copy_only=False))
        for name in table.column_names
    }


def _write_table(table: Any, file: Path) -> None:
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.tmp")
    parquet.write_table(table, temporary)
    temporary.replace(file)
