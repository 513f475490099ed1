"""HTTP connections that another thread can close, whatever they wait for.

The timeouts of requests apply to single reads: a server that sends one byte per second never
exceeds them. Closing the connection from outside ends every wait.
"""

import contextlib
import socket
import threading
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool


class Attempt:
    """One attempt to get an answer.

    Attributes:
        until: time of `time.monotonic` at which the connection must be closed.
        expired: the connection was closed before the answer was complete.
    """

    def __init__(self, until: float = float("inf")) -> None:
        self.until, self.expired = until, False
        self.connection: Any = None

    def __enter__(self) -> "Attempt":
        _current.attempt = self
        return self

    def __exit__(self, *_: object) -> None:
        _current.attempt = None

    def expire(self) -> None:
        """Close the connection. The thread that waits for it gets an OSError."""
        self.expired = True
        open_socket = getattr(self.connection, "sock", None)
        if isinstance(open_socket, socket.socket):
            with contextlib.suppress(OSError):  # already closed
                # Not the method of an SSL socket, which must not be used by two threads.
                socket.socket.shutdown(open_socket, socket.SHUT_RDWR)


_current = threading.local()
"""The attempt of this thread."""


class _Watched:
    """Tells the attempt of this thread which connection it uses."""

    def connect(self) -> None:
        self._register()
        super().connect()  # type: ignore[misc]
        self._register()

    def request(self, *args: Any, **options: Any) -> None:
        self._register()
        super().request(*args, **options)  # type: ignore[misc]

    def _register(self) -> None:
        attempt = getattr(_current, "attempt", None)
        if attempt is not None:
            attempt.connection = self
            if attempt.expired:
                raise TimeoutError("the connection took too long")


class _Connection(_Watched, HTTPConnection):
    pass


class _SecureConnection(_Watched, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class WatchedAdapter(HTTPAdapter):
    """An adapter of requests whose connections register in the attempt of their thread."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}

    def proxy_manager_for(self, *args: Any, **options: Any) -> Any:
        manager = super().proxy_manager_for(*args, **options)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
        return manager
