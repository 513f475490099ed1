"""The directories of `flowgrain evaluate`, which may still be growing.

Shapes: I images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flowgrain.view.catalog import Entry
from flowgrain.view.readable import Missing, readable
from flowgrain.yaml_text import check_yaml

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_KEYS = ("model", "steps", "seed", "place", "prompt")
_WEIGHT = "#weight"


@dataclass(frozen=True)
class ScoredImages:
    """The images of a model from one seed.

    Attributes:
        label: label of the model.
        steps: ODE steps.
        seed: seed of the noise.
        places: [I] places of the prompts among all prompts, in ascending order.
        prompts: [I] texts.
        scores: [I] by metric, NaN where it failed.
    """

    label: str
    steps: int
    seed: int
    places: list[int]
    prompts: list[str]
    scores: dict[str, list[float]]

    @property
    def name(self) -> str:
        """Name among all models, steps and seeds of the directory."""
        return f"{self.label}@{self.steps}-{self.seed}"

    def image(self, entry: Entry, position: int) -> Path:
        """The image of the prompt number `position` in `places`.

        Raises:
            Missing: the evaluation did not keep images.
        """
        if not 0 <= position < len(self.places):
            raise Missing(f"{entry.id}: {self.name} has no image {position}.")
        folder = f"{self.steps:04d}-{self.seed}"
        path = entry.file("images", self.label, folder, f"{self.places[position]:06d}.png")
        if not path.is_file():
            raise Missing(f"{entry.id}: the evaluation kept no images. Repeat it with --images.")
        return path


def describe(entry: Entry) -> dict[str, Any]:
    """The row of an evaluation in the list of runs.

    Raises:
        ValueError: its evaluation.yaml is not readable.
    """

    def read() -> dict[str, Any]:
        models = _record(entry.file("evaluation.yaml")).get("models")
        files = entry.folder.glob("scores/*/[0-9]*.parquet")
        return {
            "id": entry.id,
            "kind": "evaluation",
            "folder": str(entry.folder),
            "labels": [str(label) for label in models] if isinstance(models, dict) else [],
            "steps": sorted({int(file.name.split("-")[0]) for file in files}),
        }

    return entry.cached("row", read)


def scored_images(entry: Entry, damaged: list[str]) -> list[ScoredImages]:
    """All models, steps and seeds of an evaluation. Damaged files are noted in `damaged`."""

    def read() -> tuple[list[ScoredImages], list[str]]:
        notes: list[str] = []
        files = sorted(entry.folder.glob("scores/*/[0-9]*.parquet"))
        parts = [readable(notes, _chunk, entry, file) for file in files]
        merged: dict[str, list[ScoredImages]] = {}
        for part in parts:
            if part is not None:
                merged.setdefault(part.name, []).append(part)
        return [_merge(chunks) for chunks in merged.values()], notes

    found, notes = entry.cached("scores", read)
    damaged += notes
    return found


def _record(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        check_yaml(text, mapping=True)
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return values if isinstance(values, dict) else {}


def _chunk(entry: Entry, file: Path) -> ScoredImages:
    """The images of a file of scores, which all have the same model, steps and seed.

    Raises:
        ValueError: the file is damaged.
    """
    import pyarrow
    from pyarrow import parquet

    path = entry.file(*file.relative_to(entry.folder).parts)
    try:
        columns = parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if any(not columns.get(key) for key in _KEYS):
        raise ValueError(f"{path}: damaged (it has not the columns {', '.join(_KEYS)})")
    label, steps, seed = (columns[key][0] for key in _KEYS[:3])
    return ScoredImages(
        label=_one_part(label),
        steps=int(steps),
        seed=int(seed),
        places=[int(place) for place in columns["place"]],
        prompts=[str(prompt) for prompt in columns["prompt"]],
        scores={
            name: [float("nan") if value is None else float(value) for value in values]
            for name, values in columns.items()
            if name not in _KEYS and "/" not in name and not name.endswith(_WEIGHT)
        },
    )


def _one_part(label: Any) -> str:
    """The label of a model, which is the name of a directory.

    Raises:
        ValueError: it is no such name.
    """
    if not isinstance(label, str) or Path(label).name != label:
        raise ValueError(f"{label!r}: not the label of a model")
    return label


def _merge(chunks: list[ScoredImages]) -> ScoredImages:
    """The images of all chunks in the order of their places."""
    rows = [
        (place, prompt, {name: values[row] for name, values in chunk.scores.items()})
        for chunk in chunks
        for row, (place, prompt) in enumerate(zip(chunk.places, chunk.prompts, strict=True))
    ]
    rows.sort(key=lambda row: row[0])
    names = dict.fromkeys(name for chunk in chunks for name in chunk.scores)
    first = chunks[0]
    return ScoredImages(
        first.label,
        first.steps,
        first.seed,
        [place for place, _, _ in rows],
        [prompt for _, prompt, _ in rows],
        {name: [scores.get(name, float("nan")) for _, _, scores in rows] for name in names},
    )
