"""The OCR reward: quoted text, scores calculated by hand, and RapidOCR on images drawn here."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from flowgrain.data import as_prompts
from flowgrain.rewards import RewardConfig, build_reward, score
from flowgrain.rewards.ocr import OCR, quoted, text_score
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
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(SettingsError, match=r"RapidOCR cannot be .*pip install 'flowgrain\[ocr\]'"):
        OCR()
    with pytest.raises(SettingsError, match=r"rewards\[ocr\]: RapidOCR cannot be imported"):
        build_reward(RewardConfig(name="ocr"))
