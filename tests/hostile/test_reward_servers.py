"""Servers that hang, lie or send too much, against the rewards that call them.

Every failure has a reason in one line that names the server, in bounded time and memory.
"""

import gzip
import json
import time
import tracemalloc
import zlib
from typing import NamedTuple

import pytest
import torch
from hostile_server import HostileServer, answer, repeat, send
from toy import PROMPTS, Toy

from flowgrain import RunStopped, Trainer
from flowgrain.rewards import Scorer, http_client, score
from flowgrain.rewards.judge import Judge
from flowgrain.rewards.remote import Remote

MB = 2**20
OK = b"HTTP/1.1 200 OK\r\n"
BOMB = gzip.compress(bytes(200 * MB))
DEEP = "[" * 100_000 + "]" * 100_000


def scores(values):
    return answer(f'{{"scores": {values}}}')


def choices(text):
    return answer(f'{{"choices": {text}}}')


class Case(NamedTuple):
    """A behavior of a server, a part of the reason, and the rewards to which it applies."""

    behave: object
    reason: str
    rewards: tuple[str, ...] = ("remote", "judge")


REMOTE, JUDGE = ("remote",), ("judge",)
CASES = {
    "hangs": Case(send(then="hang"), "no complete answer within"),
    "closes at once": Case(send(), "cannot be used"),
    "resets": Case(send(then="reset"), "cannot be used"),
    "half a status line, then hangs": Case(send(b"HTTP/1.", then="hang"), "no complete answer"),
    "slow headers": Case(repeat(OK, b"X", every=0.05), "no complete answer within"),
    "slow header lines": Case(repeat(OK, b"X: 1\r\n", every=0.02), "within|100 headers"),
    "endless header lines": Case(repeat(OK, b"X: 1\r\n" * 50), "more than 100 headers"),
    "endless header": Case(repeat(OK, b"X" * 9999), "header line|cannot be used"),
    "endless 100 Continue": Case(
        repeat(b"", b"HTTP/1.1 100 Continue\r\n\r\n", every=0.01), "no complete answer"
    ),
    "headers, then hangs": Case(send(OK + b"Content-Length: 9\r\n\r\n", then="hang"), "within"),
    "drips": Case(repeat(OK + b"Content-Length: 999999\r\n\r\n", b" ", every=0.05), "within"),
    "drips chunks": Case(
        repeat(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", every=0.05), "within"
    ),
    "closes in the body": Case(send(OK + b"Content-Length: 99\r\n\r\n{"), "cannot be used"),
    "closes in a chunk": Case(
        send(OK + b"Transfer-Encoding: chunked\r\n\r\n63\r\n{"), "cannot be used"
    ),
    "garbage for a chunk": Case(
        send(OK + b"Transfer-Encoding: chunked\r\n\r\nhello\r\nworld\r\n"), "cannot be used"
    ),
    "gzip bomb": Case(answer(BOMB, Content_Encoding="gzip"), "more than 4194304 bytes"),
    "deflate bomb": Case(
        answer(zlib.compress(bytes(200 * MB)), Content_Encoding="deflate"), "more than 4194304"
    ),
    "bomb in an error": Case(answer(BOMB, "500 Oops", Content_Encoding="gzip"), "answered 500"),
    "damaged gzip": Case(answer(BOMB[20:], Content_Encoding="gzip"), "damaged compressed data"),
    "unknown encoding": Case(answer("x", Content_Encoding="br"), "in the encoding br"),
    "deep JSON": Case(answer(DEEP), "recursion limit"),
    "deep JSON in a field": Case(answer(f'{{"reason": {DEEP}}}'), "recursion limit"),
    "endless body": Case(repeat(OK + b"\r\n", bytes(MB)), "more than 4194304 bytes"),
    "10 GB": Case(
        repeat(OK + b"Content-Length: 10000000000\r\n\r\n", bytes(MB)), "more than 4194304 bytes"
    ),
    "endless chunks": Case(
        repeat(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + bytes(MB) + b"\r\n"),
        "more than 4194304 bytes",
    ),
    "empty body": Case(answer(""), "unusable answer"),
    "no content": Case(answer("", "204 No Content"), "answered 204"),
    "HTML": Case(answer("<html>Welcome", Content_Type="text/html"), "unusable answer"),
    "invalid UTF-8": Case(answer(b'{"scores": "\xff\xfe"}'), "unusable answer"),
    "an array": Case(answer("[1, 2]"), "unusable answer"),
    "a number": Case(answer("1" * 5000), "unusable answer"),
    "another object": Case(answer('{"points": [1, 2]}'), "Field required"),
    "redirect loop": Case(answer("", "307 Temporary Redirect", Location="/score"), "redirects to"),
    "redirect to another host": Case(
        answer("", "302 Found", Location="http://192.0.2.1/"), "redirects to http://192.0.2.1/"
    ),
    "500": Case(answer("out of memory", "500 Internal Server Error"), "500 .*: out of memory"),
    "500 with an endless body": Case(
        repeat(b"HTTP/1.1 500 Oops\r\n\r\n", bytes(MB)), "answered 500 Oops"
    ),
    "401": Case(answer("who are you", "401 Unauthorized"), "answered 401 .*who are you"),
    "404": Case(answer('{"detail": "no reward"}', "404 Not Found"), "answered 404 .*no reward"),
    "503": Case(answer("", "503 Service Unavailable"), "answered 503"),
    "503, come back in an hour": Case(
        answer("", "503 Service Unavailable", Retry_After=3600), "answered 503.* deadline=1.5 s"
    ),
    "429, come back at once": Case(
        answer("", "429 Too Many Requests", Retry_After=0), "answered 429.* deadline=1.5 s"
    ),
    "503 with an odd Retry-After": Case(answer("", "503 Oops", Retry_After="²"), "answered 503"),
    "terminal codes": Case(
        answer("\x1b[31mred\x07\r\nline", "500 Oops"), "answered 500 Oops: .*red"
    ),
    "not HTTP": Case(send(b"SSH-2.0-OpenSSH_9.6\r\n"), "cannot be used"),
    "status 99999": Case(answer("", "99999 Oops"), "cannot be used"),
    "one score": Case(scores("[1.0]"), "1 scores for 2 images", REMOTE),
    "three scores": Case(scores("[1, 2, 3]"), "3 scores for 2 images", REMOTE),
    "many scores": Case(scores("[" + "1," * 500_000 + "1]"), "500001 scores", REMOTE),
    "too many scores": Case(scores("[" + "1," * 5_000_000 + "1]"), "4194304 bytes", REMOTE),
    "no scores": Case(scores("[]"), "0 scores for 2 images", REMOTE),
    "NaN": Case(scores("[NaN, NaN]"), "without a finite score", REMOTE),
    "infinity": Case(scores("[Infinity, -Infinity]"), "without a finite score", REMOTE),
    "too large for float64": Case(scores("[1e999, -1e999]"), "without a finite score", REMOTE),
    "too large for float32": Case(scores("[1e39, -1e300]"), "without a finite score", REMOTE),
    "an integer of 4,000 digits": Case(
        scores(f"[{'9' * 4000}, 1{'0' * 400}]"), "unusable answer|finite", REMOTE
    ),
    "words": Case(scores('["good", "bad"]'), "scores.0: .*valid number", REMOTE),
    "lists": Case(scores("[[1], [2]]"), "scores.0: .*valid number", REMOTE),
    "an object": Case(scores('{"0": 1}'), "scores: .*valid array", REMOTE),
    "null with a reason": Case(
        answer('{"scores": [null, null], "reason": "out of memory"}'), "out of memory", REMOTE
    ),
    "no choice": Case(choices("[]"), "choices: ", JUDGE),
    "a choice without a message": Case(choices('[{"text": "5"}]'), "message: Field", JUDGE),
    "no content in the message": Case(
        choices('[{"message": {"content": null}}]'),
        "message.content: .*valid string",
        JUDGE,
    ),
    "a number as content": Case(
        choices('[{"message": {"content": 5}}]'), "message.content: .*valid string", JUDGE
    ),
    "content of 10 MB": Case(
        choices(json.dumps([{"message": {"content": "a" * 10 * MB}}])), "4194304 bytes", JUDGE
    ),
}
TABLE = [(name, reward) for name, case in CASES.items() for reward in case.rewards]
IMAGES = torch.rand(2, 3, 8, 8)


def client(kind, url, **options):
    options = {"timeout": 0.5, "deadline": 1.5, "retries": 1, "backoff": 0.01, **options}
    return Remote(url, "red", **options) if kind == "remote" else Judge(url, "model", **options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), TABLE, ids=[f"{k}-{n}" for n, k in TABLE])
def test_a_hostile_server_gives_a_reason_in_bounded_time_and_memory(name, kind, caplog, capfd):
    case = CASES[name]
    with HostileServer(case.behave) as server:
        reward = client(kind, server.url)
        tracemalloc.start()
        begin = time.monotonic()
        found = score(reward, IMAGES, ["a", "b"])
        seconds = time.monotonic() - begin
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert found.values.isnan().all()
    assert found.failed == 2
    assert server.url in found.reason
    with pytest.raises(AssertionError, match=case.reason):
        raise AssertionError(found.reason)
    assert found.reason.isprintable()
    assert len(found.reason) < 600
    assert seconds < 3
    assert peak < 40 * MB
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


def test_the_table_is_long_enough():
    assert len(CASES) >= 20


@pytest.mark.parametrize("kind", ["remote", "judge"])
def test_nobody_listens_and_no_such_host(kind):
    for url in ("http://127.0.0.1:9", "http://no-such-host.invalid"):
        found = score(client(kind, url), IMAGES, ["a", "b"])
        assert found.failed == 2
        assert url in found.reason
        assert "cannot be used" in found.reason


def scorer_of_a_step(reward, images, batch_size):
    with Scorer({"remote": reward}, {"remote": batch_size}, background=False) as scorer:
        scorer.submit(torch.rand(images, 3, 4, 4), ["a"] * images)
        return scorer.results()["remote"]


@pytest.mark.parametrize(
    ("behave", "requests", "seconds"),
    [(send(then="hang"), 3, 2.5), (answer("", "500 Oops"), 4, 1.5)],
    ids=["hangs", "500"],
)
def test_a_dead_server_is_given_up_for_the_rest_of_the_step(behave, requests, seconds):
    """4,632 images of a step need 73 requests. Only the first are sent."""
    with HostileServer(behave) as server:
        reward, begin = client("remote", server.url, timeout=0.7), time.monotonic()
        found = scorer_of_a_step(reward, 4632, 256)
        assert time.monotonic() - begin < seconds
        assert found.failed == 4632
        assert server.url in found.reason
        assert server.requests <= requests
        again = scorer_of_a_step(reward, 8, 4)  # the next step tries the server again
        assert again.failed == 8
        assert server.requests > requests - 1


def test_a_server_that_recovers_is_used_in_the_next_step():
    state = {"broken": True}

    def behave(connection, server):
        good = answer(json.dumps({"scores": [1.0] * 4}))
        (answer("", "500 Oops") if state["broken"] else good)(connection, server)

    with HostileServer(behave) as server:
        reward = client("remote", server.url, retries=0)
        assert scorer_of_a_step(reward, 12, 4).failed == 12
        state["broken"] = False
        assert scorer_of_a_step(reward, 12, 4).failed == 0


def test_scores_before_a_failure_are_kept():
    def behave(connection, server):
        good = answer('{"scores": [1.0, 2.0]}')
        (good if server.requests == 1 else answer("", "500 Oops"))(connection, server)

    with HostileServer(behave) as server:
        # Time is not what is tested, and other tests may use the processor.
        limits = {"timeout": 20.0, "deadline": 60.0}
        reward = client("remote", server.url, request_size=2, retries=0, **limits)
        found = score(reward, torch.rand(8, 3, 4, 4), ["a"] * 8)
        assert server.requests == 3
    assert found.values[:2].tolist() == [1, 2]
    assert (found.failed, found.gave_up) == (6, True)
    assert "answered 500 Oops" in found.reason


def test_a_busy_server_is_waited_for():
    """503 with Retry-After is not a failed attempt."""

    def behave(connection, server):
        busy = answer("", "503 Oops", Retry_After=0)
        (busy if server.requests < 5 else answer('{"scores": [1, 2]}'))(connection, server)

    with HostileServer(behave) as server:
        found = score(client("remote", server.url, retries=0, deadline=20), IMAGES, ["a", "b"])
    assert found.values.tolist() == [1, 2]


def test_a_waiting_time_after_many_retries_is_a_number():
    with HostileServer(answer("", "500 Oops")) as server:
        options = {"timeout": 1, "deadline": 1e300, "retries": 1100, "backoff": 1e-300}
        connection = http_client.Server(server.url, "NO_TOKEN", **options)
        call = http_client.ScoringCall(connection)
        with pytest.raises(http_client.ServerError, match="500 Oops"):
            call.post(b"{}", bytes)


def test_a_long_wait_is_reported(monkeypatch, caplog):
    monkeypatch.setattr(http_client, "NOTICE_SECONDS", 0.2)
    with HostileServer(send(then="hang")) as server:
        score(client("remote", server.url), IMAGES, ["a", "b"])
        notices = [r.getMessage() for r in caplog.records if "Waiting" in r.getMessage()]
        assert 1 <= len(notices) <= 4  # after .2, .4, .8 s
        assert server.url in notices[0]
        assert "deadline=1.5 s" in notices[0]


def test_a_run_names_the_failing_server_in_its_last_line(tiny, tmp_path):
    with HostileServer(answer("out of memory", "500 Oops")) as server:
        rewards = {"remote": client("remote", server.url)}
        given = {"backbone": Toy(), "prompts": PROMPTS, "eval_prompts": PROMPTS}
        message = rf"'remote' failed on .*{server.url}/score answered 500 Oops: out of memory"
        with pytest.raises(RunStopped, match=message) as error:
            Trainer(tiny, tmp_path, rewards=rewards, **given).train()
    assert "NaN" not in str(error.value)
    assert "\n" not in str(error.value)
