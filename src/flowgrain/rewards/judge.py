"""A judge over HTTP: a vision-language model behind an OpenAI-compatible server reads the image and answers with a score.

For UnifiedReward, UniGenBench's evaluation model, or any other such model. Shapes: I images.
"""

import base64
import concurrent.futures
import json
import logging
import re
from pathlib import Path

import requests
import torch
from torch import Tensor

from flowgrain.rewards.base import Explained, RewardSource, fields_of
from flowgrain.rewards.http import address, png, session

log = logging.getLogger(__name__)


def parse_score(answer: str, low: float = 0, high: float = 5) -> float:
    """The number behind the last "score" in `answer`, or the only number there is; NaN if there is none within low..high.

    A scale in brackets, (1-5), is no score, and 4/5 is 4. Scores of several names, each on a line, are averaged. NaN if it is
    given out of another number than `high`.
    """
    plain = re.sub(r"\(\s*[\d.]+\s*(?:-|to|\u2013)\s*[\d.]+\s*\)", "", answer)
    number = r"(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(\d+(?:\.\d+)?))?"
    named = re.findall(rf"^[^\S\n]*\W*((?:\w+[^\S\n]+)*?)score\W{{0,12}}?{number}", plain, flags=re.IGNORECASE | re.MULTILINE)
    if len({name.strip().lower() for name, _, _ in named}) > 1:
        found = [(value, scale) for _, value, scale in named]
    else:
        found = re.findall(rf"score\W{{0,12}}?{number}", plain, flags=re.IGNORECASE)[-1:] or re.findall(number, plain)
        found = found if len(found) == 1 else []
    values = [float(value) for value, scale in found if not scale or float(scale) == high]
    if not values or len(values) < len(found):
        return float("nan")
    value = sum(values) / len(values)
    return value if low <= value <= high else float("nan")


class Judge:
    """Scores 0..5 from a served vision-language model; what could not be asked or read is NaN, which masks the sample.

    source.model is `http://HOST:PORT/v1#MODEL`. The environment's FLOWGRAIN_JUDGE_TOKEN is sent as a bearer token if it is set. A
    request is tried `retries` more times, with back-off, on a connection error or a status of 429 or 5xx.
    """

    name = "judge"
    low, high = 0.0, 5.0
    places: tuple[str, ...] = ("{prompt}",)
    template = (
        "You judge pictures made from a text. Text: {prompt}\n"
        "Rate from 0 (nothing fits) to 5 (all of it is there, and the picture is good). Answer with one line, `Score: ` and the "
        "number."
    )

    def __init__(
        self,
        source: RewardSource,
        *,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
    ) -> None:
        url, self.model = address(source, self.name, "http://HOST:PORT/v1#MODEL")
        self.url = url + "/chat/completions"
        self.timeout, self.concurrency = timeout, concurrency
        if source.template is not None:
            try:
                self.template = Path(source.template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"judge_template: {source.template} cannot be read ({error})") from error
            for place in self.places:
                if place not in self.template:
                    raise ValueError(f"judge_template: {source.template} has no {place}; write it where that belongs")
        self.session = session("FLOWGRAIN_JUDGE_TOKEN", retries, backoff, concurrency)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """A score for each image, [I], NaN where there is none."""
        with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
            return torch.tensor(list(pool.map(self._ask, images, prompts)))

    def _ask(self, image: Tensor, prompt: str) -> float:
        answer = self._answer(image, self._question(prompt=prompt))
        return parse_score(answer, self.low, self.high) if answer is not None else float("nan")

    def _question(self, **parts: str) -> str:
        # In one go: a prompt may hold {points}, and a template other braces.
        return re.sub(r"\{(prompt|points)\}", lambda found: parts.get(found[1], found[0]), self.template)

    def _answer(self, image: Tensor, text: str) -> str | None:
        """What the model says of `image` when asked `text`; None, and a note in the log, if it says nothing."""
        content = [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png(image)).decode()}},
            {"type": "text", "text": text},
        ]
        question = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        try:
            answer = self.session.post(self.url, json=question, timeout=self.timeout)
            answer.raise_for_status()
            return str(answer.json()["choices"][0]["message"]["content"])
        except (requests.RequestException, ValueError, KeyError, IndexError, TypeError) as error:
            log.warning("the judge at %s gave no score: %s", self.url, error)
            return None


class UnifiedReward(Judge):
    """UnifiedReward (Wang et al. 2025, arXiv:2503.05236): 1..5, of a served CodeGoat24/UnifiedReward model (2.0: MIT).

    The question here is our own wording; for figures beside published ones give the model's own in `judge_template`.
    """

    name = "unifiedreward"
    low = 1.0
    template = (
        "An image was made from this caption: {prompt}\n"
        "Say which elements of the caption the image shows and which it lacks, and how good the image looks. Then close with one "
        "line, `Final Score: ` and a number from 1 (bad) to 5 (everything is there, and it looks good)."
    )


def points_of(prompt: str) -> list[tuple[str, str]]:
    """Dimension and description of every test point that UniGenBench's file gives `prompt`; none for another prompt.

    Read from the field `sub_dims_en` (JSON with Testpoints and Testpoint Description), or `test_points`, a list of
    {dimension, description}. Raises ValueError for fields of neither make.
    """
    fields = fields_of(prompt)
    try:
        if "test_points" in fields:
            return [(one["dimension"], one["description"]) for one in fields["test_points"]]
        found = fields.get("sub_dims_en")
        if found is None:
            return []
        found = json.loads(found) if isinstance(found, str) else found
        return list(zip(found["Testpoints"], found["Testpoint Description"], strict=True))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the test points of {str(prompt)!r} cannot be read ({error})") from error


def parse_points(answer: str, count: int) -> list[float] | None:
    """The `count` zeros and ones of the last bracketed list in `answer`; None if there is no such list."""
    lists = [re.findall(r"[^\s,]+", inside) for inside in re.findall(r"\[([^\[\]]*)\]", answer)]
    found = next((one for one in reversed(lists) if len(one) == count and set(one) <= {"0", "1"}), None)
    return None if found is None else [float(value) for value in found]


class UniGenBench(Judge):
    """UniGenBench++ (Wang et al. 2025, arXiv:2510.18701): share of a prompt's test points that a judge finds met, 0..1.

    By part, that share for each primary dimension over all test points, as the benchmark counts. A prompt without test points
    is not scored. Any served vision-language model can judge; published figures are UniGenBench-EvalModel-qwen-72b-v1's.
    """

    name = "unigenbench"
    mean_of_parts = True
    places = ("{prompt}", "{points}")
    template = (
        "Check an image against the text it was made from, point by point. Text: {prompt}\n{points}\n"
        "A point counts as met only if the image plainly shows it. Give a sentence on each point, and then one last line: a list "
        "in square brackets with 1 (met) or 0 (not met) for each point, in this order."
    )

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """A score for each image, [I], NaN where there is none."""
        return torch.as_tensor(self.explain(images, prompts).scores)

    def explain(self, images: Tensor, prompts: list[str]) -> Explained:
        """The scores, and by primary dimension the share of points met, weighted by their number."""
        points = [self._points(prompt) for prompt in prompts]
        with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
            met = list(pool.map(self._points_met, images, prompts, points))
        dimensions = [[name.partition("-")[0].strip() for name, _ in of_image] for of_image in points]
        names = list(dict.fromkeys(name for of_image in dimensions for name in of_image))
        parts = {name: torch.full((len(images),), torch.nan) for name in names}
        weights = {name: torch.zeros(len(images)) for name in names}
        scores = torch.full((len(images),), torch.nan)
        for i, (of_image, found) in enumerate(zip(dimensions, met, strict=True)):
            if found is None:
                continue
            scores[i] = sum(found) / len(found)
            for name in set(of_image):
                values = [value for dimension, value in zip(of_image, found, strict=True) if dimension == name]
                parts[name][i], weights[name][i] = sum(values) / len(values), len(values)
        return Explained(scores, parts, weights)

    def _points(self, prompt: str) -> list[tuple[str, str]]:
        try:
            return points_of(prompt)
        except ValueError as error:  # of one prompt: the others are scored
            log.warning("%s", error)
            return []

    def _points_met(self, image: Tensor, prompt: str, points: list[tuple[str, str]]) -> list[float] | None:
        if not points:
            return None
        listed = "\n".join(f"{number}. {name}: {what}" for number, (name, what) in enumerate(points, 1))
        answer = self._answer(image, self._question(prompt=prompt, points=listed))
        return None if answer is None else parse_points(answer, len(points))
