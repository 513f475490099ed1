"""The reward server: scores images over HTTP for training runs on other machines."""

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from flowgrain.heap import release_freed_memory
from flowgrain.rewards.base import GroupReward, Reward
from flowgrain.rewards.gate import Gate, Limits
from flowgrain.rewards.messages import ScoreRequest, ScoreResponse
from flowgrain.rewards.scoring import score
from flowgrain.settings import SettingsError

if TYPE_CHECKING:
    import fastapi


def reward_app(
    rewards: Mapping[str, Reward],
    token: str | bytes | None = None,
    max_images: int = 256,
    max_bytes: int = 2**28,
    max_queue: int = 16,
    body_seconds: float = 60.0,
    when_idle: Callable[[], None] = release_freed_memory,
    identities: Mapping[str, Mapping[str, str]] | None = None,
) -> "fastapi.FastAPI":
    """A FastAPI application that scores images: POST /score and GET /health.

    It scores one request at a time, because a reward may not be safe to call from several threads.

    Args:
        rewards: rewards by name.
        token: bearer token that every request must have. None: no token is needed.
        max_images: largest number of images in a request.
        max_bytes: largest size of a request, of its decoded images, and of all bodies in memory.
        max_queue: requests that wait or are scored. Others get the status 503 with Retry-After.
        body_seconds: time in which the body of a request must arrive.
        when_idle: called when the last request is finished.
        identities: identity of each reward, see `reward_identity`. Clients of several servers
            compare them.

    Raises:
        SettingsError: FastAPI is not installed, or a reward compares the images of a prompt.
    """
    try:
        import fastapi
        from starlette.concurrency import run_in_threadpool
    except ImportError as error:
        raise SettingsError(
            "A reward server needs FastAPI. Install it: pip install 'flowgrain[serve]'"
        ) from error

    _check_served(rewards)
    app = fastapi.FastAPI(title="flowgrain rewards", docs_url=None, redoc_url=None)
    lock = asyncio.Lock()
    limits = Limits(max_bytes, max_queue, body_seconds)
    app.add_middleware(Gate, token=token, limits=limits, when_idle=when_idle)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        limits = {"max_images": max_images, "max_bytes": max_bytes}
        return {"rewards": sorted(rewards), "identities": identities or {}, **limits}

    @app.post("/score")
    async def post_score(request: fastapi.Request) -> ScoreResponse:
        body = await request.body()
        async with lock:
            if await request.is_disconnected():  # the client has closed the connection
                raise fastapi.HTTPException(499, "the client closed the connection")
            try:
                return await run_in_threadpool(_respond, rewards, body, max_images, max_bytes)
            except _Rejected as error:
                raise fastapi.HTTPException(error.status, str(error)) from error

    return app


def _check_served(rewards: Mapping[str, Reward]) -> None:
    """Check that all rewards score single images.

    Raises:
        SettingsError: a reward compares the images of a prompt.
    """
    for name, reward in rewards.items():
        if isinstance(reward, GroupReward):
            raise SettingsError(
                f"{name}: cannot be served, because it compares all images of a prompt, and a "
                "request may contain only some of them. Use it in the configuration of the run."
            )


class _Rejected(Exception):
    """A request that cannot be scored, with the status of the answer."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def _respond(
    rewards: Mapping[str, Reward], body: bytes, max_images: int, max_bytes: int
) -> ScoreResponse:
    """The scores of the images of a request.

    Raises:
        _Rejected: the request cannot be scored.
    """
    try:
        request = ScoreRequest.model_validate_json(body)
        if request.reward not in rewards:
            names = ", ".join(sorted(rewards))
            reason = f"there is no reward {request.reward[:100]!r}. Rewards of this server: {names}"
            raise _Rejected(404, reason)
        if len(request.prompts) > max_images:
            reason = f"{len(request.prompts)} images; at most {max_images} are allowed"
            raise _Rejected(413, reason)
        prompts, images = request.prompts_with_fields(), request.images(max_bytes)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = "".join(f"{part}: " for part in detail["loc"])
        raise _Rejected(422, f"{place}{detail['msg']}") from error
    except ValueError as error:
        raise _Rejected(422, str(error)) from error
    scores = score(rewards[request.reward], images, prompts)
    values = [None if np.isnan(value) else value for value in scores.values.tolist()]
    return ScoreResponse(scores=values, reason=scores.reason)
