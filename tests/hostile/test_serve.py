"""`flowgrain serve` against clients that are slow, many or wrong."""

import base64
import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests
import torch
import uvicorn

from flowgrain.rewards import score
from flowgrain.rewards.messages import TOKEN_VARIABLE
from flowgrain.rewards.remote import Remote
from flowgrain.rewards.server import reward_app
from flowgrain.slow_clients import guarded_protocol

MB = 2**20


def bright(images, prompts):
    return images.mean((1, 2, 3))


def slow(images, prompts):
    time.sleep(0.5)
    return bright(images, prompts)


@contextmanager
def serving(token=None, header_seconds=0.6, **limits):
    app = reward_app({"bright": bright, "slow": slow}, token, **limits)
    config = uvicorn.Config(
        app, port=0, log_level="error", http=guarded_protocol(header_seconds), ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


def body(count=1, size=2, reward="bright"):
    data = base64.b64encode(bytes(12 * count * size * size)).decode()
    raw = {"shape": [count, 3, size, size], "data": data}
    return {"reward": reward, "prompts": ["a"] * count, "raw": raw}


def closed(connection, seconds):
    """What the server sent before it closed the connection."""
    connection.settimeout(seconds)
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    connection.close()
    return received


HEAD = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"
SLOW = {
    "nothing": (b"", b""),
    "half a request line": (b"POST /sc", b""),
    "slow headers": (b"GET /health HTTP/1.1\r\n", b"X"),
    "no body": (HEAD, b""),
    "slow body": (HEAD, b"x"),
    "slow body of GET": (HEAD.replace(b"POST /score", b"GET /health"), b"x"),
    "slow body of a wrong path": (HEAD.replace(b"score", b"none"), b"x"),
    "second request": (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /he", b""),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
def test_a_slow_connection_is_closed(kind):
    first, drip = SLOW[kind]
    with serving(body_seconds=0.6) as port:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(first)
        begin, stop = time.monotonic(), threading.Event()

        def send():
            while drip and not stop.wait(0.1):
                try:
                    connection.sendall(drip)
                except OSError:
                    return

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        received = closed(connection, 5)
        stop.set()
        thread.join()
        assert time.monotonic() - begin < 3
    if "body" in kind and "GET" not in kind:
        assert b"408" in received.split(b"\r\n")[0]


@pytest.mark.slow
def test_many_half_open_connections_and_slow_bodies():
    with serving(body_seconds=1.0, header_seconds=1.0) as port:
        process = psutil.Process()
        before = len(process.net_connections("tcp"))
        half = [socket.create_connection(("127.0.0.1", port)) for _ in range(400)]
        bodies = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        for connection in half[::2]:
            connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        for connection in bodies:
            connection.sendall(HEAD + b"{")
        begin = time.monotonic()
        response = requests.post(f"http://127.0.0.1:{port}/score", json=body(), timeout=5)
        assert response.json()["scores"] == [0]  # others are served
        assert time.monotonic() - begin < 2
        for connection in [*half, *bodies]:
            closed(connection, 5)
        assert time.monotonic() - begin < 5
        time.sleep(0.2)
        assert len(process.net_connections("tcp")) <= before + 4


@pytest.mark.slow
def test_a_full_queue_is_answered_with_503_and_the_client_waits():
    with serving(max_queue=2) as port, concurrent.futures.ThreadPoolExecutor(6) as pool:
        url = f"http://127.0.0.1:{port}"

        def post(_):
            return requests.post(f"{url}/score", json=body(reward="slow"), timeout=20)

        responses = list(pool.map(post, range(6)))
        busy = [r for r in responses if r.status_code == 503]
        assert len(busy) == 4
        assert all(r.headers["Retry-After"] == "2" for r in busy)
        remotes = [Remote(url, "slow", retries=0) for _ in range(5)]
        found = list(pool.map(lambda r: score(r, torch.rand(1, 3, 2, 2), ["a"]), remotes))
        assert all(scores.failed == 0 for scores in found)


@pytest.mark.slow
def test_bodies_do_not_exceed_the_memory():
    """Slow uploads hold at most max_bytes together. The one too many gets 503."""
    with serving(max_bytes=100_000, body_seconds=2.0) as port:
        head = HEAD.replace(b"1000", b"90000")
        first = socket.create_connection(("127.0.0.1", port))
        first.sendall(head + b" " * 80_000)
        time.sleep(0.3)
        second = socket.create_connection(("127.0.0.1", port))
        second.sendall(head + b" " * 90_000)
        assert b"503" in closed(second, 5).split(b"\r\n")[0]
        assert b"408" in closed(first, 5).split(b"\r\n")[0]
        response = requests.post(f"http://127.0.0.1:{port}/score", json=body(), timeout=5)
        assert response.status_code == 200


TOKENS = {"ascii": "secret", "umlaut": "gehéim", "emoji": "🔑", "undecodable": b"\xff\xfe"}


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_of_any_bytes(kind, monkeypatch):
    """The token of the environment reaches the server, and other tokens are refused."""
    token = os.fsencode(TOKENS[kind])
    monkeypatch.setitem(os.environ, TOKEN_VARIABLE, os.fsdecode(token))
    with serving(os.environ[TOKEN_VARIABLE]) as port:
        url = f"http://127.0.0.1:{port}"
        found = score(Remote(url, "bright", retries=0), torch.ones(1, 3, 2, 2), ["a"])
        assert found.values.tolist() == [1], found.reason
        for other in TOKENS.values():
            given = b"Bearer " + os.fsencode(other)
            for send in (requests.post, requests.get):
                path = "/score" if send is requests.post else "/health"
                headers = {"Authorization": given}
                response = send(f"{url}{path}", json=body(), headers=headers, timeout=5)
                assert response.status_code == (200 if os.fsencode(other) == token else 401)


BAD_BODIES = {
    "zero images": (422, {**body(0), "prompts": []}),
    "zero images for a prompt": (422, {**body(0), "prompts": ["a"]}),
    "no PNG": (422, {"reward": "bright", "prompts": [], "png": []}),
    "no PNG for a prompt": (422, {"reward": "bright", "prompts": ["a"], "png": []}),
    "images without pixels": (200, {**body(1, 0)}),
    "negative shape": (422, {**body(), "raw": {"shape": [1, 3, -1, 2], "data": ""}}),
    "huge shape": (422, {**body(), "raw": {"shape": [2**40, 3, 2**40, 2], "data": ""}}),
    "no reward": (404, body(reward="\x1b[31mnone\ud800".encode("utf-8", "replace").decode())),
    "empty": (422, b""),
    "null": (422, b"null"),
    "deep JSON": (422, b"[" * 100_000),
    "deep JSON in fields": (422, b'{"fields": ' + b'[{"a":' * 50_000),
    "invalid UTF-8": (422, b'{"reward": "\xff"}'),
    "long number": (422, b'{"reward": ' + b"9" * 10_000 + b"}"),
    "too large": (413, b" " * 3 * MB),
}


@pytest.mark.parametrize("kind", BAD_BODIES)
def test_a_wrong_request_gets_a_status_and_no_traceback(kind, capfd, caplog):
    status, data = BAD_BODIES[kind]
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    with serving(max_bytes=2 * MB) as port:
        try:
            response = requests.post(f"http://127.0.0.1:{port}/score", data=data, timeout=5)
        except requests.ConnectionError:
            assert status == 413  # the server does not read such a body
        else:
            assert response.status_code == status, response.text
            assert len(response.text) < 1000
        assert requests.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


@contextmanager
def command(*words, **environment):
    process = subprocess.Popen(
        [sys.executable, "-m", "flowgrain", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_memory_after_a_burst():
    """100 requests of 200 images. The memory returns to its base."""
    with command("oracle", "--port", "0") as process:
        url = process.stdout.readline().split()[3].rstrip(",")
        resident = psutil.Process(process.pid).memory_info
        session = requests.Session()
        payload = json.dumps(body(200, 32, "oracle")).encode()

        def post(_):
            return session.post(f"{url}/score", data=payload, timeout=60).status_code

        assert post(0) == 200
        base = resident().rss
        with concurrent.futures.ThreadPoolExecutor(100) as pool:
            statuses = list(pool.map(post, range(100)))
        assert set(statuses) == {200, 503}
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        assert peak < base + 450 * MB, (base / MB, peak / MB)
        time.sleep(0.5)
        assert resident().rss < base + 60 * MB, (base / MB, resident().rss / MB)
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in process.communicate(timeout=20)[1]


@pytest.mark.slow
def test_serving_is_printed_only_after_the_address_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with command("oracle", "--port", port) as process:
            output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == ""
    assert f"--port {port}: the server cannot listen there" in errors
    assert "Traceback" not in errors
    assert errors.count("\n") == 1
