"""Running the server of the pages until Ctrl+C."""

import errno
import getpass
import logging
import os
import socket
from collections.abc import Callable

import uvicorn

from flowgrain.settings import SettingsError
from flowgrain.slow_clients import guarded_protocol
from flowgrain.view.app import create_app
from flowgrain.view.catalog import Catalog
from flowgrain.view.events import Events
from flowgrain.view.security import is_loopback

PORT = 7860
"""Default port. If it is used, the next free one."""
_PORTS_TRIED = 40
HEADER_SECONDS = 10.0
"""Time in which the headers of a request must arrive."""
MAX_CONNECTIONS = 200
"""Open connections. Further requests get status 503."""


class _Server(uvicorn.Server):
    """A server that ends the streams of changes before it waits for open connections."""

    def __init__(self, config: uvicorn.Config, events: Events) -> None:
        super().__init__(config)
        self.events = events

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.events.close()
        # Requests that are still open are cancelled, which uvicorn would log with tracebacks.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens on `host`.

    Args:
        host: address of this computer.
        port: the port. None: `PORT`, or the next port that is free.

    Raises:
        SettingsError: the address or the port cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = range(PORT, PORT + _PORTS_TRIED) if port is None else [port]
    for number in ports:
        try:
            return socket.create_server((host, number), family=family, backlog=256)
        except (OSError, UnicodeError) as error:
            failure, used = error, getattr(error, "errno", None) == errno.EADDRINUSE
        if not used:
            break
    place = f"--host {host}" if port is None else f"--host {host} --port {port}"
    raise SettingsError(
        f"{place}: the server cannot listen there ({failure}). "
        "Use another port, or an address of this computer."
    ) from failure


def serve(
    catalog: Catalog,
    listener: socket.socket,
    host: str,
    token: str | None,
    say: Callable[[str], None],
) -> None:
    """Serve the pages until SIGINT or SIGTERM.

    Args:
        catalog: the directories.
        listener: a socket that listens.
        host: its address.
        token: what a browser must know. None: no token is needed.
        say: prints a line. The first line is the address of the pages.

    Raises:
        KeyboardInterrupt: after SIGINT, when all connections are closed.
    """
    events = Events(catalog)
    config = uvicorn.Config(
        create_app(catalog, host, token, events),
        http=guarded_protocol(HEADER_SECONDS),
        ws="none",
        lifespan="off",
        log_level="warning",
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
    )
    for line in addresses(host, listener.getsockname()[1], token):
        say(line)
    _Server(config, events).run(sockets=[listener])


def addresses(host: str, port: int, token: str | None) -> list[str]:
    """The address of the pages, and in a session of ssh the command for a tunnel to them."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    name = f"[{name}]" if ":" in name else name
    lines = [f"http://{name}:{port}/{f'?token={token}' if token else ''}"]
    if is_loopback(host) and "SSH_CONNECTION" in os.environ:
        target = f"{getpass.getuser()}@{socket.gethostname()}"
        lines.append(f"on your computer, first run: ssh -NL {port}:{host}:{port} {target}")
    return lines
