"""The gate of the reward server: the token, and limits on time, size and number of requests.

Uvicorn limits neither the time nor the memory of bodies. `Gate` is an ASGI middleware for bodies
and the queue. `flowgrain.slow_clients` limits the time of headers.
"""

import asyncio
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

RETRY_SECONDS = 2
"""Value of the header Retry-After."""


@dataclass(frozen=True)
class Limits:
    """Limits of the server.

    Attributes:
        bytes: largest body of a request, and of all bodies in memory.
        queue: requests that wait or are scored.
        body_seconds: time in which a body must arrive.
    """

    bytes: int
    queue: int
    body_seconds: float


class Gate:
    """Reads the body of each request, and rejects requests before they reach the application.

    Args:
        app: the application.
        token: bearer token that every request must have. None: no token is needed.
        limits: limits on bodies and the queue.
        when_idle: called when the last request is finished.
    """

    def __init__(
        self,
        app: "ASGIApp",
        token: str | bytes | None,
        limits: Limits,
        when_idle: Callable[[], None],
    ) -> None:
        self.app, self.limits, self.when_idle = app, limits, when_idle
        self.token = os.fsencode(token) if isinstance(token, str) else token
        self.waiting = self.buffered = self.open = 0

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] != "POST":
            await (self._unauthorized(scope) or self.app)(scope, receive, send)
            return
        length, limit = dict(scope["headers"]).get(b"content-length", b""), self.limits.bytes
        if not (length.isdigit() and int(length[:20]) <= limit):
            text = f"a request needs a content-length of at most {limit} bytes"
            await _answer(413, text)(scope, receive, send)
            return
        self.open += 1
        body = _Body(self)
        try:
            await self._post(scope, receive, send, body)
        finally:
            body.drop()
            self.open -= 1
            if not self.open:
                self.when_idle()

    async def _post(self, scope: "Scope", receive: "Receive", send: "Send", body: "_Body") -> None:
        rejection = self._unauthorized(scope)
        body.dropped = rejection is not None
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                complete = await body.read(receive)
        except TimeoutError:
            text = f"the body did not arrive within {self.limits.body_seconds:g} s"
            await _answer(408, text)(scope, receive, send)
            return
        if not complete:
            return  # the client is gone
        if rejection is None and (body.dropped or self.waiting >= self.limits.queue):
            text = "the server is busy. Repeat the request later"
            rejection = _answer(503, text, {"Retry-After": str(RETRY_SECONDS)})
        if rejection is not None:
            body.drop()
            await rejection(scope, receive, send)
            return
        self.waiting += 1
        try:
            await self.app(scope, body.replay(receive), send)
        finally:
            self.waiting -= 1

    def _unauthorized(self, scope: "Scope") -> "ASGIApp | None":
        """The answer to a request without the token."""
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self.token is None or secrets.compare_digest(given, b"Bearer " + self.token):
            return None
        return _answer(401, "the bearer token is missing or wrong")


class _Body:
    """The body of one request, counted in the memory of its gate.

    Attributes:
        dropped: it is not needed, or there is no memory for it. It is read to its end, because a
            client does not see an answer that arrives while it still sends.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate, self.chunks, self.size, self.dropped = gate, list[bytes](), 0, False

    async def read(self, receive: "Receive") -> bool:
        """Read the body. False if the client closes the connection."""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            self._add(message.get("body", b""))
            if not message.get("more_body", False):
                return True

    def _add(self, chunk: bytes) -> None:
        if self.gate.buffered + len(chunk) > self.gate.limits.bytes:
            self.drop()
            self.dropped = True
        if not self.dropped:
            self.chunks.append(chunk)
            self.size += len(chunk)
            self.gate.buffered += len(chunk)

    def drop(self) -> None:
        """Free the memory."""
        self.gate.buffered -= self.size
        self.chunks, self.size = [], 0

    def replay(self, receive: "Receive") -> "Receive":
        """A function that returns the whole body once, and then the events of the connection."""
        sent = False

        async def replayed() -> "Message":
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            body, self.chunks = b"".join(self.chunks), []
            return {"type": "http.request", "body": body, "more_body": False}

        return replayed


def _answer(status: int, detail: str, headers: dict[str, str] | None = None) -> "ASGIApp":
    """An answer that closes the connection, because a body may be left on it."""
    from starlette.responses import JSONResponse

    return JSONResponse({"detail": detail}, status, {"Connection": "close", **(headers or {})})
