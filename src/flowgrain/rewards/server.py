"""The reward server: scores images over HTTP for training runs on other machines."""

import secrets
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flowgrain.rewards.base import Reward
from flowgrain.rewards.messages import ScoreRequest, ScoreResponse
from flowgrain.rewards.scoring import score
from flowgrain.settings import SettingsError

if TYPE_CHECKING:
    import fastapi


def reward_app(
    rewards: Mapping[str, Reward],
    token: str | None = None,
    max_images: int = 256,
    max_bytes: int = 2**28,
) -> "fastapi.FastAPI":
    """A FastAPI application that scores images: POST /score and GET /health.

    It scores one request at a time, because a reward may not be safe to call from several threads.

    Args:
        rewards: rewards by name.
        token: bearer token that every request must have. None: no token is needed.
        max_images: largest number of images in a request.
        max_bytes: largest size of a request, and of its decoded images.

    Raises:
        SettingsError: FastAPI is not installed.
    """
    try:
        import fastapi
        from starlette.concurrency import run_in_threadpool
    except ImportError as error:
        raise SettingsError(
            "A reward server needs FastAPI. Install it: pip install 'flowgrain[serve]'"
        ) from error

    app = fastapi.FastAPI(title="flowgrain rewards")
    lock = threading.Lock()

    @app.middleware("http")
    async def check(
        request: fastapi.Request,
        respond: Callable[[fastapi.Request], Awaitable[fastapi.Response]],
    ) -> fastapi.Response:
        return _rejection(request, token, max_bytes) or await respond(request)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"rewards": sorted(rewards), "max_images": max_images, "max_bytes": max_bytes}

    @app.post("/score")
    async def post_score(request: ScoreRequest) -> ScoreResponse:
        if request.reward not in rewards:
            names = ", ".join(sorted(rewards))
            raise fastapi.HTTPException(
                404, f"there is no reward {request.reward!r}. Rewards of this server: {names}"
            )
        if len(request.prompts) > max_images:
            raise fastapi.HTTPException(
                413, f"{len(request.prompts)} images; at most {max_images} are allowed"
            )
        reward = rewards[request.reward]
        try:
            return await run_in_threadpool(_respond, reward, request, max_bytes, lock)
        except ValueError as error:
            raise fastapi.HTTPException(422, str(error)) from error

    return app


def _rejection(
    request: "fastapi.Request", token: str | None, max_bytes: int
) -> "fastapi.Response | None":
    """The error response to a request without the token or above the size limit, otherwise None."""
    from fastapi.responses import JSONResponse

    # Bytes, because compare_digest refuses text that is not ASCII. Headers are decoded as latin-1.
    given = request.headers.get("authorization", "").encode("latin-1")
    if token is not None and not secrets.compare_digest(given, f"Bearer {token}".encode()):
        return JSONResponse({"detail": "the bearer token is missing or wrong"}, 401)
    length = request.headers.get("content-length")
    if request.method == "POST" and (
        length is None or not length.isdigit() or int(length) > max_bytes
    ):
        detail = f"a request needs a content-length of at most {max_bytes} bytes"
        return JSONResponse({"detail": detail}, 413)
    return None


def _respond(
    reward: Reward, request: ScoreRequest, max_bytes: int, lock: threading.Lock
) -> ScoreResponse:
    prompts, images = request.prompts_with_fields(), request.images(max_bytes)
    with lock:
        scores = score(reward, images, prompts)
    values = [None if np.isnan(value) else value for value in scores.values.tolist()]
    return ScoreResponse(scores=values, reason=scores.reason)
