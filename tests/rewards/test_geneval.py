"""GenEval: its rules on hand-made boxes, its file, and a tiny detector of transformers."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowgrain.data import Prompt, as_prompts, read_prompts
from flowgrain.rewards import RewardConfig, build_reward, score_with_parts
from flowgrain.rewards.detection import COLORS, Box, TransformersDetector, nearest_color
from flowgrain.rewards.geneval import DetectionReward, check_boxes, read_requirements, relations
from flowgrain.settings import SettingsError


def box(name, x, y, color=None, size=10.0, score=0.9):
    return Box(name, score, x, y, x + size, y + size, color)


@pytest.mark.parametrize(
    ("requirements", "boxes", "correct", "fraction"),
    [
        ({"include": [{"class": "cat", "count": 1}]}, [box("cat", 0, 0)], True, 1),
        ({"include": [{"class": "cat", "count": 1}]}, [box("dog", 0, 0)], False, 0),
        (
            {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]},
            [box("dog", 0, 0)],
            False,
            0.5,
        ),
        (
            {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
            [box("cat", 20 * i, 0) for i in range(2)],
            True,
            1,
        ),
        (
            {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]},
            [box("cat", 20 * i, 0) for i in range(3)],
            False,
            0.5,
        ),
        (
            {"include": [{"class": "cup", "count": 1, "color": "red"}]},
            [box("cup", 0, 0, "red")],
            True,
            1,
        ),
        (
            {"include": [{"class": "cup", "count": 1, "color": "red"}]},
            [box("cup", 0, 0, "blue")],
            False,
            0,
        ),
        (
            {
                "include": [
                    {"class": "cat", "count": 1},
                    {"class": "dog", "count": 1, "position": ["left of", 0]},
                ]
            },
            [box("cat", 50, 0), box("dog", 0, 0)],
            True,
            1,
        ),
        (
            {
                "include": [
                    {"class": "cat", "count": 1},
                    {"class": "dog", "count": 1, "position": ["above", 0]},
                ]
            },
            [box("cat", 50, 0), box("dog", 0, 0)],
            False,
            0.5,
        ),
        (
            {
                "include": [
                    {"class": "cat", "count": 1},
                    {"class": "dog", "count": 1, "position": ["above", 0]},
                ]
            },
            [box("dog", 0, 0)],
            False,
            0,
        ),
    ],
)
def test_rules(requirements, boxes, correct, fraction):
    verdict = check_boxes(requirements, boxes)
    assert verdict.correct == correct == (not verdict.errors)
    assert verdict.fraction == fraction


places = st.floats(-100, 100, width=32)


@given(places, places, places, places)
def test_relations_are_symmetric(ax, ay, bx, by):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    a, b = box("a", ax, ay), box("b", bx, by)
    assert {opposite[r] for r in relations(a, b)} == relations(b, a)
    assert relations(a, a) == set()
    assert not {"left of", "right of"} <= relations(a, b)


def test_overlapping_boxes_are_not_apart():
    assert relations(box("a", 0, 0), box("b", 1.5, 0)) == set()
    assert relations(box("a", 0, 0), box("b", 30, 0)) == {"left of"}
    assert relations(box("a", 30, 30), box("b", 0, 0)) == {"right of", "below"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "geneval.jsonl"
    lines = [
        {
            "tag": "single_object",
            "prompt": "a photo of a cat",
            "include": [{"class": "cat", "count": 1}],
        },
        {
            "tag": "colors",
            "prompt": "a red cup",
            "include": [{"class": "cup", "count": 1, "color": "red"}],
        },
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_scores_by_prompt(file):
    requested = []

    def detector(image, colored):
        requested.append(list(colored))
        return [box("cat", 0, 0), box("cup", 20, 0, "red" if image.mean() > 0.5 else "blue")]

    reward = DetectionReward(detector, str(file))
    images = torch.stack(
        [torch.zeros(3, 8, 8), torch.ones(3, 8, 8), torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]
    )
    prompts = as_prompts(["a photo of a cat", "a red cup", "a red cup", "something else"])
    scores = reward(images, prompts).tolist()
    assert scores[:3] == [1, 1, 0]
    assert math.isnan(scores[3])
    assert requested == [[], ["cup"], ["cup"]]


def test_requirements_come_with_the_prompts_and_parts_are_tasks(tmp_path):
    """A cat and a cup: the second prompt has half of its requirements, and its task has failed."""
    cat, cup, cups = (
        {"class": name, "count": count} for name, count in (("cat", 1), ("cup", 1), ("cup", 2))
    )
    lines = [
        {"prompt": "a cup", "tag": "single_object", "include": [cup]},
        {"prompt": "a cat and two cups", "tag": "counting", "include": [cat, cups]},
        {"prompt": "a cat", "tag": "single_object", "include": [cat], "exclude": [cat]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = [*read_prompts("data.prompts", str(tmp_path / "a.jsonl")), "a bare text"]
    reward = DetectionReward(lambda image, colored: [box("cat", 0, 0), box("cup", 20, 0)])
    scores, parts, _ = score_with_parts(reward, torch.zeros(4, 3, 8, 8), prompts, batch_size=2)
    assert scores.values[:3].tolist() == [1, 0.5, 0.5]
    assert scores.failed == 1
    assert parts["single_object"].nan_to_num(-1).tolist() == [1, -1, 0, -1]
    assert parts["counting"].nan_to_num(-1).tolist() == [-1, 0, -1, -1]


def test_missing_values_of_a_parquet_file():
    """None for a color, a position or `exclude` is no requirement."""
    entry = {"class": "cat", "count": 1, "color": None, "position": None}
    assert check_boxes({"include": [entry], "exclude": None}, [box("cat", 0, 0)]).correct


def test_wrong_files_are_named(file, tmp_path):
    with pytest.raises(SettingsError, match=r"rewards\[geneval\]\.path: this option is required"):
        build_reward(RewardConfig(name="geneval", prompt_file=str(file)))
    with pytest.raises(ValueError, match="prompt_file=nowhere: there is no such file"):
        DetectionReward(lambda image, colored: [], "nowhere")
    file.write_text(file.read_text() + '\n{"prompt": "x", "include": [{"class": "cat"}]}')
    with pytest.raises(ValueError, match="line 3 is not a line of a GenEval file"):
        read_requirements(file)
    with pytest.raises(ValueError, match=r"prompt_file=.*geneval\.jsonl: line 3 is not a line of"):
        DetectionReward(lambda image, colored: [], str(file))
    with pytest.raises(SettingsError, match=r"rewards\[geneval\]\.path=.*cannot be loaded"):
        build_reward(RewardConfig(name="geneval", path=str(tmp_path / "nowhere")))


def test_colors():
    image = torch.zeros(3, 20, 20)
    image[0, 5:15, 5:15] = 0.8
    assert nearest_color(image, 5, 5, 15, 15) == "red"
    assert nearest_color(torch.ones(3, 20, 20), 0, 0, 20, 20) == "white"


def test_a_detector_of_transformers(tmp_path):
    """A tiny YOLOS with random weights: boxes have names of the model's classes and are sorted."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=[32, 32], patch_size=8, num_detection_tokens=5,
        id2label={0: "cat", 1: "cup"}, label2id={"cat": 0, "cup": 1},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(tmp_path)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(tmp_path)
    boxes = TransformersDetector(str(tmp_path), threshold=0.0)(torch.rand(3, 32, 32), ["cup"])
    assert len(boxes) == 5
    assert {box.name for box in boxes} <= {"cat", "cup"}
    assert [box.score for box in boxes] == sorted((box.score for box in boxes), reverse=True)
    assert all((box.color in COLORS) == (box.name == "cup") for box in boxes)
    assert all(np.isfinite([box.x0, box.y0, box.x1, box.y1]).all() for box in boxes)
    reward = build_reward(RewardConfig(name="geneval", path=str(tmp_path), threshold=1.0))
    line = {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cup", "count": 1}]}
    scores = reward(torch.rand(1, 3, 32, 32), [Prompt("a cat", line)])
    assert scores.tolist() == [0.5]  # no box has the score 1: no cat, but also no cup
