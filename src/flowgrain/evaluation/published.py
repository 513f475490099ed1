"""Numbers from papers, which tables show as published. The data is in published.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml


@dataclass(frozen=True)
class PublishedRow:
    """A row of a paper's table.

    Attributes:
        model: name of the backbone.
        paper: paper and arXiv identifier.
        label: trained method and rewards.
        steps: inference steps. None: the paper does not state them.
        scores: scores by metric, or by "metric/part".
    """

    model: str
    paper: str
    label: str
    steps: int | None
    scores: dict[str, float]


@cache
def all_published() -> tuple[PublishedRow, ...]:
    """All published rows, in the order of the file."""
    text = files("flowgrain.evaluation").joinpath("published.yaml").read_text(encoding="utf-8")
    return tuple(
        PublishedRow(
            model=table["model"],
            paper=table["paper"],
            label=row["label"],
            steps=row.get("steps"),
            scores=dict(zip(table["metrics"], row["scores"], strict=True)),
        )
        for table in yaml.safe_load(text)
        for row in table["rows"]
    )


def published(model: str, metrics: Sequence[str], steps: Sequence[int]) -> list[PublishedRow]:
    """The published rows of a model that are comparable with a measurement.

    Args:
        model: name of the backbone.
        metrics: measured metrics and parts ("metric/part"). A row must have one of them.
        steps: measured inference steps. Rows with other step counts are left out.
    """
    return [
        row
        for row in all_published()
        if row.model == model
        and any(metric in row.scores for metric in metrics)
        and (row.steps is None or row.steps in steps)
    ]
