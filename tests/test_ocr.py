"""The OCR reward: quoted text, the score by hand, and RapidOCR's models reading pictures that are drawn here."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from flowgrain import SettingsError
from flowgrain.rewards import RewardSource, load_reward, score
from flowgrain.rewards.ocr import OCR, quoted, text_score
from flowgrain.config.schema import settings
from flowgrain.training.trainer import Run

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
        ("SALE! Hello World 50%", ["Hello World"], 1),  # contained, however much there is besides
        ("Hallo World", ["Hello World"], 0.9),  # 1 of 10 letters
        ("Hello", ["Hello World"], 0.5),
        ("", ["Hello World"], 0),
        ("something else that is much longer", ["Hello"], 0),  # more edits than letters: 0, not below
        ("bread tea", ["tea", "bread"], 1),  # both are there, in another order
        ("xxx tea", ["tea", "bread"], 3 / 8),  # the letters of the one that is there
        ("teabred", ["tea", "bread"], 7 / 8),
    ],
)
def test_score_of_a_reading(read, texts, expected):
    assert text_score(read, texts) == pytest.approx(expected)


def test_nothing_wanted_is_no_score():
    assert math.isnan(text_score("Hello", []))
    assert math.isnan(text_score("Hello", ["  "]))


@given(st.text("ab c", max_size=12), st.text("abc", min_size=1, max_size=8))
def test_one_text_is_flow_grpos_formula(read, text):
    there, wanted = read.replace(" ", "").lower(), text.replace(" ", "").lower()
    table = [list(range(len(wanted) + 1))]  # Levenshtein's, by its definition
    for i, a in enumerate(there, 1):
        row = [i]
        for j, b in enumerate(wanted, 1):
            row.append(min(table[-1][j] + 1, row[-1] + 1, table[-1][j - 1] + (a != b)))
        table.append(row)
    distance = 0 if wanted in there else min(table[-1][-1], len(wanted))
    assert text_score(read, [text]) == pytest.approx(1 - distance / len(wanted))


def drawn(lines: dict[str, tuple[int, int]], height: int, width: int, size: int = 32) -> torch.Tensor:
    """Black text on white, [3, height, width], each line at its x and y."""
    image = Image.new("RGB", (width, height), "white")
    for text, where in lines.items():
        ImageDraw.Draw(image).text(where, text, font=ImageFont.load_default(size), fill="black")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def line():
    pytest.importorskip("rapidocr_onnxruntime")
    return load_reward("ocr", RewardSource("line"))


def test_lines_are_read_exactly(line):
    texts = ["Hello World", "Open Late", "Spring 2024", "Fearless"]
    images = torch.stack([drawn({text: (8, 6)}, 48, 200) for text in texts])
    assert line(images, [f'a sign saying "{text}"' for text in texts]).tolist() == [1, 1, 1, 1]
    again = line(images[2:3], ['a sign saying "Spring 2024"'])
    assert again.tolist() == [1]  # alone as among others


def test_a_line_partly_right(line):
    images = drawn({"Hello Wurld": (8, 6)}, 48, 200)[None].repeat(3, 1, 1, 1)
    found = score(line, images, ['"Hello World"', "\u201cHello\u201d", "no text is asked for"])
    assert found.values[:2].tolist() == pytest.approx([0.9, 1])
    assert found.values[2].isnan()
    assert found.failed == 1


def test_an_empty_line_scores_0(line):
    assert line(torch.ones(1, 3, 48, 200), ['"Hello"']).tolist() == [0]


def test_text_is_found_in_a_picture():
    pytest.importorskip("rapidocr_onnxruntime")
    reward = load_reward("ocr")
    images = torch.stack([drawn({"Hello World": (30, 40), "open late": (80, 150)}, 224, 256), torch.full((3, 224, 256), 0.5)])
    prompts = ['A shop window with "Hello World" above "Open Late"', 'a grey wall with "Hello"']
    assert reward(images, prompts).tolist() == [1, 0]


def test_failures_are_named(monkeypatch):
    with pytest.raises(SettingsError, match="ocr=words is neither detect nor line; write ocr=detect"):
        Run(settings({"rewards": "ocr", "reward_models": "ocr=words"}))
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ValueError, match=r"rewards=ocr: RapidOCR could not be loaded .*pip install 'flowgrain\[ocr\]'"):
        OCR(RewardSource())
