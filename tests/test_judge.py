"""The judge over HTTP, against a small server of its kind: answers, retries, stalls and nonsense."""

import base64
import http.server
import io
import json
import math
import threading

import pytest
import torch
from PIL import Image

from flowgrain.training.evaluate import mean
from flowgrain.rewards import Prompt, RewardSource, explained, load_reward, score
from flowgrain.rewards.judge import Judge, parse_points, parse_score, points_of


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with the image's mean red; how it misbehaves stands in the prompt."""

    tries: dict[str, int] = {}
    seen: list[dict] = []

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({**asked, "authorization": self.headers.get("Authorization"), "path": self.path})
        image, text = asked["messages"][0]["content"]
        prompt = text["text"]
        tries = self.tries[prompt] = self.tries.get(prompt, 0) + 1
        picture = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
        answer = f"It is fine. Score: {picture.getpixel((0, 0))[0] / 51:.2f}"
        if "stall" in prompt:
            threading.Event().wait(1.5)
        status = 500 if ("broken" in prompt or ("flaky" in prompt and tries < 3)) else 200
        body = json.dumps({"choices": [{"message": {"content": "I would rather not" if "silent" in prompt else answer}}]})
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
    yield f"http://127.0.0.1:{server.server_port}/v1#judge-7b"
    server.shutdown()


def test_scores_and_failures(address, monkeypatch):
    monkeypatch.setenv("FLOWGRAIN_JUDGE_TOKEN", "secret")
    judge = Judge(RewardSource(address), timeout=0.7, retries=2, backoff=0.01)
    prompts = ["a cat", "flaky", "broken", "silent", "lies", "stall"]
    images = torch.zeros(6, 3, 8, 8)
    images[:, 0] = torch.linspace(0, 1, 6)[:, None, None]
    found = score(judge, images, prompts)
    assert found.values[:2].tolist() == pytest.approx([0.0, 1.0], abs=0.01)
    assert found.values[2:].isnan().all()
    assert found.failed == 4
    assert Server.seen[0]["model"] == "judge-7b"
    assert Server.seen[0]["path"] == "/v1/chat/completions"
    assert Server.seen[0]["authorization"] == "Bearer secret"


def test_a_server_that_is_gone_masks_everything():
    judge = Judge(RewardSource("http://127.0.0.1:9/v1#gone"), retries=0, timeout=0.5)
    assert score(judge, torch.rand(2, 3, 4, 4), ["a", "b"]).failed == 2


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Score: 4", 4), ("**Final score:** 3.5", 3.5), ("score 1 ... no, Score: 2", 2), ("4.25", 4.25),
        ("Final Score (1-5): 4", 4), ("Score: 4/5", 4), ("Score: 4/10", math.nan), ("Score: 3 out of 5", 3),
        ("Alignment Score (1-5): 4.5\nCoherence Score (1-5): 4\nStyle Score (1-5): 3.5", 4), ("## Final Score: 2", 2),
        ("between 2 and 3", math.nan), ("Score: 9", math.nan), ("", math.nan), ("Score: -1", math.nan),
    ],
)  # fmt: skip
def test_answers_are_read(answer, value):
    assert parse_score(answer) == pytest.approx(value, nan_ok=True)


def test_the_question_is_ones_own(address, tmp_path):
    (tmp_path / "ask.txt").write_text('{"json": true} Is this {prompt}?')
    assert Judge(RewardSource(address, template=str(tmp_path / "ask.txt")))(torch.ones(1, 3, 4, 4), ["a cat"]).item() == 5
    with pytest.raises(ValueError, match=r"has no \{points\}"):
        load_reward("unigenbench", RewardSource(address, template=str(tmp_path / "ask.txt")))
    assert Server.seen[-1]["messages"][0]["content"][1]["text"] == '{"json": true} Is this a cat?'
    (tmp_path / "ask.txt").write_text("Is it good?")
    with pytest.raises(ValueError, match=r"has no \{prompt\}"):
        Judge(RewardSource(address, template=str(tmp_path / "ask.txt")))
    with pytest.raises(ValueError, match=r"judge_template: nowhere\.txt cannot be read"):
        Judge(RewardSource(address, template="nowhere.txt"))


def test_unifiedreward_counts_from_one(address):
    reward = load_reward("unifiedreward", RewardSource(address))
    images = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.8)])
    found = reward(images, ["a", "b"])
    assert found[0].isnan()  # .5 is no score of 1 to 5
    assert found[1] == pytest.approx(4.0, abs=0.02)


POINTS = [("Style", "in oil"), ("Attribute - Colour", "red"), ("Attribute - Size", "large")]


def test_unigenbench_by_dimension(address, monkeypatch):
    """Every point's verdict counts once in its primary dimension, however the points lie on prompts."""
    fields = {"sub_dims_en": json.dumps({"Testpoints": [n for n, _ in POINTS], "Testpoint Description": [d for _, d in POINTS]})}
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
    reward = load_reward("unigenbench", RewardSource(address))
    asked = []

    def answer(image, text):
        asked.append(text)
        return next((said for name, said in answers.items() if f"Text: {name}" in text), None)

    monkeypatch.setattr(reward, "_answer", answer)
    scores, parts, weights = explained(reward, torch.zeros(6, 3, 4, 4), prompts)
    assert scores.values[:2].tolist() == pytest.approx([2 / 3, 0])
    assert scores.values[2:].isnan().all()
    assert mean(parts["Attribute"].numpy(), weights["Attribute"].numpy()) == pytest.approx(1 / 3)  # 0, 1, and 0
    assert mean(parts["Style"].numpy(), weights["Style"].numpy()) == 1
    assert len(asked) == 4
    assert "2. Attribute - Colour: red" in next(text for text in asked if "Text: one" in text)
    with pytest.raises(ValueError, match="test points of 'x' cannot be read"):
        points_of(Prompt("x", {"sub_dims_en": "{}"}))


@pytest.mark.parametrize(
    ("answer", "count", "found"),
    [("[1, 0]", 2, [1, 0]), ("[1] then [0,1]", 2, [0, 1]), ("[1,2]", 2, None), ("1, 0", 2, None), ("<score>[1]</score>", 1, [1])],
)
def test_verdicts_are_read(answer, count, found):
    assert parse_points(answer, count) == found


def test_an_address_is_needed():
    with pytest.raises(ValueError, match="write judge=http"):
        load_reward("judge")
