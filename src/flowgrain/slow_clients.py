"""A limit on the time in which the headers of a request must arrive. Uvicorn has none."""

import asyncio
from typing import Any


def guarded_protocol(header_seconds: float) -> type[Any]:
    """Uvicorn's HTTP protocol, which closes a connection without complete headers in this time."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class GuardedProtocol(H11Protocol):
        """A connection with a limit on the time of headers."""

        header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start_header_timer()

        def on_response_complete(self) -> None:
            self._start_header_timer()  # before a pipelined request is read
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.header_timer is not None:
                self.header_timer.cancel()

        def _start_header_timer(self) -> None:
            if self.header_timer is not None:
                self.header_timer.cancel()
            self.header_timer = self.loop.call_later(header_seconds, self._close_without_headers)

        def _close_without_headers(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return GuardedProtocol
