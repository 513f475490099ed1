"""Golden numbers of GenEval: kept boxes, verdicts, training credit, positions and colors."""

from collections.abc import Iterator
from typing import Any

import torch
from golden.comparison import comparison, golden, tensor

from flowgrain.rewards.colors import COLORS, best_colors, color_texts, crop
from flowgrain.rewards.detection import Box
from flowgrain.rewards.geneval_rules import (
    graded_credit,
    kept_boxes,
    relations,
    strict_verdict,
)

BENCHMARK = "djghosh13/geneval af4902f"
SERVER = "scxue/advantage_weighted_matching be51372, evaluate_reward"
ROUNDED = "the reference numbers have nine digits"

Cases = Iterator[tuple[str, Any, Any]]
Objects = dict[str, list[Box]]


def cases() -> Iterator[tuple[str, dict[str, Any], Objects]]:
    """Name, golden case and kept boxes of each image."""
    content = golden("geneval")
    limits = content["thresholds"]
    for number, case in enumerate(content["cases"]):
        counting = case["demand"]["tag"] == "counting"
        boxes = [
            Box(name, score, x0, y0, x1, y1, color)
            for name, found in case["detections"].items()
            for x0, y0, x1, y1, score, color in found
        ]
        threshold = limits["COUNTING_THRESHOLD" if counting else "THRESHOLD"]
        yield f"{number}", case, kept_boxes(boxes, threshold, limits["MAX_OBJECTS"])


def lost_positions(fails: bool) -> Iterator[tuple[str, dict[str, Any], Objects]]:
    """The cases in which only a position does not hold, or all other cases.

    A failed prompt of the task `position` with equal counts fails because of its position.
    """
    for name, case, objects in cases():
        equal = all(
            case["kept"].get(entry["class"], 0) == entry["count"]
            for entry in case["demand"]["include"]
        )
        position = case["demand"]["tag"] == "position"
        if (position and equal and not case["graded_correct"]) == fails:
            yield name, case, objects


@comparison("GenEval: boxes that count", "geneval", f"{BENCHMARK}, evaluate_image")
def kept() -> Cases:
    for name, case, objects in cases():
        classes = sorted({*case["detections"], *case["kept"]})
        ours = [len(objects.get(c, ())) for c in classes]
        yield name, ours, [case["kept"].get(c, 0) for c in classes]


@comparison("GenEval: verdict", "geneval", f"{BENCHMARK}, evaluate")
def verdicts() -> Cases:
    for name, case, objects in cases():
        yield name, strict_verdict(case["demand"], objects).correct, case["correct"]


@comparison("GenEval: reasons of the verdict", "geneval", f"{BENCHMARK}, evaluate")
def reasons() -> Cases:
    for name, case, objects in cases():
        ours = strict_verdict(case["demand"], objects).reasons
        yield name, "\n".join(ours), "\n".join(case["reason"])


@comparison("GenEval: training credit", "geneval", SERVER, 1e-8, reason=ROUNDED)
def credit() -> Cases:
    for name, case, objects in lost_positions(False):
        yield name, graded_credit(case["demand"], objects).value, case["graded_reward"]


@comparison(
    "GenEval: training credit if a position does not hold",
    "geneval",
    SERVER,
    1e-8,
    deviation="the server adds two parts, 0 and 1, for such a position; flowgrain adds 0",
)
def credit_of_lost_positions() -> Cases:
    for name, case, objects in lost_positions(True):
        yield name, graded_credit(case["demand"], objects).value, case["graded_reward"]


@comparison(
    "GenEval: training credit if a position does not hold, with the additional 1 of the server",
    "geneval",
    SERVER,
    1e-8,
    reason=ROUNDED,
)
def credit_of_the_server() -> Cases:
    for name, case, objects in lost_positions(True):
        parts = (*graded_credit(case["demand"], objects).parts, 1.0)
        yield name, sum(parts) / len(parts), case["graded_reward"]


@comparison("GenEval: all demands met with equal counts", "geneval", SERVER)
def equal_counts() -> Cases:
    for name, case, objects in cases():
        yield name, graded_credit(case["demand"], objects).correct, case["graded_correct"]


@comparison("GenEval: positions", "geneval", f"{BENCHMARK}, relative_position")
def positions() -> Cases:
    for number, (a, b, held, _) in enumerate(golden("geneval")["relations"]):
        ours = relations(Box("a", 1, *a), Box("b", 1, *b))
        yield f"{number}", " ".join(sorted(ours)), " ".join(sorted(held))


@comparison("GenEval: colors and their texts", "geneval", f"{BENCHMARK}, color_classification")
def color_prompts() -> Cases:
    colors = golden("geneval")["colour"]
    yield "classes", list(COLORS), colors["classes"]
    for color in COLORS:
        texts = [template.format(c=color) for template in colors["templates"]]
        yield color, color_texts(color, "teddy bear"), texts


@comparison("GenEval: color of given logits", "geneval", f"{BENCHMARK}, color_classification")
def colors() -> Cases:
    content = golden("geneval")["colour"]
    for number, (logits, answer) in enumerate(
        zip(content["logits"], content["answers"], strict=True)
    ):
        yield f"{number}", best_colors(tensor([logits]))[0], answer


@comparison("GenEval: crop for the color", "geneval", f"{BENCHMARK}, ImageCrops")
def crops() -> Cases:
    content = golden("geneval")["colour"]
    image = tensor(content["picture"]).permute(2, 0, 1) / 255
    x0, y0, x1, y1, score = content["box"]
    for name, mask in (("with", torch.tensor(content["mask"]) > 0), ("without", None)):
        pixels = crop(image, Box("teddy bear", score, x0, y0, x1, y1, mask=mask)) * 255
        yield f"{name} mask", pixels.permute(1, 2, 0).round(), content[f"crop_{name}_mask"]
