"""GenEval's rules on boxes drawn by hand, its file, and a tiny detector of transformers."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowgrain.data import read_prompts
from flowgrain.rewards import RewardSource, explained
from flowgrain.rewards.geneval import Box, GenEval, TransformersDetector, judge_boxes, nearest_colour, read_demands, relations


def box(name, x, y, colour=None, size=10.0, score=0.9):
    return Box(name, score, x, y, x + size, y + size, colour)


@pytest.mark.parametrize(
    ("demand", "boxes", "correct", "credit"),
    [
        ({"include": [{"class": "cat", "count": 1}]}, [box("cat", 0, 0)], True, 1),
        ({"include": [{"class": "cat", "count": 1}]}, [box("dog", 0, 0)], False, 0),
        ({"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]}, [box("dog", 0, 0)], False, 0.5),
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
        ({"include": [{"class": "cup", "count": 1, "color": "red"}]}, [box("cup", 0, 0, "red")], True, 1),
        ({"include": [{"class": "cup", "count": 1, "color": "red"}]}, [box("cup", 0, 0, "blue")], False, 0),
        (
            {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]},
            [box("cat", 50, 0), box("dog", 0, 0)],
            True,
            1,
        ),
        (
            {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}]},
            [box("cat", 50, 0), box("dog", 0, 0)],
            False,
            0.5,
        ),
        (
            {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}]},
            [box("dog", 0, 0)],
            False,
            0,
        ),
    ],
)
def test_rules(demand, boxes, correct, credit):
    found = judge_boxes(demand, boxes)
    assert found.correct == correct == (not found.wrong)
    assert found.credit == credit


places = st.floats(-100, 100, width=32)


@given(places, places, places, places)
def test_relations_turn_round(ax, ay, bx, by):
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
        {"tag": "single_object", "prompt": "a photo of a cat", "include": [{"class": "cat", "count": 1}]},
        {"tag": "colors", "prompt": "a red cup", "include": [{"class": "cup", "count": 1, "color": "red"}]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_scores_by_prompt(file):
    asked = []

    def detector(image, coloured):
        asked.append(list(coloured))
        return [box("cat", 0, 0), box("cup", 20, 0, "red" if image.mean() > 0.5 else "blue")]

    reward = GenEval(RewardSource(f"#{file}"), detector=detector)
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8), torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    found = reward(images, ["a photo of a cat", "a red cup", "a red cup", "something else"]).tolist()
    assert found[:3] == [1, 1, 0]
    assert math.isnan(found[3])
    assert asked == [[], ["cup"], ["cup"]]


def test_demands_come_with_the_prompts_and_parts_are_tasks(tmp_path):
    """A red cup with a cat: half of what the second prompt asks for is there, and by task none of it."""
    cat, cup, cups = ({"class": name, "count": count} for name, count in (("cat", 1), ("cup", 1), ("cup", 2)))
    lines = [
        {"prompt": "a cup", "tag": "single_object", "include": [cup]},
        {"prompt": "a cat and two cups", "tag": "counting", "include": [cat, cups]},
        {"prompt": "a cat", "tag": "single_object", "include": [cat], "exclude": [cat]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = [*read_prompts("prompts", str(tmp_path / "a.jsonl")), "a bare text"]
    reward = GenEval(RewardSource(), detector=lambda image, coloured: [box("cat", 0, 0), box("cup", 20, 0)])
    scores, parts, _ = explained(reward, torch.zeros(4, 3, 8, 8), prompts, batch=2)
    assert scores.values[:3].tolist() == [1, 0.5, 0.5]
    assert scores.failed == 1
    assert parts["single_object"].nan_to_num(-1).tolist() == [1, -1, 0, -1]
    assert parts["counting"].nan_to_num(-1).tolist() == [-1, 0, -1, -1]


def test_fields_that_a_parquet_file_fills_with_nothing():
    """A cat of no asked colour and no asked place is a cat."""
    demand = {"include": [{"class": "cat", "count": 1, "color": None, "position": None}], "exclude": None}
    assert judge_boxes(demand, [box("cat", 0, 0)]).correct


def test_files_that_are_none(file, tmp_path):
    with pytest.raises(ValueError, match="names no detector"):
        GenEval(RewardSource(f"#{file}"))
    with pytest.raises(ValueError, match="there is no file nowhere"):
        GenEval(RewardSource("detector#nowhere"))
    file.write_text(file.read_text() + '\n{"prompt": "x", "include": [{"class": "cat"}]}')
    with pytest.raises(ValueError, match="line 3 is no line of a GenEval file"):
        read_demands(file)
    with pytest.raises(ValueError, match="could not be loaded"):
        TransformersDetector(str(tmp_path / "nowhere"))


def test_colours():
    image = torch.zeros(3, 20, 20)
    image[0, 5:15, 5:15] = 0.8
    assert nearest_colour(image, 5, 5, 15, 15) == "red"
    assert nearest_colour(torch.ones(3, 20, 20), 0, 0, 20, 20) == "white"


def test_a_detector_of_transformers(tmp_path):
    """YOLOS, tiny and untrained: boxes come back with names of the model's classes, sorted, inside the picture."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32], patch_size=8,
        num_detection_tokens=5, id2label={0: "cat", 1: "cup"}, label2id={"cat": 0, "cup": 1},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(tmp_path)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(tmp_path)
    found = TransformersDetector(str(tmp_path), threshold=0.0)(torch.rand(3, 32, 32), ["cup"])
    assert len(found) == 5
    assert {one.name for one in found} <= {"cat", "cup"}
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert all((one.colour is not None) == (one.name == "cup") for one in found)
    assert all(np.isfinite([one.x0, one.y0, one.x1, one.y1]).all() for one in found)
