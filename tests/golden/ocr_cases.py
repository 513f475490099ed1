"""Golden numbers of the OCR reward: which quoted text counts, and its score."""

from collections.abc import Iterator
from typing import Any, Literal

from golden.comparison import comparison, golden

from flowgrain.rewards.ocr import joined, target_texts, text_score

FLOW_GRPO = "yifan123/flow_grpo ac4c86e, OcrScorer.__call__"
ROUNDED = "fractions with nine digits"

Cases = Iterator[tuple[str, float, float]]


def quoted_twice(case: dict[str, Any]) -> bool:
    return case["prompt"].count('"') > 2


def reward(case: dict[str, Any], texts: Literal["first", "all"]) -> float:
    """The reward of the recognized lines of a case."""
    return text_score(joined(case["lines"]), target_texts(case["prompt"], texts))


def cases(texts: Literal["first", "all"], twice: tuple[bool, ...]) -> Cases:
    for number, case in enumerate(golden("ocr_reward")["cases"]):
        if quoted_twice(case) in twice:
            yield f"{number}: {case['prompt']}", reward(case, texts), case["reward"]


@comparison("OCR reward, `texts: first`", "ocr_reward", FLOW_GRPO, 1e-8, reason=ROUNDED)
def first() -> Cases:
    yield from cases("first", (False, True))


@comparison(
    "OCR reward, `texts: all`, one quoted text", "ocr_reward", FLOW_GRPO, 1e-8, reason=ROUNDED
)
def all_of_one() -> Cases:
    yield from cases("all", (False,))


@comparison(
    "OCR reward, `texts: all`, two quoted texts",
    "ocr_reward",
    FLOW_GRPO,
    1e-8,
    reason=ROUNDED,
    deviation="The published code scores only the first quoted text. The default scores all.",
)
def all_of_two() -> Cases:
    yield from cases("all", (True,))
