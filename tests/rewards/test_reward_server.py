"""A reward server and its client: exact scores, limits, and servers that die, stall or lie."""

import base64
import threading
import time

import pytest
import requests
import torch
import uvicorn
from fastapi.testclient import TestClient

from flowgrain.data import Prompt, as_prompts
from flowgrain.rewards import RewardConfig, build_reward, score
from flowgrain.rewards.messages import TOKEN_VARIABLE
from flowgrain.rewards.remote import Remote
from flowgrain.rewards.server import reward_app
from flowgrain.settings import SettingsError


def red(images, prompts):
    return images[:, 0].mean((1, 2)) + torch.tensor([float(len(p.text)) for p in prompts])


def partly(images, prompts):
    return [float("nan") if "bad" in prompt.text else 1.0 for prompt in prompts]


def counting(images, prompts):
    return [len(prompt.fields.get("include", [])) for prompt in prompts]


def slow(images, prompts):
    time.sleep(1.5)
    return [0.0] * len(prompts)


@pytest.fixture(scope="module")
def address():
    rewards = {"red": red, "partly": partly, "slow": slow, "counting": counting}
    app = reward_app(rewards, "secret", max_images=4, max_bytes=100_000)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
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
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")


@pytest.mark.parametrize(("encoding", "tolerance"), [("raw", 0), ("png", 0.5 / 255)])
def test_remote_scores_are_the_local_scores(address, encoding, tolerance):
    images, prompts = torch.rand(7, 3, 8, 6), as_prompts([str(10**i) for i in range(7)])
    remote = Remote(address, "red", request_size=3, encoding=encoding)
    expected = red(images, prompts)
    torch.testing.assert_close(remote(images, prompts), expected, atol=tolerance + 1e-7, rtol=0)


def test_fields_of_prompts_are_sent(address):
    fields = {"include": [{"class": "cat"}, {"class": "dog"}], "tag": "two"}
    prompts = as_prompts([Prompt("a", fields), "b"])
    assert Remote(address, "counting")(torch.rand(2, 3, 4, 4), prompts).tolist() == [2, 0]
    both = {"reward": "counting", "prompts": ["a"], "fields": [{}, {}], "png": [""]}
    headers = {"Authorization": "Bearer secret"}
    response = requests.post(f"{address}/score", json=both, headers=headers, timeout=10)
    assert (response.status_code, response.json()["detail"]) == (422, "2 fields for 1 prompts")


def test_missing_scores_are_sent(address):
    config = RewardConfig(name="remote", url=f"{address}/", reward="partly")
    scores = score(build_reward(config), torch.rand(3, 3, 4, 4), ["a", "bad", "c"])
    assert scores.values.isnan().tolist() == [False, True, False]


def test_a_server_that_stalls_or_is_gone_gives_no_scores(address):
    for url, reward in ((address, "slow"), ("http://127.0.0.1:9", "red"), (address, "none")):
        remote = Remote(url, reward, timeout=0.4, retries=1, backoff=0.01)
        assert score(remote, torch.rand(2, 3, 4, 4), ["a", "b"]).failed == 2


def test_limits_and_bad_requests(address):
    bearer = {"Authorization": "Bearer secret"}
    raw = {"shape": [1, 3, 2, 2], "data": base64.b64encode(b"\0" * 48).decode()}

    def status(body, headers=bearer):
        return requests.post(f"{address}/score", json=body, headers=headers, timeout=10).status_code

    assert status({"reward": "red", "prompts": ["a"], "raw": raw}) == 200
    assert status({"reward": "red", "prompts": ["a"], "raw": raw}, headers={}) == 401
    wrong = {"Authorization": "Bearer s\xe9cret".encode()}  # not ASCII
    assert status({"reward": "red", "prompts": ["a"], "raw": raw}, headers=wrong) == 401
    assert status({"reward": "blue", "prompts": ["a"], "raw": raw}) == 404
    assert status({"reward": "red", "prompts": ["a"] * 5, "raw": raw}) == 413
    assert status({"reward": "red", "prompts": ["a" * 200_000], "raw": raw}) == 413
    assert status({"reward": "red", "prompts": ["a", "b"], "raw": raw}) == 422
    assert status({"reward": "red", "prompts": ["a"]}) == 422
    assert (
        status({"reward": "red", "prompts": [], "raw": {"shape": [0, 3, 2, 2], "data": ""}}) == 422
    )
    assert status({"reward": "red", "prompts": ["a"], "png": ["not an image"]}) == 422
    assert status({"reward": "red", "prompts": ["a"], "raw": {**raw, "shape": [1, 3, 9, 9]}}) == 422
    health = requests.get(f"{address}/health", headers=bearer, timeout=10).json()
    assert health["rewards"] == ["counting", "partly", "red", "slow"]


def test_a_server_needs_fastapi(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fastapi", None)
    with pytest.raises(SettingsError, match=r"pip install 'flowgrain\[serve\]'"):
        reward_app({"red": red})


def test_an_address_is_needed():
    with pytest.raises(SettingsError, match=r"rewards\[remote\]\.url: this option is required"):
        build_reward(RewardConfig(name="remote", reward="red"))
    message = r"rewards\[remote\]\.url=host:8600: not an HTTP address\. .* http://HOST:8600"
    with pytest.raises(SettingsError, match=message):
        build_reward(RewardConfig(name="remote", url="host:8600", reward="red"))


def test_health_sends_identities():
    identities = {"red": {"name": "red", "torch": "1"}}
    client = TestClient(reward_app({"red": red}, identities=identities))
    assert client.get("/health").json()["identities"] == identities
    assert TestClient(reward_app({"red": red})).get("/health").json()["identities"] == {}
