"""Several reward servers behind one reward: exact scores whatever the servers do."""

import base64
import http.server
import importlib
import itertools
import json
import select
import socket
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrain.data import as_prompts
from flowgrain.rewards import RewardConfig, build_reward, score
from flowgrain.rewards.identity import reward_identity
from flowgrain.rewards.reachable import check_server
from flowgrain.rewards.remote import Remote
from flowgrain.rewards.replicas import FEWEST_TIMES
from flowgrain.settings import SettingsError
from flowgrain.training.restart import _repeats

IDENTITY = {"name": "red", "options": "a", "torch": "1"}
IMAGES = torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(1))
PROMPTS = as_prompts(["a"] * len(IMAGES))


def red(images):
    return images[:, 0].double().mean((1, 2)).float()


class Server:
    """A server whose behavior a test changes: ok, late, 500, busy, garbage, drop, hang or down."""

    def __init__(self, behavior="ok", identity=IDENTITY, port=0):
        self.behavior, self.identity = behavior, identity
        self.scored = self.checked = self.cancelled = 0
        self.release = threading.Event()
        handler = type("Handler", (_Handler,), {"state": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    state: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.state.checked += 1
        if self.state.behavior == "hung":
            self.state.release.wait(20)
        elif self.state.behavior == "down":
            self.send(500, {})
        else:
            self.send(200, {"rewards": ["red"], "identities": {"red": self.state.identity}})

    def do_POST(self):
        state = self.state
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state.scored += 1
        match state.behavior:
            case "500" | "down":
                self.send(500, {"detail": "out of memory"})
            case "busy":
                self.send(503, {}, {"Retry-After": "1"})
            case "garbage":
                self.send(200, {"scores": [1.0] * 77})
            case "drop":
                self.connection.close()
            case "hang":
                begin = time.monotonic()
                while not state.release.is_set() and time.monotonic() - begin < 20:
                    if select.select([self.connection], [], [], 0.02)[0]:
                        state.cancelled += not self.connection.recv(1)
                        break
            case _:
                time.sleep(0.4 if state.behavior == "late" else 0)
                raw = request["raw"]
                values = np.frombuffer(base64.b64decode(raw["data"]), "<f4").reshape(raw["shape"])
                self.send(200, {"scores": red(torch.from_numpy(values.copy())).tolist()})

    def send(self, status, content, headers=None):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def servers():
    started = []

    def start(*behaviors, **options):
        started.extend(Server(behavior, **options) for behavior in behaviors)
        return started[-len(behaviors) :]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="module")
def three():
    started = [Server() for _ in range(3)]
    yield started
    for server in started:
        server.close()


def remote(servers, **options):
    limits = {"timeout": 20.0, "deadline": 60.0, "retries": 0, "backoff": 0.01, "request_size": 2}
    return Remote([server.url for server in servers], "red", **{**limits, **options})


def counters(reward):
    by_url = {replica.url: replica for replica in reward.server.replicas}
    return [by_url[url] for url in reward.urls]


def test_requests_are_balanced_and_scores_are_exact(servers):
    several = servers("ok", "ok", "ok")
    reward = remote(several, hedge_after="never")
    for _ in range(3):
        found = score(reward, IMAGES, PROMPTS)
        assert torch.equal(found.values, red(IMAGES))
        assert (found.failed, found.reason) == (0, None)
    assert sum(server.scored for server in several) == 18
    assert all(server.scored >= 3 for server in several)
    assert [replica.requests for replica in counters(reward)] == [s.scored for s in several]
    assert [server.checked for server in several] == [1, 1, 1]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["ok", "500", "garbage", "drop", "down"]), min_size=3, max_size=3))
def test_one_working_server_is_enough(three, behaviors):
    for server, behavior in zip(three, behaviors, strict=True):
        server.behavior = behavior
    found = score(remote(three), IMAGES, PROMPTS)
    if "ok" in behaviors:
        assert torch.equal(found.values, red(IMAGES))
        assert (found.failed, found.gave_up, found.reason) == (0, False, None)
    else:
        assert found.failed == len(IMAGES)
        assert found.gave_up
        assert all(server.url in found.reason for server in three)
        assert "and 2 other replicas failed" in found.reason


def test_a_busy_server_is_no_failure(servers):
    busy, good = servers("busy", "ok")
    reward = remote([busy, good])
    assert torch.equal(score(reward, IMAGES, PROMPTS).values, red(IMAGES))
    assert [replica.failed for replica in counters(reward)] == [0, 0]
    assert busy.scored < good.scored
    good.behavior = "busy"
    timer = threading.Timer(0.5, lambda: setattr(busy, "behavior", "ok"))
    timer.start()
    assert score(reward, IMAGES, PROMPTS).failed == 0
    timer.join()


def test_a_slow_server_is_hedged_and_its_request_cancelled(servers):
    slow, good = servers("hang", "ok")
    reward = remote([slow, good], hedge_after=0.1, request_size=12)
    found = score(reward, IMAGES, PROMPTS)
    assert torch.equal(found.values, red(IMAGES))
    assert [replica.hedges for replica in counters(reward)] == [0, 1]
    assert (slow.scored, good.scored) == (1, 1)
    deadline = time.monotonic() + 10
    while not slow.cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    assert slow.cancelled == 1
    first = counters(reward)[0]
    assert (first.failed, first.healthy) == (0, True)


def test_a_hedged_request_waits_for_an_idle_server(servers):
    slow, late = servers("hang", "late")
    reward = remote([slow, late], hedge_after=0.1, request_size=6)
    assert torch.equal(score(reward, IMAGES, PROMPTS).values, red(IMAGES))
    assert [replica.hedges for replica in counters(reward)] == [0, 1]
    assert (slow.scored, late.scored) == (1, 2)


def test_a_busy_process_does_not_hedge(servers):
    """Every server already has a request, so a second one would only add load."""
    several = servers("hang", "hang")
    reward = remote(several, hedge_after=0.4, request_size=6)
    timer = threading.Timer(0.8, lambda: [server.release.set() for server in several])
    timer.start()
    score(reward, IMAGES, PROMPTS)
    timer.join()
    assert sum(replica.hedges for replica in counters(reward)) == 0


def test_the_quantile_of_past_answers(servers):
    reward = remote(servers("ok", "ok"))
    assert reward.server.hedge_seconds() is None
    replica = reward.server.choose([], "")
    for number in range(FEWEST_TIMES):
        assert reward.server.hedge_seconds() is None
        reward.server.close(replica, float(number))
    times = np.arange(FEWEST_TIMES, dtype=float)
    assert reward.server.hedge_seconds() == np.quantile(times, 0.95)
    assert remote(servers("ok", "ok"), hedge_after="never").server.hedge_seconds() is None


def test_a_server_that_failed_is_used_again_after_a_health_check(servers, caplog):
    flaky, good = servers("down", "ok")
    reward = remote([flaky, good])
    check_server("remote", reward)
    assert score(reward, IMAGES, PROMPTS).failed == 0
    before, flaky.behavior = flaky.scored, "ok"
    assert counters(reward)[0].failures >= 1
    assert counters(reward)[0].failed == 0  # health checks are no requests
    deadline = time.monotonic() + 20
    while flaky.scored == before and time.monotonic() < deadline:
        assert torch.equal(score(reward, IMAGES, PROMPTS).values, red(IMAGES))
        time.sleep(0.05)
    assert flaky.scored > before
    assert f"The reward server at {flaky.url} is used again" in caplog.text


def test_a_server_that_returns_with_another_reward_is_not_used(servers, caplog):
    good, other = servers("ok", "ok")
    reward = remote([good, other])
    check_server("remote", reward)
    other.behavior = "500"
    assert score(reward, IMAGES, PROMPTS).failed == 0
    other.behavior, other.identity = "ok", {**IDENTITY, "torch": "2"}
    before, deadline = other.scored, time.monotonic() + 3
    checked = other.checked
    while other.checked == checked and time.monotonic() < deadline:
        assert score(reward, IMAGES, PROMPTS).failed == 0
        time.sleep(0.05)
    assert other.checked > checked
    for replica in counters(reward):
        replica.not_before = 0.0
    assert score(reward, IMAGES, PROMPTS).failed == 0
    assert other.scored == before


def test_servers_are_compared_before_a_run(servers, caplog):
    good, other = servers("ok", "ok")
    check_server("remote", remote([good, other]))
    other.identity = {**IDENTITY, "options": "b"}
    message = (
        rf"rewards\[remote\]\.url: {other.url} serves another reward 'red' than the other replicas "
        r"\(options b, not a\)\. Start all servers with the same command"
    )
    with pytest.raises(SettingsError, match=message):
        check_server("remote", remote([good, other]))
    other.identity = IDENTITY
    blue = Remote([good.url, other.url], "blue")
    with pytest.raises(SettingsError, match=r"does not serve the reward 'blue'. It serves: red"):
        check_server("remote", blue)
    other.behavior = "down"
    check_server("remote", remote([good, other]))
    assert f"{other.url} answered 500" in caplog.text
    good.behavior = "down"
    with pytest.raises(SettingsError, match=r"no server answers .*flowgrain serve red"):
        check_server("remote", remote([good, other]))


def test_a_server_that_hangs_takes_no_time_from_the_check_of_another(servers):
    hung, good = servers("hung", "ok")
    check_server("remote", remote([hung, good], deadline=0.5))


def test_a_restart_tries_again_if_no_server_listens(monkeypatch):
    """Like with one address. A server of another reward would be an error again."""
    monkeypatch.setattr("flowgrain.rewards.replica_call.HEALTH_SECONDS", 1.0)
    closed = []
    for _ in range(2):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            closed.append(f"http://127.0.0.1:{listener.getsockname()[1]}")
    for addresses in (closed, closed[0]):
        with pytest.raises(SettingsError, match="no server answers") as error:
            check_server("remote", Remote(addresses, "red"))
        assert not _repeats(error.value)
    assert _repeats(SettingsError("another reward"))


def test_options_of_several_addresses():
    def built(**options):
        return build_reward(RewardConfig(name="remote", reward="red", **options))

    one, two = "http://a:1", "http://b:1/"
    assert built(url=[one, two], hedge_after=2.5).urls == ["http://a:1", "http://b:1"]
    assert built(url=[one]).urls == built(url=one).urls == [one]
    for options, message in (
        ({"url": one, "hedge_after": "never"}, "hedge_after=never: has no effect with one address"),
        ({"url": []}, r"url=\[\]: there is no address"),
        ({"url": [one, f"{one}/"]}, "url=http://a:1: is listed twice"),
        ({"url": [one, "ftp://b"]}, "url=ftp://b: not an HTTP address"),
        ({"url": [one, two], "hedge_after": 0}, "hedge_after=0"),
    ):
        with pytest.raises(SettingsError, match=rf"rewards\[remote\]\.{message}"):
            built(**options)


def test_what_an_identity_depends_on(tmp_path, monkeypatch):
    def identity(**options):
        return reward_identity(RewardConfig(name="no_module:red", path="a", **options))

    first = identity(device="cuda:0")
    assert first == identity(device="cuda:3", weight=2.0, batch_size=4)
    different = [identity(device="cpu"), identity(device="cuda:0", dtype="float16")]
    for one, other in itertools.combinations([first, *different], 2):
        assert one != other
    assert "flowgrain" in first
    assert "/" not in first["options"]

    monkeypatch.syspath_prepend(tmp_path)
    sources = []
    for text in ("red = len", "red = max", "red = len"):
        (tmp_path / "custom_red.py").write_text(text)
        importlib.import_module("custom_red")
        sources.append(reward_identity(RewardConfig(name="custom_red:red"))["source"])
    assert sources[0] == sources[2] != sources[1]
