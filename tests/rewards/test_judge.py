"""Judges over HTTP, against a small server: answers, retries, timeouts and wrong responses."""

import base64
import hashlib
import http.server
import io
import json
import math
import threading

import pytest
import torch
from PIL import Image

from flowgrain.data import Prompt, as_prompts
from flowgrain.rewards import REWARDS, RewardConfig, build_reward, score, score_with_parts
from flowgrain.rewards.http_client import ServerError
from flowgrain.rewards.judge import Judge, parse_score
from flowgrain.rewards.unigenbench import parse_points, read_points
from flowgrain.settings import SettingsError


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with the red value of the first pixel. The prompt says how the server misbehaves."""

    tries: dict[str, int] = {}
    seen: list[dict] = []

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(
            {**request, "authorization": self.headers.get("Authorization"), "path": self.path}
        )
        image, text = request["messages"][0]["content"]
        prompt = text["text"]
        tries = self.tries[prompt] = self.tries.get(prompt, 0) + 1
        picture = Image.open(
            io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2]))
        )
        answer = f"It is fine. Score: {picture.getpixel((0, 0))[0] / 51:.2f}"
        if "stall" in prompt:
            threading.Event().wait(1.5)
        status = 500 if ("broken" in prompt or ("flaky" in prompt and tries < 3)) else 200
        content = "I would rather not" if "silent" in prompt else answer
        body = json.dumps({"choices": [{"message": {"content": content}}]})
        if "lies" in prompt:
            body = "<html>"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Server.tries, Server.seen = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


MODEL = "judge-7b"
DIGESTS = ["2cd79acd4ee9", "2ac421e36635", "675a47dba2df"]


def build(name, url, **options):
    return build_reward(RewardConfig(name=name, url=url, model=MODEL, **options))


def test_scores_and_failures(address, monkeypatch):
    monkeypatch.setenv("FLOWGRAIN_JUDGE_TOKEN", "secret")
    judge = Judge(address, MODEL, timeout=0.7, retries=2, backoff=0.01)
    prompts = ["a cat", "flaky", "broken", "silent", "lies", "stall"]
    images = torch.zeros(6, 3, 8, 8)
    images[:, 0] = torch.linspace(0, 1, 6)[:, None, None]
    scores = score(judge, images, prompts)
    assert scores.values[:2].tolist() == pytest.approx([0.0, 1.0], abs=0.01)
    assert scores.values[2:].isnan().all()
    assert scores.failed == 4
    assert Server.seen[0]["model"] == "judge-7b"
    assert Server.seen[0]["path"] == "/v1/chat/completions"
    assert Server.seen[0]["authorization"] == "Bearer secret"


def test_a_server_that_is_gone_gives_no_scores():
    judge = Judge("http://127.0.0.1:9/v1", MODEL, retries=0, timeout=0.5)
    assert score(judge, torch.rand(2, 3, 4, 4), ["a", "b"]).failed == 2


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Score: 4", 4), ("**Final score:** 3.5", 3.5), ("score 1 ... no, Score: 2", 2),
        ("4.25", 4.25), ("Final Score (1-5): 4", 4), ("Score: 4/5", 4), ("Score: 4/10", math.nan),
        ("Score: 3 out of 5", 3), ("## Final Score: 2", 2),
        ("Alignment Score (1-5): 4.5\nCoherence Score (1-5): 4\nStyle Score (1-5): 3.5", 4),
        ("between 2 and 3", math.nan), ("Score: 9", math.nan), ("", math.nan),
        ("Score: -1", math.nan),
    ],
)  # fmt: skip
def test_answers_are_read(answer, value):
    assert parse_score(answer) == pytest.approx(value, nan_ok=True)


def test_the_question_can_be_replaced(address, tmp_path):
    template = tmp_path / "ask.txt"
    template.write_text('{"json": true} Is this {prompt}?')
    judge = build("judge", address, template=str(template))
    assert judge(torch.ones(1, 3, 4, 4), [Prompt("a cat")]).item() == 5
    message = r"rewards\[unigenbench\]\.template=.*ask\.txt: the text has no \{points\}"
    with pytest.raises(SettingsError, match=message):
        build("unigenbench", address, template=str(template))
    assert Server.seen[-1]["messages"][0]["content"][1]["text"] == '{"json": true} Is this a cat?'
    template.write_text("Is it good?")
    with pytest.raises(ValueError, match=r"has no \{prompt\}"):
        Judge(address, MODEL, template=str(template))
    with pytest.raises(ValueError, match=r"template=nowhere\.txt: cannot be read"):
        Judge(address, MODEL, template="nowhere.txt")


def test_the_default_questions_are_unchanged():
    """Scores of a judge depend on every word of its question."""
    questions = [REWARDS.get(name).question for name in ("judge", "unifiedreward", "unigenbench")]
    digests = [hashlib.sha256(question.encode()).hexdigest()[:12] for question in questions]
    assert digests == DIGESTS


def test_unifiedreward_counts_from_one(address):
    reward = build("unifiedreward", address)
    images = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.8)])
    scores = reward(images, as_prompts(["a", "b"]))
    assert scores[0].isnan()  # 0.5 is below 1
    assert scores[1] == pytest.approx(4.0, abs=0.02)


POINTS = [("Style", "in oil"), ("Attribute - Colour", "red"), ("Attribute - Size", "large")]


def test_unigenbench_by_dimension(address, monkeypatch):
    """Each test point counts once in its primary dimension, whatever its prompt."""
    fields = {
        "sub_dims_en": json.dumps(
            {"Testpoints": [n for n, _ in POINTS], "Testpoint Description": [d for _, d in POINTS]}
        )
    }
    own = {"test_points": [{"dimension": "Attribute - Size", "description": "tiny"}]}
    prompts = [
        Prompt("one", fields),
        Prompt("two", own),
        "bare",
        Prompt("lies", fields),
        Prompt("half", fields),
        Prompt("x", {"sub_dims_en": "{}"}),
    ]
    answers = {"one": "Thus: [1, 0, 1]", "two": "[0]", "half": "[1, 0]"}
    reward = build("unigenbench", address)
    questions = []

    def ask(call, image, text):
        questions.append(text)
        for name, said in answers.items():
            if f"Text: {name}" in text:
                return said
        raise ServerError("gone")

    monkeypatch.setattr(reward, "ask", ask)
    scores, parts, weights = score_with_parts(reward, torch.zeros(6, 3, 4, 4), prompts)
    assert scores.values[:2].tolist() == pytest.approx([2 / 3, 0])
    assert scores.values[2:].isnan().all()
    means = {
        name: (parts[name].nan_to_num(0) * weights[name]).sum() / weights[name].sum()
        for name in parts
    }
    assert means["Attribute"].item() == pytest.approx(1 / 3)  # points 0, 1 and 0
    assert means["Style"].item() == 1
    assert all(weights[name][parts[name].isnan()].sum() == 0 for name in parts)
    assert len(questions) == 4
    assert "2. Attribute - Colour: red" in next(text for text in questions if "Text: one" in text)
    with pytest.raises(ValueError, match="test points of 'x' cannot be read"):
        read_points(Prompt("x", {"sub_dims_en": "{}"}))


@pytest.mark.parametrize(
    ("answer", "count", "values"),
    [
        ("[1, 0]", 2, [1, 0]),
        ("[1] then [0,1]", 2, [0, 1]),
        ("[1,2]", 2, None),
        ("1, 0", 2, None),
        ("<score>[1]</score>", 1, [1]),
    ],
)
def test_verdicts_are_read(answer, count, values):
    assert parse_points(answer, count) == values


def test_an_address_is_needed():
    with pytest.raises(SettingsError, match=r"rewards\[judge\]\.url: this option is required"):
        build_reward(RewardConfig(name="judge", model=MODEL))
    with pytest.raises(SettingsError, match=r"rewards\[judge\]\.url=h:1: not an HTTP address"):
        build("judge", "h:1")
