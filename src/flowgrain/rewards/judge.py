"""A judge over HTTP: a vision-language model behind an OpenAI-compatible server reads the image and answers with a score.

For UnifiedReward, UniGenBench's evaluation model, or any other such model. Shapes: I images.
"""

import base64
import concurrent.futures
import logging
import re

import requests
import torch
from torch import Tensor

from flowgrain.rewards.base import RewardSource
from flowgrain.rewards.http import address, png, session

log = logging.getLogger(__name__)

TEMPLATE = (
    "You judge pictures made from a text. Text: {prompt}\n"
    "Rate from 0 (nothing fits) to 5 (all of it is there, and the picture is good). Answer with one line, `Score: ` and the number."
)


def parse_score(answer: str, low: float = 0, high: float = 5) -> float:
    """The number behind the last "score" in `answer`, or the only number there is; NaN if there is none within low..high."""
    number = r"(-?\d+(?:\.\d+)?)"
    named = re.findall(rf"score\W{{0,12}}?{number}", answer, flags=re.IGNORECASE)
    every = named[-1:] or re.findall(number, answer)
    if len(every) != 1:
        return float("nan")
    value = float(every[0])
    return value if low <= value <= high else float("nan")


class Judge:
    """Scores 0..5 from a served model; what could not be asked or read is NaN, which masks the sample.

    source.model is `http://HOST:PORT/v1#MODEL`. The environment's FLOWGRAIN_JUDGE_TOKEN is sent as a bearer token if it is set. A
    request is tried `retries` more times, with back-off, on a connection error or a status of 429 or 5xx.
    """

    def __init__(
        self,
        source: RewardSource,
        *,
        template: str = TEMPLATE,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
    ) -> None:
        url, self.model = address(source, "judge", "http://HOST:PORT/v1#MODEL")
        self.url = url + "/chat/completions"
        self.template, self.timeout, self.concurrency = template, timeout, concurrency
        self.session = session("FLOWGRAIN_JUDGE_TOKEN", retries, backoff, concurrency)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """A score for each image, [I], NaN where there is none."""
        with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
            return torch.tensor(list(pool.map(self._ask, images, prompts)))

    def _ask(self, image: Tensor, prompt: str) -> float:
        content = [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png(image)).decode()}},
            {"type": "text", "text": self.template.format(prompt=prompt)},
        ]
        question = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        try:
            answer = self.session.post(self.url, json=question, timeout=self.timeout)
            answer.raise_for_status()
            text = answer.json()["choices"][0]["message"]["content"]
            return parse_score(text)
        except (requests.RequestException, ValueError, KeyError, IndexError, TypeError) as error:
            log.warning("the judge at %s gave no score: %s", self.url, error)
            return float("nan")
