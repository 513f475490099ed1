"""`flowgrain view` in a process of its own, on a real socket."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import requests
from command_line import refused
from records.fake_runs import write_run

from flowgrain import SettingsError
from flowgrain.view import Catalog, events
from flowgrain.view.events import Events
from flowgrain.view.server import addresses, listen

COMMAND = "import sys; from flowgrain.cli import main; main()"


@contextmanager
def viewing(*words, folder):
    """A running `flowgrain view`, and its address."""
    environment = {k: v for k, v in os.environ.items() if k != "SSH_CONNECTION"}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "view", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "runs" / "demo", steps=4)
    return tmp_path


def connection_to(url):
    port = int(re.search(r":(\d+)", url)[1])
    return socket.create_connection(("127.0.0.1", port), timeout=20)


@pytest.mark.slow
def test_a_server_with_slow_clients_and_streams(folder):
    with viewing("--port", "0", folder=folder) as (process, url):
        silent = [connection_to(url) for _ in range(20)]
        for connection in silent[:10]:  # half of a request, and a body that never comes
            connection.sendall(b"GET /api/runs HTTP/1.1\r\nHost: localhost\r\n")
        for connection in silent[10:]:
            head = b"POST /api/votes HTTP/1.1\r\nHost: localhost\r\nX-Flowgrain: 1\r\n"
            connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
        with requests.get(f"{url}api/events", stream=True, timeout=20) as stream:
            lines = stream.iter_lines(chunk_size=1, decode_unicode=True)
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert next(lines) == ": open"
            rows = requests.get(f"{url}api/runs", timeout=20).json()["runs"]
            assert [row["id"] for row in rows] == ["demo"]
            with (folder / "runs/demo/metrics.jsonl").open("a") as file:
                file.write('{"step": 5}\n')
            changes = [line for _, line in zip(range(4), lines, strict=False) if line]
            assert changes[0] == "event: change"
            assert json.loads(changes[1].removeprefix("data: ")) == {"runs": ["demo"]}
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0  # although streams and connections are open
        assert process.stderr.read() == process.stdout.read() == ""


def test_no_torch_and_one_line(folder):
    with viewing("runs", "--port", "0", folder=folder) as (process, url):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        assert requests.get(url, timeout=20).status_code == 200
        assert requests.get(f"{url}api/runs/demo/evaluations", timeout=20).ok
        maps = open(f"/proc/{process.pid}/maps").read()  # noqa: SIM115
        assert "libtorch" not in maps
        assert "scipy" in maps  # the file lists what is imported


def test_a_token_is_in_the_address(folder):
    with viewing("--port", "0", "--token", folder=folder) as (_, url):
        session = requests.Session()
        base = url.split("?")[0]
        assert session.get(f"{base}api/runs", timeout=20).status_code == 401
        assert session.get(url, timeout=20).status_code == 200
        assert session.get(f"{base}api/runs", timeout=20).status_code == 200


def test_the_next_free_port():
    with listen("127.0.0.1", None) as first, listen("127.0.0.1", None) as second:
        ports = [listener.getsockname()[1] for listener in (first, second)]
        assert 7860 <= ports[0] < ports[1] < 7900
        with pytest.raises(SettingsError, match=f"--port {ports[0]}"):
            listen("127.0.0.1", ports[0])
    with pytest.raises(SettingsError, match=r"--host 203\.0\.113\.1"):
        listen("203.0.113.1", None)


def test_the_printed_lines(monkeypatch):
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    assert addresses("127.0.0.1", 7860, None) == ["http://127.0.0.1:7860/"]
    assert addresses("::1", 1, "x") == ["http://[::1]:1/?token=x"]
    assert addresses("0.0.0.0", 1, "x") == [f"http://{socket.gethostname()}:1/?token=x"]
    monkeypatch.setenv("SSH_CONNECTION", "a")
    monkeypatch.setenv("LOGNAME", "me")
    _, command = addresses("127.0.0.1", 7861, None)
    assert command.endswith(f"ssh -NL 7861:127.0.0.1:7861 me@{socket.gethostname()}")


def test_the_number_of_streams_is_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(events, "MAX_STREAMS", 2)
    streams = Events(Catalog([tmp_path]))
    found = [streams.answer() for _ in range(3)]
    assert [answer.status_code for answer in found] == [200, 200, 503]
    streams.streams -= 1  # a client is gone
    assert streams.answer().status_code == 200


def test_wrong_words(folder, monkeypatch):
    assert "not a directory" in refused("view", folder / "nowhere")
    assert "not a directory" in refused("view", folder / "runs" / "demo" / "run.yaml")
    monkeypatch.chdir(folder / "runs")
    assert "flowgrain view DIRECTORY" in refused("view")


def test_a_stream_counts_until_its_client_is_gone(folder):
    with viewing("--port", "0", folder=folder) as (_, url):
        for _ in range(events.MAX_STREAMS + 8):
            requests.get(f"{url}api/events", stream=True, timeout=20).close()
        deadline = time.monotonic() + 30
        while requests.get(f"{url}api/events", stream=True, timeout=20).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
