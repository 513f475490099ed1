"""Numbers that papers report, to stand beside one's own, marked as published. Sources are in docs/evaluation.md."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A row of a paper's table: what was trained how, its inference steps (None where not told), its scores by metric."""

    paper: str
    label: str
    steps: int | None
    scores: dict[str, float]


_PREFERENCE = ("hps", "clip", "pickscore", "imagereward", "unifiedreward")
_G2RPO = "G2RPO, arXiv 2510.01982"
_DENSE = "DenseGRPO, arXiv 2601.20218"

# inference steps are told for the tables of other budgets, not for the main one; the five scores of _PREFERENCE
_FLUX: tuple[tuple[str, int | None, tuple[float, ...]], ...] = (
    ("FLUX.1-dev", 10, (0.289, 0.388, 0.225, 0.939, 3.504)),
    ("FLUX.1-dev", None, (0.305, 0.388, 0.226, 1.040, 3.621)),
    ("FLUX.1-dev", 20, (0.300, 0.389, 0.226, 1.034, 3.575)),
    ("DanceGRPO on HPS", None, (0.353, 0.375, 0.228, 1.233, 3.548)),
    ("MixGRPO on HPS", None, (0.378, 0.358, 0.225, 1.266, 3.421)),
    ("G2RPO {1} on HPS", None, (0.376, 0.351, 0.228, 1.286, 3.469)),
    ("G2RPO {1,2,3} on HPS", None, (0.385, 0.355, 0.229, 1.313, 3.487)),
    ("DanceGRPO on HPS+CLIP", 10, (0.325, 0.390, 0.227, 1.129, 3.576)),
    ("DanceGRPO on HPS+CLIP", None, (0.331, 0.389, 0.227, 1.128, 3.569)),
    ("DanceGRPO on HPS+CLIP", 20, (0.329, 0.388, 0.228, 1.136, 3.586)),
    ("MixGRPO on HPS+CLIP", 10, (0.358, 0.401, 0.230, 1.431, 3.641)),
    ("MixGRPO on HPS+CLIP", None, (0.363, 0.399, 0.230, 1.436, 3.661)),
    ("MixGRPO on HPS+CLIP", 20, (0.363, 0.401, 0.230, 1.430, 3.651)),
    ("G2RPO {1} on HPS+CLIP", None, (0.372, 0.395, 0.234, 1.421, 3.688)),
    ("G2RPO {1,2} on HPS+CLIP", None, (0.375, 0.404, 0.234, 1.468, 3.759)),
    ("G2RPO {1,3} on HPS+CLIP", None, (0.378, 0.404, 0.234, 1.465, 3.760)),
    ("G2RPO {1,2,3} on HPS+CLIP", 10, (0.378, 0.408, 0.235, 1.519, 3.805)),
    ("G2RPO {1,2,3} on HPS+CLIP", None, (0.376, 0.406, 0.235, 1.483, 3.783)),
    ("G2RPO {1,2,3} on HPS+CLIP", 20, (0.376, 0.407, 0.235, 1.511, 3.806)),
)
DIMENSIONS = (
    "Style", "World Knowledge", "Attribute", "Action", "Relationship", "Logical Reasoning", "Grammar", "Compound", "Entity Layout",
    "Text Generation",
)  # fmt: skip
"""UniGenBench's primary dimensions, in the order of its tables."""

# overall, and the ten dimensions, in percent
_UNIGENBENCH: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("FLUX.1-dev", (61.59, 84.60, 86.87, 66.77, 62.74, 67.13, 29.36, 60.83, 47.04, 71.08, 39.48)),
    ("DanceGRPO", (66.06, 76.00, 87.82, 73.72, 68.82, 75.38, 38.76, 59.63, 64.95, 80.78, 34.77)),
    ("MixGRPO", (66.60, 80.80, 87.97, 74.04, 68.82, 75.00, 38.99, 59.49, 64.82, 81.34, 34.77)),
    ("G2RPO {1}", (66.32, 73.70, 86.08, 75.53, 67.49, 77.28, 39.45, 60.70, 65.21, 76.68, 41.09)),
    ("G2RPO {1,2,3}", (69.21, 76.20, 89.08, 79.91, 71.10, 78.17, 42.66, 58.82, 70.36, 79.29, 46.55)),
)
# GenEval, OCR and PickScore (times 100 in the paper), each of a model trained on that reward; 40 inference steps
_SD3: tuple[tuple[str, tuple[float, float, float]], ...] = (
    ("SD3.5-M", (0.63, 0.59, 0.2172)),
    ("Flow-GRPO", (0.95, 0.92, 0.2331)),
    ("Flow-GRPO+CoCA", (0.96, 0.93, 0.2363)),
    ("DenseGRPO", (0.97, 0.95, 0.2464)),
)

PUBLISHED: dict[str, tuple[Published, ...]] = {
    "flux": (
        *(Published(_G2RPO, label, steps, dict(zip(_PREFERENCE, row, strict=True))) for label, steps, row in _FLUX),
        *(
            Published(
                _G2RPO,
                label,
                None,
                {"unigenbench/overall": row[0] / 100}
                | {f"unigenbench/{name}": value / 100 for name, value in zip(DIMENSIONS, row[1:], strict=True)},
            )
            for label, row in _UNIGENBENCH
        ),
    ),
    "sd3": tuple(
        Published(_DENSE, label, None, dict(zip(("geneval/overall", "ocr", "pickscore"), row, strict=True))) for label, row in _SD3
    ),
}
"""By backbone, the rows of its papers' tables."""


def published(model: str, metrics: Sequence[str], steps: Sequence[int]) -> list[Published]:
    """The rows for `model` that have one of `metrics`, except those at other step counts than `steps`."""
    rows = [row for row in PUBLISHED.get(model, ()) if any(metric in row.scores for metric in metrics)]
    return [row for row in rows if row.steps is None or row.steps in steps]
