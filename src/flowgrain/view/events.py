"""The stream of changes: which runs have new files."""

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from flowgrain.view.catalog import REFRESH_SECONDS, Catalog
from flowgrain.view.security import refusal

MAX_STREAMS = 32
"""Open streams. A browser tab has one."""
COMMENT_SECONDS = 15.0
"""Time after which a silent stream sends a comment, so that proxies keep it open."""


class Events:
    """The open streams of a server.

    Args:
        catalog: the directories.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog, self.streams, self.closed = catalog, 0, asyncio.Event()

    def close(self) -> None:
        """End all streams, because the server ends."""
        self.closed.set()

    def answer(self) -> Response:
        """The answer to /api/events."""
        if self.streams >= MAX_STREAMS:
            return refusal(503, f"There are {MAX_STREAMS} open pages. Close one of them.")
        return _Stream(self)


class _Stream(StreamingResponse):
    """A stream, which is counted until its client is gone."""

    def __init__(self, events: Events) -> None:
        super().__init__(_messages(events), media_type="text/event-stream")
        self.events = events
        events.streams += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.events.streams -= 1


async def _messages(events: Events) -> AsyncIterator[str]:
    """The changes, collected for a second. A slow client gets them together."""
    catalog = events.catalog
    await run_in_threadpool(catalog.refresh)
    seen, silent = catalog.version, 0.0
    yield ": open\n\n"
    while not events.closed.is_set():
        try:
            await asyncio.wait_for(events.closed.wait(), REFRESH_SECONDS)
        except TimeoutError:
            silent += REFRESH_SECONDS
        await run_in_threadpool(catalog.refresh)
        latest = catalog.version
        if latest > seen:
            changed = json.dumps({"runs": catalog.changed_since(seen)})
            seen, silent = latest, 0.0
            yield f"event: change\ndata: {changed}\n\n"
        elif silent >= COMMENT_SECONDS:
            silent = 0.0
            yield ": still here\n\n"
