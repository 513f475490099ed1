"""Scores from a vision-language model behind an OpenAI-compatible server.

Letters: I images.
"""

import base64
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import requests
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from flowgrain.data import Prompt
from flowgrain.rewards.http_client import check_url, encode_png, open_session
from flowgrain.rewards.options import OptionError

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "FLOWGRAIN_JUDGE_TOKEN"
"""Environment variable with the bearer token of the server."""

_RANGE = re.compile(r"\(\s*[\d.]+\s*(?:-|to|\u2013)\s*[\d.]+\s*\)")  # (1-5)
_NUMBER = r"(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(\d+(?:\.\d+)?))?"  # 4, 4.5, 4/5, 4 out of 5
_SCORE = re.compile(rf"score\W{{0,12}}?{_NUMBER}", re.IGNORECASE)
_NAMED_SCORE = re.compile(
    rf"^[^\S\n]*\W*((?:\w+[^\S\n]+)*?)score\W{{0,12}}?{_NUMBER}", re.IGNORECASE | re.MULTILINE
)


def parse_score(answer: str, low: float = 0, high: float = 5) -> float:
    """The score in an answer.

    The score is the number after the last word "score", or the only number of the answer. Scores
    with several names, each on its own line, are averaged. A range such as (1-5) is ignored.

    Args:
        answer: the text that the model returned.
        low: lowest valid score.
        high: highest valid score. In `4/5`, the second number must be `high`.

    Returns:
        The score, NaN if there is none in low..high.
    """
    text = _RANGE.sub("", answer)
    named = _NAMED_SCORE.findall(text)
    if len({name.strip().lower() for name, _, _ in named}) > 1:
        found = [(value, scale) for _, value, scale in named]
    else:
        found = _SCORE.findall(text)[-1:] or re.findall(_NUMBER, text)
        found = found if len(found) == 1 else []
    values = [float(value) for value, scale in found if not scale or float(scale) == high]
    if not values or len(values) < len(found):
        return float("nan")
    score = sum(values) / len(values)
    return score if low <= score <= high else float("nan")


class Judge:
    """A score in 0..5 from any vision-language model behind an OpenAI-compatible server.

    An image without a readable answer has no score (NaN). If the environment variable
    FLOWGRAIN_JUDGE_TOKEN is set, it is sent as the bearer token. A request is repeated after a
    connection error, and after a status of 429 or 5xx.

    Args:
        url: address of the API, such as http://HOST:PORT/v1.
        model: name of the model on the server.
        template: text file with the question. `{prompt}` is replaced by the prompt. Default: a
            question of this library. Comparisons with published scores need the published question.
        concurrency: number of requests at the same time.
        timeout: longest time to wait for an answer, in seconds.
        retries: repetitions of a failed request.
        backoff: factor of the exponential waiting time between repetitions, in seconds.
    """

    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 5.0
    placeholders: ClassVar[tuple[str, ...]] = ("{prompt}",)
    question: ClassVar[str] = (
        "You judge pictures made from a text. Text: {prompt}\n"
        "Rate from 0 (nothing fits) to 5 (all of it is there, and the picture is good). Answer "
        "with one line, `Score: ` and the number."
    )

    def __init__(
        self,
        url: str,
        model: str,
        template: str | None = None,
        concurrency: PositiveInt = 8,
        timeout: PositiveFloat = 60.0,
        retries: NonNegativeInt = 3,
        backoff: NonNegativeFloat = 0.5,
    ) -> None:
        self.url = check_url(url, "http://HOST:PORT/v1") + "/chat/completions"
        self.model, self.concurrency, self.timeout = model, concurrency, timeout
        self.template = self.question if template is None else self._read_template(template)
        self.session = open_session(TOKEN_VARIABLE, retries, backoff, concurrency)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [I] of images [I, 3, H, W] in 0..1. NaN where there is no readable answer."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return torch.tensor(list(pool.map(self._score, images, prompts)))

    def _score(self, image: Tensor, prompt: Prompt) -> float:
        answer = self.ask(image, self.fill_template(prompt=prompt.text))
        return float("nan") if answer is None else parse_score(answer, self.low, self.high)

    def _read_template(self, template: str) -> str:
        try:
            text = Path(template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"template={template}: cannot be read ({error}).") from error
        for placeholder in self.placeholders:
            if placeholder not in text:
                raise OptionError(f"template={template}: the text has no {placeholder}. Add it.")
        return text

    def fill_template(self, **values: str) -> str:
        """The question with `values` for its placeholders."""
        # In one pass, because a prompt may contain {points}. Other braces stay.
        return re.sub(
            r"\{(prompt|points)\}", lambda match: values.get(match[1], match[0]), self.template
        )

    def ask(self, image: Tensor, question: str) -> str | None:
        """The answer of the model to a question about an image [3, H, W] in 0..1.

        Returns None and logs a warning if the server returns no answer.
        """
        png = "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
        content = [
            {"type": "image_url", "image_url": {"url": png}},
            {"type": "text", "text": question},
        ]
        messages = [{"role": "user", "content": content}]
        request: dict[str, Any] = {"model": self.model, "temperature": 0, "messages": messages}
        try:
            response = self.session.post(self.url, json=request, timeout=self.timeout)
            response.raise_for_status()
            return str(response.json()["choices"][0]["message"]["content"])
        except (requests.RequestException, ValueError, KeyError, IndexError, TypeError) as error:
            log.warning("The judge at %s returned no answer: %s", self.url, error)
            return None


class UnifiedReward(Judge):
    """UnifiedReward (Wang et al. 2025, arXiv:2503.05236): a score in 1..5 of a served model.

    License of CodeGoat24/UnifiedReward 2.0: MIT. The arguments are those of `Judge`. The default
    question is not the published one. For comparisons with published scores, set `template` to the
    question of the model card.
    """

    low = 1.0
    question = (
        "An image was made from this caption: {prompt}\n"
        "Say which elements of the caption the image shows and which it lacks, and how good the "
        "image looks. Then close with one line, `Final Score: ` and a number from 1 (bad) to 5 "
        "(everything is there, and it looks good)."
    )
