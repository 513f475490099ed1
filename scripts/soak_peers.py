"""Hostile peers of the soak: a reward server that answers badly, and clients that abuse one."""

import contextlib
import gzip
import itertools
import random
import socket
import threading
import time

ANSWERS = ("hang", "drip", "close", "reset", "status", "bomb", "garbage")
"""What the hostile server does after a request."""
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_OPEN = 40
"""Connections that the hostile clients keep open."""


def hostile_server(port: int, seed: int) -> None:
    """Answer every request at `port` with one of ANSWERS, in a separate process."""
    chance = random.Random(seed)
    bomb = gzip.compress(b" " * 50_000_000)
    with socket.create_server(("127.0.0.1", port), reuse_port=False) as listener:
        while True:
            connection, _ = listener.accept()
            arguments = (connection, chance.choice(ANSWERS), bomb)
            threading.Thread(target=_answer, args=arguments, daemon=True).start()


def _answer(connection: socket.socket, kind: str, bomb: bytes) -> None:
    with connection, contextlib.suppress(OSError):
        connection.recv(65536)
        if kind == "hang":
            time.sleep(60)
        elif kind == "drip":
            connection.sendall(_HEAD + b"Content-Length: 9999\r\n\r\n")
            for _ in range(600):
                connection.sendall(b" ")
                time.sleep(0.1)
        elif kind == "close":
            connection.sendall(_HEAD + b'Content-Length: 9999\r\n\r\n{"scores": [0.')
        elif kind == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        elif kind == "status":
            connection.sendall(b"HTTP/1.1 500 Error\r\nContent-Length: 0\r\n\r\n")
        elif kind == "bomb":
            head = _HEAD + f"Content-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n".encode()
            connection.sendall(head + bomb)
        else:
            connection.sendall(b"\xff\x00 no HTTP\r\n\r\n")


def hostile_clients(port: int, seed: int) -> None:
    """Abuse the reward server at `port` until the process is ended.

    About 20 connections per second: silent ones, endless headers, bodies that never end, requests
    that are no HTTP and JSON of great depth. Up to `_OPEN` of them stay open.
    """
    chance = random.Random(seed)
    post = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    deep = b"[" * 50_000
    openings = (
        b"",
        b"POST /sc",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 1000,
        post + b"Content-Length: 1000000\r\n\r\n{",
        post + f"Content-Length: {len(deep)}\r\n\r\n".encode() + deep,
        b"\x16\x03\x01 no HTTP\r\n\r\n",
    )
    kept: list[socket.socket] = []
    for number in itertools.count():
        with contextlib.suppress(OSError):
            connection = socket.create_connection(("127.0.0.1", port), 1)
            kept.append(connection)
            connection.sendall(chance.choice(openings))
        if kept and number % 3 == 0:  # a slow body or header goes on
            with contextlib.suppress(OSError):
                chance.choice(kept).sendall(b" ")
        while len(kept) > _OPEN:
            kept.pop(0).close()
        time.sleep(0.05)
