"""Rewards as a service: `flowgrain serve REWARD` on one machine, the reward `remote` on many. JSON over HTTP, no pickle.

Shapes: I images of one request. A request holds PNGs or one raw float tensor, as base64.
"""

import base64
import binascii
import io
import logging
import secrets
import threading
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import requests
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from flowgrain.rewards.base import Prompt, Reward, RewardSource, fields_of, score
from flowgrain.rewards.http import address, png, session

log = logging.getLogger(__name__)
TOKEN = "FLOWGRAIN_TOKEN"


class RawImages(BaseModel):
    """Images [I, 3, H, W] in 0..1, little-endian float32, as base64."""

    model_config = ConfigDict(extra="forbid")

    shape: tuple[int, int, int, int]
    data: str


class Question(BaseModel):
    """What a client asks: scores of images, given as PNGs or as one raw tensor, for their prompts."""

    model_config = ConfigDict(extra="forbid")

    reward: str
    prompts: list[str]
    fields: list[dict[str, Any]] | None = None
    """What the prompt file says of each prompt beside its text."""
    png: list[str] | None = None
    raw: RawImages | None = None

    def asked(self) -> list[Prompt]:
        """The prompts with their fields. Raises ValueError for another number of fields than of prompts."""
        if self.fields is not None and len(self.fields) != len(self.prompts):
            raise ValueError(f"{len(self.fields)} fields for {len(self.prompts)} prompts")
        return [Prompt(text, of_it) for text, of_it in zip(self.prompts, self.fields or [{}] * len(self.prompts), strict=True)]

    def images(self, max_bytes: int) -> Tensor:
        """[I, 3, H, W] in 0..1. Raises ValueError for what cannot be read, or would take more than `max_bytes`."""
        if (self.png is None) == (self.raw is None):
            raise ValueError("give either png or raw")
        try:
            if self.png is not None:
                # PNG alone: of other formats some run programs. Sizes are known before anything is decoded.
                opened = [Image.open(io.BytesIO(base64.b64decode(one, validate=True)), formats=["PNG"]) for one in self.png]
                if 12 * sum(one.width * one.height for one in opened) > max_bytes:
                    raise ValueError(f"they would take more than {max_bytes} bytes")
                pixels = [np.array(one.convert("RGB")) for one in opened]
                found = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
            else:
                assert self.raw is not None
                values = np.frombuffer(base64.b64decode(self.raw.data, validate=True), dtype="<f4")
                found = torch.from_numpy(values.reshape(self.raw.shape).copy())
        except (binascii.Error, UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"the images cannot be read: {error}") from error
        if len(found) != len(self.prompts) or found.shape[1] != 3:
            raise ValueError(f"{len(found)} images of {found.shape[1]} channels for {len(self.prompts)} prompts")
        return found


class Answer(BaseModel):
    """A score for each image; null where it could not be scored, and why the first one could not."""

    scores: list[float | None]
    reason: str | None = None


def service(rewards: Mapping[str, Reward], token: str | None = None, max_images: int = 256, max_bytes: int = 2**28) -> Any:
    """A FastAPI application that scores by `rewards`: POST /score, GET /health. With a token, requests must bear it."""
    import fastapi
    from fastapi.responses import JSONResponse
    from starlette.concurrency import run_in_threadpool

    app = fastapi.FastAPI(title="flowgrain rewards")
    one_at_a_time = threading.Lock()  # a reward is somebody's model and need not be safe in threads

    @app.middleware("http")
    async def guard(request: fastapi.Request, call_next: Any) -> Any:
        if token is not None and not secrets.compare_digest(request.headers.get("authorization", ""), f"Bearer {token}"):
            return JSONResponse({"detail": "the token is missing or wrong"}, 401)
        length = request.headers.get("content-length")
        if request.method == "POST" and (length is None or not length.isdigit() or int(length) > max_bytes):
            return JSONResponse({"detail": f"a request must say its length, and hold {max_bytes} bytes at most"}, 413)
        return await call_next(request)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"rewards": sorted(rewards), "max_images": max_images, "max_bytes": max_bytes}

    @app.post("/score")
    async def ask(question: Question) -> Answer:
        if question.reward not in rewards:
            raise fastapi.HTTPException(404, f"there is no reward {question.reward!r} here; there is {', '.join(sorted(rewards))}")
        if len(question.prompts) > max_images:
            raise fastapi.HTTPException(413, f"{len(question.prompts)} images are more than {max_images}")
        try:
            prompts = question.asked()
            images = await run_in_threadpool(question.images, max_bytes)
        except ValueError as error:
            raise fastapi.HTTPException(422, str(error)) from error

        def work() -> Answer:
            with one_at_a_time:
                found = score(rewards[question.reward], images, prompts)
            return Answer(scores=[None if np.isnan(v) else v for v in found.values.tolist()], reason=found.reason)

        return await run_in_threadpool(work)

    return app


class Remote:
    """A reward that a service gives. source.model is `http://HOST:PORT#REWARD`; the token is taken from FLOWGRAIN_TOKEN.

    A server that is gone, stalls past `timeout` or answers nonsense gives NaN for that request, after `retries` more tries.
    """

    def __init__(
        self,
        source: RewardSource,
        *,
        encoding: Literal["raw", "png"] = "raw",
        batch: int = 64,
        timeout: float = 120.0,
        retries: int = 3,
        backoff: float = 0.5,
    ) -> None:
        self.url, self.reward = address(source, "remote", "http://HOST:PORT#REWARD")
        self.encoding, self.batch, self.timeout = encoding, batch, timeout
        self.session = session(TOKEN, retries, backoff)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """A score for each image, [I], NaN where there is none."""
        parts = range(0, len(images), self.batch)
        return torch.cat([self._ask(images[i : i + self.batch], prompts[i : i + self.batch]) for i in parts])

    def _ask(self, images: Tensor, prompts: list[str]) -> Tensor:
        fields = [dict(fields_of(prompt)) for prompt in prompts]
        try:
            question = Question(
                reward=self.reward, prompts=prompts, fields=fields if any(fields) else None, **_encoded(images, self.encoding)
            )
            asked = question.model_dump(mode="json", exclude_none=True)
            answer = self.session.post(f"{self.url}/score", json=asked, timeout=self.timeout)
            answer.raise_for_status()
            scores = Answer.model_validate(answer.json()).scores
            if len(scores) != len(prompts):
                raise ValueError(f"{len(scores)} scores for {len(prompts)} images")
        except (requests.RequestException, ValueError) as error:
            log.warning("the reward service at %s gave no scores: %s", self.url, error)
            return torch.full((len(prompts),), torch.nan)
        return torch.tensor([float("nan") if value is None else value for value in scores])


def _encoded(images: Tensor, encoding: str) -> dict[str, Any]:
    """The images of a question. PNG rounds to bytes, raw is exact."""
    if encoding == "raw":
        values = images.float().cpu().contiguous().numpy().astype("<f4")
        return {"raw": RawImages(shape=tuple(images.shape), data=base64.b64encode(values.tobytes()).decode())}
    return {"png": [base64.b64encode(png(image)).decode() for image in images]}
