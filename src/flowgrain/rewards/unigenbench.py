"""UniGenBench++ (Wang et al. 2025): a vision-language model checks the test points of a prompt.

Letters: I images.
"""

import json
import logging
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from flowgrain.data import Prompt
from flowgrain.rewards.base import Explanation, Unscored
from flowgrain.rewards.http_client import ScoringCall
from flowgrain.rewards.judge import Judge, data_url

log = logging.getLogger(__name__)


def read_points(prompt: Prompt) -> list[tuple[str, str]]:
    """Dimension and description of each test point of a prompt. Empty for a prompt without them.

    They are in the field `sub_dims_en` of UniGenBench's file (JSON with Testpoints and Testpoint
    Description), or in the field `test_points`, a list of {dimension, description}.

    Raises:
        ValueError: the field has another format.
    """
    try:
        if "test_points" in prompt.fields:
            points = prompt.fields["test_points"]
            return [(point["dimension"], point["description"]) for point in points]
        column = prompt.fields.get("sub_dims_en")
        if column is None:
            return []
        column = json.loads(column) if isinstance(column, str) else column
        return list(zip(column["Testpoints"], column["Testpoint Description"], strict=True))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the test points of {prompt.text!r} cannot be read ({type(error).__name__}: {error})"
        ) from error


def parse_points(answer: str, count: int) -> list[float] | None:
    """The last list of `count` zeros and ones in square brackets in an answer, or None."""
    lists = [re.findall(r"[^\s,]+", text) for text in re.findall(r"\[([^\[\]]*)\]", answer)]
    for values in reversed(lists):
        if len(values) == count and set(values) <= {"0", "1"}:
            return [float(value) for value in values]
    return None


class UniGenBench(Judge):
    """UniGenBench++ (Wang et al. 2025, arXiv:2510.18701): fraction of the test points that are met.

    Range: 0..1. By primary dimension, the fraction over all test points, as in the benchmark. A
    prompt without test points has no score (NaN). The arguments are those of `Judge`. A template
    also needs `{points}`, which is replaced by the list of test points. Any vision-language model
    can be used. The published results are from UniGenBench-EvalModel-qwen-72b-v1.
    """

    mean_of_parts = True
    placeholders = ("{prompt}", "{points}")
    question = (
        "Check an image against the text it was made from, point by point. "
        "Text: {prompt}\n{points}\n"
        "A point counts as met only if the image plainly shows it. Give a sentence on each point, "
        "and then one last line: a list in square brackets with 1 (met) or 0 (not met) for each "
        "point, in this order."
    )

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [I] of images [I, 3, H, W] in 0..1. NaN where there is no readable answer."""
        return torch.as_tensor(self.explain(images, prompts).scores)

    def explain(self, images: Tensor, prompts: Sequence[Prompt]) -> Explanation:
        """The scores. By primary dimension: the fraction of points, weighted by their number.

        Raises:
            Unscored: the server did not answer all requests.
        """
        points = [self._points(prompt) for prompt in prompts]

        def check(call: ScoringCall, i: int) -> list[float] | None:
            return self._check_points(call, images[i], prompts[i], points[i])

        answers, call = self.map_images(check, len(images))
        dimensions = [[name.partition("-")[0].strip() for name, _ in image] for image in points]
        names = list(dict.fromkeys(name for image in dimensions for name in image))
        scores = torch.full((len(images),), torch.nan)
        parts = {name: torch.full((len(images),), torch.nan) for name in names}
        weights = {name: torch.zeros(len(images)) for name in names}
        for i, (of_image, met) in enumerate(zip(dimensions, answers, strict=True)):
            if met is None:
                continue
            scores[i] = sum(met) / len(met)
            for name in set(of_image):
                values = [value for dim, value in zip(of_image, met, strict=True) if dim == name]
                parts[name][i] = sum(values) / len(values)
                weights[name][i] = len(values)
        explanation = Explanation(scores, parts, weights)
        if call.reason is not None:
            raise Unscored(call.reason, explanation, call.gave_up)
        return explanation

    def _points(self, prompt: Prompt) -> list[tuple[str, str]]:
        try:
            return read_points(prompt)
        except ValueError as error:  # of one prompt; the others are scored
            log.warning("%s", error)
            return []

    def _check_points(
        self, call: ScoringCall, image: Tensor, prompt: Prompt, points: list[tuple[str, str]]
    ) -> list[float] | None:
        """1 or 0 for each test point, or None without test points or without a readable answer."""
        if not points:
            return None
        lines = (f"{i}. {name}: {text}" for i, (name, text) in enumerate(points, 1))
        question = self.fill_template(prompt=prompt.text, points="\n".join(lines))
        return parse_points(self.ask(call, [data_url(image)], question), len(points))
