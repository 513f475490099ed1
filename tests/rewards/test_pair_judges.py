"""Pairwise judges: the difference of scores, and a chat server that gives good and bad answers."""

import base64
import http.server
import io
import json
import math
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flowgrain.data import Prompt
from flowgrain.rewards import RewardConfig, Unscored, build_reward, score
from flowgrain.rewards.pair_judges import ChatJudge, ScoreDifference, parse_choice

MODEL = "judge-7b"


def group(values):
    """Images whose brightness is `values`."""
    return torch.tensor(values)[:, None, None, None].repeat(1, 3, 2, 2)


def red_of(part):
    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    return Image.open(io.BytesIO(data)).getpixel((0, 0))[0]


class Server(http.server.BaseHTTPRequestHandler):
    """Prefers the brighter image. The prompt says how the server misbehaves."""

    seen: list[dict] = []
    open = most_open = 0
    lock = threading.Lock()

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            Server.open += 1
            Server.most_open = max(self.open, self.most_open)
            self.seen.append({**request, "authorization": self.headers.get("Authorization")})
        first, second, text = request["messages"][0]["content"]
        a, b = red_of(first), red_of(second)
        prompt = text["text"]
        content = "tie" if a == b else "A" if a > b else "B"
        if "chatty" in prompt:
            content = f"The light differs.\n\n**{content}**."
        if "vague" in prompt and 255 in (a, b):
            content = "Both are nice, A or B"
        if "slow" in prompt:
            time.sleep(0.05)
        broken = "broken" in prompt or ("partly" in prompt and 0 in (a, b))
        body = json.dumps({"choices": [{"message": {"content": content}}]})
        self.send_response(500 if broken else 200)
        self.end_headers()
        self.wfile.write((body if "lies" not in prompt else "[]").encode())
        with self.lock:
            Server.open -= 1

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Server.seen, Server.open, Server.most_open = [], 0, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def build(address, pairwise=None, **options):
    judge = {"name": "chat", "url": address, "model": MODEL, "retries": 0, **options}
    return build_reward(RewardConfig(name="pairwise", judge=judge, **(pairwise or {})))


@pytest.mark.parametrize("prompt", ["a cat", "chatty"])
def test_the_server_sees_both_images(address, monkeypatch, prompt):
    monkeypatch.setenv("FLOWGRAIN_JUDGE_TOKEN", "secret")
    values = [0.2, 0.8, 0.4, 0.8]
    scores = score(build(address), group(values), [prompt] * 4)
    assert scores.values.tolist() == pytest.approx([0, 2.5 / 3, 1 / 3, 2.5 / 3])
    assert scores.reason is None
    assert len(Server.seen) == 6
    request = Server.seen[0]
    assert request["model"] == MODEL
    assert request["temperature"] == 0
    assert request["authorization"] == "Bearer secret"
    assert f"Text: {prompt}\n" in request["messages"][0]["content"][2]["text"]


def test_both_orders_are_two_requests(address):
    score(build(address, {"both_orders": True}), group([0.2, 0.8]), ["a cat"] * 2)
    shown = [[red_of(p) for p in s["messages"][0]["content"][:2]] for s in Server.seen]
    assert sorted(shown) == [[51, 204], [204, 51]]


def test_the_question_can_be_replaced(address, tmp_path):
    template = tmp_path / "ask.txt"
    template.write_text("A or B for {prompt}?")
    score(build(address, template=str(template)), group([0.2, 0.8]), ["a cat"] * 2)
    assert Server.seen[0]["messages"][0]["content"][2]["text"] == "A or B for a cat?"


def test_an_unreadable_answer_is_no_loss(address):
    """The brightest image gets no readable answer, the others are compared without it."""
    scores = score(build(address), group([0.2, 1.0, 0.4]), ["vague"] * 3)
    assert scores.values[[0, 2]].tolist() == [0, 1]
    assert scores.values[1].isnan()
    assert scores.reason.endswith("answered 'Both are nice, A or B', not A, B or tie")
    assert not scores.gave_up


def test_a_server_error_masks_its_pairs(address):
    reward = build(address, concurrency=3)
    scores = score(reward, group([0.0, 0.5, 0.7, 0.9]), ["partly"] * 4)
    assert scores.values[1:].tolist() == [0, 0.5, 1]
    assert scores.values[0].isnan()
    assert "500" in scores.reason


@pytest.mark.parametrize(
    ("prompt", "reason"), [("broken", "answered 500"), ("lies", "unusable answer")]
)
def test_a_dead_server_is_given_up(address, prompt, reason):
    """After 2 * concurrency failures in a row. The second prompt causes no request."""
    reward = build(address, concurrency=2)
    images = group(np.linspace(0.1, 0.9, 6)).repeat(2, 1, 1, 1)
    scores = score(reward, images, [prompt] * 6 + ["a cat"] * 6)
    assert scores.values.isnan().all()
    assert scores.gave_up
    assert reason in scores.reason
    assert len(Server.seen) <= 5  # one more may have started


def test_requests_and_pairs_are_bounded(address):
    reward = build(address, {"pairs_per_call": 4}, concurrency=3)
    calls, judge = [], reward.judge

    def counted(images, pairs, prompt):
        calls.append(len(pairs))
        return judge(images, pairs, prompt)

    reward.judge = counted
    scores = score(reward, group(np.linspace(0.1, 0.9, 5)), ["slow"] * 5)
    assert scores.values.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert calls == [4, 4, 2]
    assert 1 < Server.most_open <= 3


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("A", 1), (" b.\n", 0), ("TIE", 0.5), ("**A**", 1), ("'B'", 0), ("Because.\n\nA", 1),
        ("", math.nan), ("A or B", math.nan), ("Answer: A", math.nan), ("AB", math.nan),
        ("A\nbecause it is red", math.nan), ("Image A", math.nan), ("no tie", math.nan),
    ],
)  # fmt: skip
def test_choices_are_read_strictly(answer, value):
    assert parse_choice(answer) == pytest.approx(value, nan_ok=True)


@given(st.text())
def test_any_text_is_a_choice_or_nan(answer):
    assert math.isnan(parse_choice(answer)) or parse_choice(answer) in (0, 0.5, 1)


def test_a_subclass_can_read_other_answers():
    class Numbered(ChatJudge):
        answers = ("Image 1 is better", "Image 2 is better", "Both are equal")

    assert parse_choice("I see.\nImage 2 is better", Numbered.answers) == 0


def test_the_preference_is_logistic_in_the_score():
    calls = []

    def scores_of(images, prompts):
        calls.append(len(images))
        return images.mean((1, 2, 3))

    judge, images = ScoreDifference("oracle"), group([0.1, 0.9, 0.5])
    judge.reward = scores_of
    pairs = np.array([[0, 1], [1, 2], [2, 2]])
    expected = torch.sigmoid(torch.tensor([-0.8, 0.4, 0.0]))
    found = judge(images, pairs, Prompt("a"))
    torch.testing.assert_close(found.float(), expected)
    assert torch.equal(judge(images, pairs, Prompt("a")), found)
    assert calls == [3]  # one for both calls of a group
    judge(images.clone(), pairs, Prompt("a"))
    assert calls == [3, 3]


def test_a_reward_that_fails_on_an_image_masks_its_pairs():
    judge, images = ScoreDifference("oracle"), group([0.1, 0.9, 0.5])
    judge.reward = lambda images, prompts: [0.0, math.nan, 1.0]
    with pytest.raises(Unscored) as error:
        judge(images, np.array([[0, 1], [0, 2]]), Prompt("a"))
    assert error.value.result.isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", ["preference", "towers"])
def test_wins_by_a_bundled_reward_have_the_order_of_its_scores(name):
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt("two red circles")] * 6
    reward = build_reward(RewardConfig(name="pairwise", judge={"name": "score", "reward": name}))
    single = score(build_reward(RewardConfig(name=name)), images, prompts).values
    rates = score(reward, images, prompts).values
    assert rates.argsort().tolist() == single.argsort().tolist()
    assert sorted(rates.tolist()) == pytest.approx([i / 5 for i in range(6)])
