"""Rewards as a service: exact scores through it, its limits, and a server that dies, stalls or lies."""

import base64
import threading
import time

import pytest
import requests
import torch
import uvicorn

from flowgrain.rewards import Prompt, RewardSource, fields_of, load_reward, score
from flowgrain.rewards.service import TOKEN, Remote, service


def red(images, prompts):
    return images[:, 0].mean((1, 2)) + torch.tensor([float(len(p)) for p in prompts])


def partly(images, prompts):
    return [float("nan") if "bad" in p else 1.0 for p in prompts]


def wanted(images, prompts):
    return [len(fields_of(prompt).get("include", [])) for prompt in prompts]


def slow(images, prompts):
    time.sleep(1.5)
    return [0.0] * len(prompts)


@pytest.fixture(scope="module")
def address():
    config = uvicorn.Config(
        service({"red": red, "partly": partly, "slow": slow, "wanted": wanted}, "secret", max_images=4, max_bytes=100_000),
        port=0,
        log_level="error",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.time() + 30
    while not server.started and time.time() < deadline:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv(TOKEN, "secret")


@pytest.mark.parametrize(("encoding", "tolerance"), [("raw", 0), ("png", 0.5 / 255)])
def test_scores_are_those_in_line(address, encoding, tolerance):
    images, prompts = torch.rand(7, 3, 8, 6), [str(10**i) for i in range(7)]
    remote = Remote(RewardSource(f"{address}#red"), batch=3, encoding=encoding)
    torch.testing.assert_close(remote(images, prompts), red(images, prompts), atol=tolerance + 1e-7, rtol=0)


def test_fields_of_prompts_come_through(address):
    prompts = [Prompt("a", {"include": [{"class": "cat"}, {"class": "dog"}], "tag": "two"}), "b"]
    assert Remote(RewardSource(f"{address}#wanted"))(torch.rand(2, 3, 4, 4), prompts).tolist() == [2, 0]
    both = {"reward": "wanted", "prompts": ["a"], "fields": [{}, {}], "png": [""]}
    answer = requests.post(f"{address}/score", json=both, headers={"Authorization": "Bearer secret"}, timeout=10)
    assert (answer.status_code, answer.json()["detail"]) == (422, "2 fields for 1 prompts")


def test_masked_scores_come_through(address):
    found = score(load_reward("remote", RewardSource(f"{address}#partly")), torch.rand(3, 3, 4, 4), ["a", "bad", "c"])
    assert found.values.isnan().tolist() == [False, True, False]


def test_a_server_that_stalls_or_is_gone_masks(address):
    for where in (f"{address}#slow", "http://127.0.0.1:9#red", f"{address}#none"):
        remote = Remote(RewardSource(where), timeout=0.4, retries=1, backoff=0.01)
        assert score(remote, torch.rand(2, 3, 4, 4), ["a", "b"]).failed == 2


def test_a_server_that_lies_masks(address, monkeypatch):
    remote = Remote(RewardSource(f"{address}#red"))
    for body in ({"scores": [1.0]}, {"scores": ["good", "bad"]}, {"points": [1, 2]}, [1, 2]):
        answer = requests.Response()
        answer.status_code = 200
        monkeypatch.setattr(answer, "json", lambda body=body: body)
        monkeypatch.setattr(remote.session, "post", lambda *_, answer=answer, **__: answer)
        assert score(remote, torch.rand(2, 3, 4, 4), ["a", "b"]).failed == 2


def test_limits_and_bad_requests(address):
    bearer = {"Authorization": "Bearer secret"}
    raw = {"shape": [1, 3, 2, 2], "data": base64.b64encode(b"\0" * 48).decode()}

    def status(question, headers=bearer):
        return requests.post(f"{address}/score", json=question, headers=headers, timeout=10).status_code

    assert status({"reward": "red", "prompts": ["a"], "raw": raw}) == 200
    assert status({"reward": "red", "prompts": ["a"], "raw": raw}, headers={}) == 401
    assert status({"reward": "blue", "prompts": ["a"], "raw": raw}) == 404
    assert status({"reward": "red", "prompts": ["a"] * 5, "raw": raw}) == 413
    assert status({"reward": "red", "prompts": ["a" * 200_000], "raw": raw}) == 413
    assert status({"reward": "red", "prompts": ["a", "b"], "raw": raw}) == 422
    assert status({"reward": "red", "prompts": ["a"]}) == 422
    assert status({"reward": "red", "prompts": ["a"], "png": ["no picture"]}) == 422
    assert status({"reward": "red", "prompts": ["a"], "raw": {**raw, "shape": [1, 3, 9, 9]}}) == 422
    assert requests.get(f"{address}/health", headers=bearer, timeout=10).json()["rewards"] == ["partly", "red", "slow", "wanted"]


def test_an_address_is_needed():
    with pytest.raises(ValueError, match="write remote=http"):
        load_reward("remote")
