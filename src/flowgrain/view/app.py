"""The application: the addresses of the API and of the pages, and errors as JSON."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flowgrain.records.json_text import parse_json
from flowgrain.view import evaluations, groups, runs, sources, votes
from flowgrain.view.assets import Assets
from flowgrain.view.catalog import Catalog, Entry
from flowgrain.view.events import Events
from flowgrain.view.json_values import to_json
from flowgrain.view.metrics import MAX_POINTS
from flowgrain.view.readable import DAMAGED, Missing, reason
from flowgrain.view.security import Gate, content_policy
from flowgrain.view.votes import BadVote

MAX_BODY = 4096
"""Bytes of a vote."""
BODY_SECONDS = 10.0
"""Time in which a vote must arrive."""
_POINTS = 1000
_CHECKED = "private, no-cache"

Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(
    catalog: Catalog,
    host: str = "127.0.0.1",
    token: str | None = None,
    events: Events | None = None,
) -> Gate:
    """The ASGI application that shows the runs in `catalog`.

    Args:
        catalog: the directories.
        host: address that the server listens on. It determines the accepted Host headers.
        token: what a browser must know. None: no token is needed.
        events: the streams of changes. Default: new ones.
    """
    assets, streams = Assets(), events or Events(catalog)

    async def get_events(request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        return streams.answer()

    async def get_asset(request: Request) -> Response:
        found = assets.read(request.path_params.get("name", "index.html"))
        if found is None:
            raise Missing("There is no such file.")
        return _content(request, *found)

    app = Starlette(
        routes=[
            Route("/", get_asset),
            Route("/assets/{name:path}", get_asset),
            Route("/api/events", get_events),
            *_routes(catalog),
            *_vote_routes(catalog),
        ],
        middleware=[Middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)],
        exception_handlers={
            HTTPException: _http_error,
            Missing: _answer_with(404),
            BadVote: _answer_with(400),
            **dict.fromkeys(DAMAGED, _answer_with(422)),
            Exception: _unexpected,
        },
    )
    return Gate(app, host, token, content_policy(assets.script_hashes))


def _routes(catalog: Catalog) -> list[Route]:
    """The addresses of the API. An id may contain slashes, so the longest addresses come first."""

    def run(request: Request) -> Entry:
        return catalog.entry(request.path_params["id"], "run")

    def step(request: Request) -> int:
        return int(request.path_params["step"])

    def source(request: Request) -> str:
        return str(request.path_params["id"])

    def group_image(request: Request) -> tuple[bytes, str]:
        values, full = request.path_params, request.query_params.get("full") == "1"
        found = groups.image(run(request), values["step"], values["prompt"], values["place"], full)
        return found, "image/webp"

    def evaluation_image(request: Request) -> tuple[bytes, str]:
        place = request.path_params["place"]
        return evaluations.image(run(request), step(request), place), "image/webp"

    def source_image(request: Request) -> tuple[bytes, str]:
        found = sources.source_of(catalog, source(request))
        return found.image(request.path_params["place"])

    def difference(request: Request) -> dict[str, Any]:
        first, second = (catalog.entry(name, "run") for name in _a_and_b(request))
        return runs.difference(first, second)

    one_run, one_source = "/api/runs/{id:path}", "/api/sources/{id:path}"
    group, evaluation = f"{one_run}/groups/{{step:int}}", f"{one_run}/evaluations/{{step:int}}"
    return [
        Route("/api/runs", _json(lambda _: runs.overview(catalog))),
        Route("/api/sources", _json(lambda _: sources.listing(catalog))),
        Route("/api/diff", _json(difference)),
        Route(f"{group}/{{prompt:int}}/{{place:int}}.webp", _image(group_image)),
        Route(f"{group}/summary", _json(lambda r: groups.summary(run(r), step(r)))),
        Route(group, _json(lambda r: groups.content(run(r), step(r)))),
        Route(f"{evaluation}/{{place:int}}.webp", _image(evaluation_image)),
        Route(evaluation, _json(lambda r: evaluations.content(run(r), step(r)))),
        Route(f"{one_run}/evaluations", _json(lambda r: evaluations.means(run(r)))),
        Route(f"{one_run}/metrics", _json(lambda r: _metrics(run(r), r))),
        Route(one_run, _json(lambda r: runs.details(run(r)))),
        Route(f"{one_source}/{{place:int}}.webp", _image(source_image)),
        Route(one_source, _json(lambda r: sources.content(catalog, source(r)))),
    ]


def _vote_routes(catalog: Catalog) -> list[Route]:
    """The addresses of the votes of the arena. Only one of them writes."""

    async def export_votes(request: Request) -> Response:
        def export() -> bytes:
            chosen = votes.votes_between(catalog, *_a_and_b(request))
            return votes.zipped(votes.preference_data(catalog, chosen, []))

        name = {"Content-Disposition": 'attachment; filename="pairs.zip"'}
        return Response(await run_in_threadpool(export), 200, name, "application/zip")

    async def add_vote(request: Request) -> Response:
        vote = await _body(request)
        return Response(
            to_json(await run_in_threadpool(votes.add, catalog, vote)), 201, None, _JSON
        )

    return [
        Route("/api/votes", _json(lambda r: votes.tally(catalog, *_a_and_b(r)))),
        Route("/api/votes", add_vote, methods=["POST"]),
        Route("/api/votes/export", export_votes),
    ]


def _a_and_b(request: Request) -> tuple[str, str]:
    """The two ids of a comparison."""
    return request.query_params.get("a", ""), request.query_params.get("b", "")


def _metrics(entry: Entry, request: Request) -> dict[str, Any]:
    """The answer to /api/runs/ID/metrics."""
    points = request.query_params.get("points", str(_POINTS))
    if not points.isdecimal() or not 0 < int(points) <= MAX_POINTS:
        raise HTTPException(400, f"points={points}: use a number from 1 to {MAX_POINTS}.")
    keys = request.query_params.get("keys")
    return runs.curves_of(entry).sample(keys.split(",") if keys else None, int(points))


_JSON = "application/json"


def _json(compute: Callable[[Request], Mapping[str, Any]]) -> Endpoint:
    """An endpoint that answers with what `compute` returns, in a thread."""

    async def endpoint(request: Request) -> Response:
        text = await run_in_threadpool(lambda: to_json(compute(request)))
        return Response(text, media_type=_JSON)

    return endpoint


def _image(read: Callable[[Request], tuple[bytes, str]]) -> Endpoint:
    """An endpoint that answers with an image that `read` returns, in a thread."""

    async def endpoint(request: Request) -> Response:
        return _content(request, *await run_in_threadpool(read, request))

    return endpoint


def _content(request: Request, content: bytes, kind: str) -> Response:
    """The content of a file, or 304 if the browser has it."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": _CHECKED}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=kind)


async def _body(request: Request) -> Any:
    """The JSON in the body of a request.

    Raises:
        HTTPException: it is too large or too slow.
        BadVote: it is not JSON.
    """
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    text = f"A vote has at most {MAX_BODY} bytes."
                    raise HTTPException(413, text, {"Connection": "close"})
    except TimeoutError:
        text = f"The vote did not arrive within {BODY_SECONDS:g} s."
        raise HTTPException(408, text, {"Connection": "close"}) from None
    try:
        return parse_json(body)
    except ValueError as error:
        raise BadVote(f"The vote is {error}.") from None


def _answer_with(status: int) -> Callable[[Request, Exception], Response]:
    def handler(_: Request, error: Exception) -> Response:
        return Response(to_json({"error": reason(error)}), status, None, _JSON)

    return handler


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = to_json({"error": error.detail})
    return Response(text, error.status_code, error.headers, _JSON)


def _unexpected(_: Request, error: Exception) -> Response:
    text = f"{type(error).__name__}. The terminal of flowgrain view shows more."
    return Response(to_json({"error": text}), 500, None, _JSON)
