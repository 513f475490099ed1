"""The commands `serve` and `encode`."""

import pytest
import twins
import uvicorn
from command_line import refused, succeeded
from fastapi.testclient import TestClient

PLUGIN = """
from flowgrain import register_reward

@register_reward("served_brightness")
def brightness(images, prompts, *, target: float = 0.5):
    return -(images.mean((1, 2, 3)) - target).abs()
"""


@pytest.fixture
def served(monkeypatch):
    """The application and the port of every server that was started."""
    calls = []

    def run(server, sockets):
        calls.append((server.config.app, sockets[0].getsockname()[1]))

    monkeypatch.setattr(uvicorn.Server, "run", run)
    return calls


def test_serve(served, directory, monkeypatch):
    (directory / "plugin.py").write_text(PLUGIN)
    monkeypatch.setenv("FLOWGRAIN_TOKEN", "secret")
    words = ("towers", "{name: served_brightness, target: 0.25}", "--port", "0")
    output = succeeded("serve", *words, "--plugin", "plugin.py")
    ((application, port),) = served
    assert output == f"serving towers, served_brightness on http://127.0.0.1:{port}\n"
    headers = {"authorization": "Bearer secret"}
    client = TestClient(application)
    assert client.get("/health").status_code == 401
    health = client.get("/health", headers=headers).json()
    assert health["rewards"] == ["served_brightness", "towers"]


def test_serve_without_a_token(served, monkeypatch):
    monkeypatch.delenv("FLOWGRAIN_TOKEN", raising=False)
    assert "without a token" in succeeded("serve", "towers", "--port", "0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "there is no reward 'nothing'"),
        (["towers", "towers"], "towers is listed twice"),
        (["{name: towers, path: x}"], "unknown option"),
        (["{weight: 1}"], "name: Field required"),
        (["{name: towers"], "not a YAML value"),
        (["towers,preference"], "'towers,preference': not one reward. Separate rewards by spaces"),
        ([""], "'': an empty word. Write a name or a path"),
        (["{name: towers, weight: 0}"], "weight: the reward would have no effect"),
    ],
)
def test_rewards_that_cannot_be_served(served, words, message):
    found = refused("serve", *words)
    assert message in found
    assert "Value error" not in found
    assert served == []


def test_encode(directory):
    twins.flux(directory / "flux")
    (directory / "train.txt").write_text("a red cat\ntwo blue dogs\na red cat\n")
    (directory / "test.txt").write_text("a green bird\n")
    words = (
        "flux/g2rpo",
        "model.path=flux",
        "model.height=8",
        "model.width=8",
        "model.max_prompt_tokens=16",
        "data.prompts=train.txt",
        "data.eval_prompts=test.txt",
    )
    output = succeeded("encode", *words, "model.embedding_cache=cache")
    assert output == "The embeddings of 4 prompts are in cache.\n"
    assert len([path for path in (directory / "cache").rglob("*") if path.is_file()]) == 4


def test_nothing_to_encode():
    assert "model.embedding_cache=None" in refused("encode", "g2rpo")
