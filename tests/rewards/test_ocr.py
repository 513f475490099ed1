"""The OCR reward: quoted text, scores calculated by hand, and RapidOCR on images drawn here."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden.comparison import golden
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from flowgrain.data import as_prompts
from flowgrain.rewards import RewardConfig, build_reward, score
from flowgrain.rewards.ocr import OCR, joined, quoted, target_texts, text_score
from flowgrain.settings import SettingsError

pytest.importorskip("rapidfuzz")


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('A sign that says "Open Late".', ["Open Late"]),
        ("A sign that says \u201cOpen Late\u201d.", ["Open Late"]),
        ('"One" and \u201ctwo\u201d, then "three" on a wall', ["One", "two", "three"]),
        ("\u201eunten\u201c", ["unten"]),
        ("it's Bob's shop", []),
        ('an empty "" and a blank " " sign', []),
        ('one lonely " mark', []),
        ("\u201cit's 5 o'clock\u201d", ["it's 5 o'clock"]),
    ],
)
def test_quoted_text(prompt, texts):
    assert quoted(prompt) == texts


@pytest.mark.parametrize(
    ("read", "texts", "expected"),
    [
        ("Hello World", ["Hello World"], 1),
        ("helloworld", ["Hello World"], 1),
        ("SALE! Hello World 50%", ["Hello World"], 1),  # contained in a longer text
        ("Hallo World", ["Hello World"], 0.9),  # 1 of 10 letters
        ("Hello", ["Hello World"], 0.5),
        ("", ["Hello World"], 0),
        (
            "something else that is much longer",
            ["Hello"],
            0,
        ),  # more edits than letters: not below 0
        ("bread tea", ["tea", "bread"], 1),  # both, in another order
        ("xxx tea", ["tea", "bread"], 3 / 8),  # the letters of the text that was read
        ("teabred", ["tea", "bread"], 7 / 8),
    ],
)
def test_score_of_a_reading(read, texts, expected):
    assert text_score(read, texts) == pytest.approx(expected)


def test_without_a_quoted_text_there_is_no_score():
    assert math.isnan(text_score("Hello", []))
    assert math.isnan(text_score("Hello", ["  "]))


@given(st.text("ab c", max_size=12), st.text("abc", min_size=1, max_size=8))
def test_one_text_is_flow_grpos_formula(read, text):
    letters, target = read.replace(" ", "").lower(), text.replace(" ", "").lower()
    table = [list(range(len(target) + 1))]  # Levenshtein distance by its definition
    for i, a in enumerate(letters, 1):
        row = [i]
        for j, b in enumerate(target, 1):
            row.append(min(table[-1][j] + 1, row[-1] + 1, table[-1][j - 1] + (a != b)))
        table.append(row)
    distance = 0 if target in letters else min(table[-1][-1], len(target))
    assert text_score(read, [text]) == pytest.approx(1 - distance / len(target))


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        ('"One" and "two"', ["One"]),
        ('\u201cone\u201d below "two"', ["two"]),  # the published code knows straight quotes
        ("\u201cone\u201d below \u201ctwo\u201d", ["one"]),
        ('one lonely " mark', [" mark"]),  # as in the published code
        ('an empty "" and "two"', ["two"]),  # the published code divides by 0
        ("no quotes", []),
    ],
)
def test_the_first_quoted_text(prompt, first):
    assert target_texts(prompt, "first") == first
    assert target_texts(prompt, "all") == quoted(prompt)


def test_lines_of_confidence_0_do_not_count():
    assert joined([("Hello", 0.9), ("EXIT", 0), (" World", 0.1)]) == "Hello World"


class Engine:
    """A reader that returns the lines of golden cases, one after another, with their boxes."""

    def __init__(self, **threads):
        self.lines = iter([case["lines"] for case in golden("ocr_reward")["cases"]])

    def __call__(self, image, use_det, use_cls, use_rec):
        lines = [[[[0, 0]] * 4, *line] for line in next(self.lines)]
        return lines or None, [0.1]


@pytest.fixture
def golden_scores(monkeypatch):
    """Scores of all golden cases, by the options of the reward."""
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", SimpleNamespace(RapidOCR=Engine))
    prompts = as_prompts([case["prompt"] for case in golden("ocr_reward")["cases"]])

    def scores(**options):
        reward = build_reward(RewardConfig(name="ocr", **options))
        return reward(torch.zeros(len(prompts), 3, 8, 8), prompts)

    return scores


def test_first_is_the_published_reward(golden_scores):
    published = torch.tensor([case["reward"] for case in golden("ocr_reward")["cases"]])
    torch.testing.assert_close(golden_scores(texts="first"), published.float())


def test_all_differs_for_prompts_with_two_texts_only(golden_scores):
    cases = golden("ocr_reward")["cases"]
    published = torch.tensor([case["reward"] for case in cases])
    assert torch.equal(golden_scores(), golden_scores(texts="all"))
    different = (golden_scores() - published).abs() > 1e-6
    two = torch.tensor([case["prompt"].count('"') == 4 for case in cases])
    assert not different[~two].any()
    assert (int(different.sum()), int(two.sum())) == (12, 20)


def drawn(
    lines: dict[str, tuple[int, int]], height: int, width: int, size: int = 32
) -> torch.Tensor:
    """Black text on white, [3, height, width], each line at its x and y."""
    image = Image.new("RGB", (width, height), "white")
    for text, where in lines.items():
        ImageDraw.Draw(image).text(where, text, font=ImageFont.load_default(size), fill="black")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def line():
    pytest.importorskip("rapidocr_onnxruntime")
    return build_reward(RewardConfig(name="ocr", mode="line"))


def test_lines_are_read_exactly(line):
    texts = ["Hello World", "Open Late", "Spring 2024", "Fearless"]
    images = torch.stack([drawn({text: (8, 6)}, 48, 200) for text in texts])
    prompts = as_prompts([f'a sign saying "{text}"' for text in texts])
    assert line(images, prompts).tolist() == [1, 1, 1, 1]
    assert line(images[2:3], prompts[2:3]).tolist() == [1]  # alone as in a batch


def test_a_line_partly_right(line):
    images = drawn({"Hello Wurld": (8, 6)}, 48, 200)[None].repeat(3, 1, 1, 1)
    scores = score(line, images, ['"Hello World"', "\u201cHello\u201d", "no quoted text"])
    assert scores.values[:2].tolist() == pytest.approx([0.9, 1])
    assert scores.values[2].isnan()
    assert scores.failed == 1


def test_an_empty_line_scores_0(line):
    assert line(torch.ones(1, 3, 48, 200), as_prompts(['"Hello"'])).tolist() == [0]


def test_text_is_found_in_a_picture():
    pytest.importorskip("rapidocr_onnxruntime")
    reward = build_reward(RewardConfig(name="ocr"))
    images = torch.stack(
        [
            drawn({"Hello World": (30, 40), "open late": (80, 150)}, 224, 256),
            torch.full((3, 224, 256), 0.5),
        ]
    )
    prompts = ['A shop window with "Hello World" above "Open Late"', 'a grey wall with "Hello"']
    assert reward(images, as_prompts(prompts)).tolist() == [1, 0]


def test_failures_are_named(monkeypatch):
    message = r"rewards\[ocr\]\.mode='words': Input should be 'detect' or 'line'\. Options: mode"
    with pytest.raises(SettingsError, match=message):
        build_reward(RewardConfig(name="ocr", mode="words"))
    with pytest.raises(SettingsError, match=r"\.texts='last': Input should be 'first' or 'all'"):
        build_reward(RewardConfig(name="ocr", texts="last"))
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(SettingsError, match=r"RapidOCR cannot be .*pip install 'flowgrain\[ocr\]'"):
        OCR()
    with pytest.raises(SettingsError, match=r"rewards\[ocr\]: RapidOCR cannot be imported"):
        build_reward(RewardConfig(name="ocr"))
