"""Sources of the pages Compare and Arena: the images of one model for a list of prompts.

Shapes: I prompts.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flowgrain.view import evaluations
from flowgrain.view.catalog import Catalog, Entry
from flowgrain.view.readable import Missing, readable
from flowgrain.view.runs import run_of
from flowgrain.view.scores import ScoredImages, scored_images

Image = tuple[bytes, str]
"""Content and media type of an image."""


@dataclass(frozen=True)
class Source:
    """The images of one model. Two sources show the same noise if seed, place and prompt agree.

    Attributes:
        id: its name in addresses: run:ID@STEP or evaluation:ID:LABEL@STEPS-SEED.
        label: what the pages show.
        entry: the directory that contains the images.
        step: training step of the model. None: not known.
        num_steps: ODE steps of an image.
        seed: seed of the noise.
        prompts: [I] texts.
        scores: [I] by reward, NaN where it failed.
        images: number of prompts with an image. They are the first prompts.
        image: reads the image of a prompt by its place.
        file: the path of the file that contains this image.
    """

    id: str
    label: str
    entry: Entry
    step: int | None
    num_steps: int
    seed: int
    prompts: list[str]
    scores: dict[str, list[float]]
    images: int
    image: Callable[[int], Image]
    file: Callable[[int], Path]

    def digest(self, place: int) -> str:
        """The SHA-256 of an image. See `image`."""

        def read(_: Path) -> str:
            return hashlib.sha256(self.image(place)[0]).hexdigest()

        return self.entry.of_file(("digest", self.id, place), self.file(place), read)

    def row(self) -> dict[str, Any]:
        """The row of the list of sources."""
        digest = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        return {
            "id": self.id,
            "label": self.label,
            "run": self.entry.id,
            "step": self.step,
            "num_steps": self.num_steps,
            "seed": self.seed,
            "images": self.images,
            "prompts_key": digest[:16],
        }


def listing(catalog: Catalog) -> dict[str, Any]:
    """The answer to /api/sources: all sources with images."""
    damaged: list[str] = []
    rows = []
    for entry in [*catalog.entries("run"), *catalog.entries("evaluation")]:
        found, notes = entry.cached("sources", partial(_rows, entry))
        rows += found
        damaged += notes
    return {"sources": rows, "damaged": damaged}


def content(catalog: Catalog, name: str) -> dict[str, Any]:
    """The answer to /api/sources/SOURCE: prompts and scores. See `source_of`."""
    source = source_of(catalog, name)
    return {**source.row(), "prompts": source.prompts, "scores": source.scores}


def source_of(catalog: Catalog, name: str) -> Source:
    """The source with the id `name`.

    Raises:
        Missing: there is none.
        DamagedRecord: its file is not readable.
    """
    kind, _, rest = name.partition(":")
    if kind == "run":
        run, _, step = rest.rpartition("@")
        if step.isdecimal() and len(step) < 12:
            return _of_run(catalog.entry(run, "run"), int(step))
    for entry in catalog.entries("evaluation") if kind == "evaluation" else ():
        if rest.startswith(f"{entry.id}:"):
            for source in _of_evaluation(entry, []):
                if source.id == name:
                    return source
    raise Missing(f"There is no source {name!r}.")


def _rows(entry: Entry) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all sources of a directory, and what was left out."""
    damaged: list[str] = []
    if entry.kind == "run":
        steps = evaluations.evaluation_steps(entry)
        of_steps = [readable(damaged, _of_run, entry, step) for step in steps]
        found = [source for source in of_steps if source is not None]
    else:
        found = _of_evaluation(entry, damaged)
    return [source.row() for source in found if source.images], damaged


def _of_run(entry: Entry, step: int) -> Source:
    record = evaluations.evaluation_of(entry, step)
    return Source(
        id=f"run:{entry.id}@{step}",
        label=f"{run_of(entry).name} · step {step}",
        entry=entry,
        step=step,
        num_steps=record.num_steps,
        seed=0,  # of `flowgrain.training.evaluate.evaluate`, which a run does not set
        prompts=record.prompts,
        scores=record.scores,
        images=min(evaluations.num_images(entry, record), len(record.prompts)),
        image=lambda place: (evaluations.image(entry, step, place), "image/webp"),
        file=lambda _: entry.file("evaluations", record.images_path.name),
    )


def _of_evaluation(entry: Entry, damaged: list[str]) -> list[Source]:
    return [
        Source(
            id=f"evaluation:{entry.id}:{scored.name}",
            label=f"{scored.label} · {scored.steps} steps · seed {scored.seed}",
            entry=entry,
            step=None,
            num_steps=scored.steps,
            seed=scored.seed,
            prompts=scored.prompts,
            scores=scored.scores,
            images=_num_images(entry, scored),
            image=partial(_png, entry, scored),
            file=partial(scored.image, entry),
        )
        for scored in scored_images(entry, damaged)
    ]


def _num_images(entry: Entry, scored: ScoredImages) -> int:
    """Number of prompts with an image: all or none, because a chunk has the images of all."""
    try:
        scored.image(entry, 0)
    except Missing:
        return 0
    return len(scored.prompts)


def _png(entry: Entry, scored: ScoredImages, place: int) -> Image:
    return scored.image(entry, place).read_bytes(), "image/png"
