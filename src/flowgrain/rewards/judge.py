"""Scores from a vision-language model behind an OpenAI-compatible server.

Letters: I images.
"""

import base64
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from flowgrain.data import Prompt
from flowgrain.rewards.addresses import check_url
from flowgrain.rewards.base import Unscored
from flowgrain.rewards.http_client import ScoringCall, Server, ServerError, encode_png
from flowgrain.rewards.options import OptionError
from flowgrain.rewards.workers import Workers

T = TypeVar("T")

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


class _Message(BaseModel):
    content: str


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    """The part of a chat completion that is read."""

    choices: list[_Choice] = Field(min_length=1)


def data_url(image: Tensor) -> str:
    """An image [3, H, W] in 0..1 as a URL that contains it as PNG."""
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()


class ChatModel:
    """A vision-language model behind an OpenAI-compatible server.

    If the environment variable FLOWGRAIN_JUDGE_TOKEN is set, it is sent as the bearer token. A
    request is repeated after a connection error, and after a status of 429 or 5xx. After
    2 * `concurrency` failed requests in a row, or at `deadline`, the server is not used again in
    the same training step. `Judge` describes the arguments.
    """

    placeholders: ClassVar[tuple[str, ...]] = ("{prompt}",)
    question: ClassVar[str]

    def __init__(
        self,
        url: str,
        model: str,
        template: str | None = None,
        concurrency: PositiveInt = 8,
        timeout: PositiveFloat = 60.0,
        deadline: PositiveFloat = 300.0,
        retries: NonNegativeInt = 3,
        backoff: NonNegativeFloat = 0.5,
    ) -> None:
        self.url = check_url(url, "http://HOST:PORT/v1") + "/chat/completions"
        self.model, self.concurrency = model, concurrency
        self.template = self.question if template is None else self._read_template(template)
        self.server = Server(
            self.url,
            TOKEN_VARIABLE,
            timeout=timeout,
            deadline=deadline,
            retries=retries,
            backoff=backoff,
            connections=concurrency,
            patience=2 * concurrency,
        )

    def map_images(
        self, work: Callable[[ScoringCall, int], T | None], count: int
    ) -> tuple[list[T | None], ScoringCall]:
        """`work` of each of `count` images, `concurrency` at a time. None after a server error."""

        def safe(call: ScoringCall, i: int) -> T | None:
            try:
                return work(call, i)
            except ServerError:
                return None

        workers, finished = Workers(min(self.concurrency, max(count, 1))), False
        try:
            with ScoringCall(self.server) as call:
                futures = [workers.submit(safe, call, i) for i in range(count)]
                results = [future.result() for future in futures]
            finished = True
        finally:
            workers.close(wait=finished)
        return results, call

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

    def ask(self, call: ScoringCall, urls: Sequence[str], question: str) -> str:
        """The answer of the model to a question about images, see `data_url`.

        Raises:
            ServerError: the server returns no answer.
        """
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}} for url in urls
        ]
        content.append({"type": "text", "text": question})
        messages = [{"role": "user", "content": content}]
        request: dict[str, Any] = {"model": self.model, "temperature": 0, "messages": messages}

        def parse(answer: bytes) -> str:
            return _Completion.model_validate_json(answer).choices[0].message.content

        return call.post(json.dumps(request).encode(), parse)


class Judge(ChatModel):
    """A score in 0..5 from any vision-language model behind an OpenAI-compatible server.

    An image without a readable answer has no score (NaN). If the environment variable
    FLOWGRAIN_JUDGE_TOKEN is set, it is sent as the bearer token. A request is repeated after a
    connection error, and after a status of 429 or 5xx. After 2 * `concurrency` failed requests in a
    row, or at `deadline`, the server is not used again in the same training step.

    Args:
        url: address of the API, such as http://HOST:PORT/v1.
        model: name of the model on the server.
        template: text file with the question. `{prompt}` is replaced by the prompt. Default: a
            question of this library. Comparisons with published scores need the published question.
        concurrency: number of requests at the same time.
        timeout: longest time of one request with its complete answer, in seconds.
        deadline: longest time of a scoring call with all its requests, in seconds.
        retries: repetitions of a failed request.
        backoff: factor of the exponential waiting time between repetitions, in seconds.
    """

    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 5.0
    question: ClassVar[str] = (
        "You judge pictures made from a text. Text: {prompt}\n"
        "Rate from 0 (nothing fits) to 5 (all of it is there, and the picture is good). Answer "
        "with one line, `Score: ` and the number."
    )

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [I] of images [I, 3, H, W] in 0..1. NaN where there is no readable answer.

        Raises:
            Unscored: the server did not answer all requests.
        """

        def rate(call: ScoringCall, i: int) -> float:
            answer = self.ask(
                call, [data_url(images[i])], self.fill_template(prompt=prompts[i].text)
            )
            return parse_score(answer, self.low, self.high)

        scores, call = self.map_images(rate, len(images))
        values = torch.tensor([float("nan") if score is None else score for score in scores])
        if call.reason is not None:
            raise Unscored(call.reason, values, call.gave_up)
        return values


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
