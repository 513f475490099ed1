"""GenEval: its rules on hand-made boxes, its file, its colors, and tiny detectors and CLIP."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)
from twins import clip_tokenizer

from flowgrain.data import Prompt, as_prompts, read_prompts
from flowgrain.evaluation import make_request, make_table, run_evaluation
from flowgrain.rewards import (
    RewardConfig,
    build_reward,
    register_reward,
    score,
    score_with_parts,
)
from flowgrain.rewards.colors import COLORS, ClipColors, color_texts, crop
from flowgrain.rewards.detection import (
    Box,
    BoxDetector,
    MaskDetector,
    best_classes,
    geneval_name,
    load_detector,
    mask_corners,
    scored_masks,
)
from flowgrain.rewards.geneval import DetectionReward
from flowgrain.rewards.geneval_rules import (
    check_requirements,
    graded_credit,
    kept_boxes,
    read_requirements,
    relations,
    strict_verdict,
)
from flowgrain.settings import SettingsError

# The labels of COCO that GenEval's prompts call by other names, as different files spell them.
LABELS = {
    "airplane": ["airplane", "aeroplane"],
    "cell phone": ["cell phone"],
    "computer keyboard": ["keyboard"],
    "computer mouse": ["mouse"],
    "couch": ["couch", "sofa"],
    "dining table": ["dining table", "diningtable"],
    "motorcycle": ["motorcycle", "motorbike"],
    "potted plant": ["potted plant", "pottedplant"],
    "tv": ["tv", "tvmonitor"],
    "tv remote": ["remote"],
}


def box(name, x, y, color=None, size=10.0, score=0.95):
    return Box(name, score, x, y, x + size, y + size, color)


def thing(name, count=1, **more):
    return {"class": name, "count": count, **more}


def judged(include, boxes, exclude=()):
    """Strict verdict, credit and whether counts are equal."""
    requirements = {"include": include, "exclude": exclude}
    objects = kept_boxes(boxes, 0.3, 16)
    credit = graded_credit(requirements, objects)
    return strict_verdict(requirements, objects).correct, credit.value, credit.correct


CATS = [box("cat", 20 * i, 0) for i in range(4)]


@pytest.mark.parametrize(
    ("include", "boxes", "expected"),
    [
        ([thing("cat")], CATS[:1], (True, 1, True)),
        ([thing("cat")], [box("dog", 0, 0)], (False, 0, False)),
        ([thing("cat")], [], (False, 0, False)),
        ([thing("cat")], CATS[:2], (True, 0, False)),
        ([thing("cat")], CATS, (True, -2, False)),
        ([thing("cat"), thing("dog")], [box("dog", 0, 0)], (False, 0.5, False)),
        ([thing("cat", 4)], CATS[:3], (False, 0.75, False)),
        ([thing("cup", color="red")], [box("cup", 0, 0, "red")], (True, 1, True)),
        ([thing("cup", color="red")], [box("cup", 0, 0, "blue")], (False, 0.5, False)),
        (
            [thing("cup", 2, color="red")],
            [box("cup", 0, 0, "red"), box("cup", 20, 0, "blue")],
            (False, 0.75, False),
        ),
        (  # the benchmark looks at the best cup only
            [thing("cup", color="red")],
            [box("cup", 0, 0, "red"), box("cup", 20, 0, score=0.5)],
            (True, 0, False),
        ),
        (
            [thing("cat"), thing("dog", position=["left of", 0])],
            [box("cat", 50, 0), box("dog", 0, 0)],
            (True, 1, True),
        ),
        (
            [thing("cat"), thing("dog", position=["above", 0])],
            [box("cat", 50, 0), box("dog", 0, 0)],
            (False, 2 / 3, False),
        ),
        (  # no cat: one of three demands
            [thing("cat"), thing("dog", position=["above", 0])],
            [box("dog", 0, 0)],
            (False, 1 / 3, False),
        ),
        ([], CATS, (True, 0, True)),
    ],
)
def test_rules(include, boxes, expected):
    """Verdict of the benchmark, training credit, and whether the training server calls it correct.

    Published training credit: 1 - |found - wanted| / wanted, which is not clipped.
    """
    correct, value, equal = judged(include, boxes)
    assert (correct, equal) == expected[::2]
    assert value == pytest.approx(expected[1])


def test_too_many_objects_fail_only_with_exclude():
    include, exclude = [thing("cat", 2)], [thing("cat", 3)]
    assert judged(include, CATS[:2], exclude) == (True, 1, True)
    assert judged(include, CATS[:3]) == (True, 0.5, False)
    assert judged(include, CATS[:3], exclude) == (False, 0.5, False)


def test_boxes_that_count():
    """Scores equal to the threshold do not count. The best boxes of each class are kept."""
    boxes = [box("cat", i, 0, score=s) for i, s in enumerate((0.3, 0.9, 0.5, 0.7, 0.29))]
    kept = kept_boxes([*boxes, box("dog", 0, 0, score=0.1)], 0.3, 2)
    assert [found.score for found in kept.pop("cat")] == [0.9, 0.7]
    assert not kept


def test_overlapping_boxes_all_count():
    assert len(kept_boxes([box("cat", 0, 0)] * 3, 0.3, 16)["cat"]) == 3


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


# The reward with a hand-made detector


class Boxes:
    """A detector that returns fixed boxes, and a classifier that returns one color."""

    classes = ("cat", "cup", "dog")

    def __init__(self, *boxes, color="red"):
        self.boxes, self.color = boxes, color
        self.thresholds, self.colored = [], []

    def __call__(self, image, threshold):
        self.thresholds.append(threshold)
        return [found for found in self.boxes if found.score > threshold]

    def colors(self, image, boxes, name):
        self.colored.append((name, [found.x0 for found in boxes]))
        return [self.color] * len(boxes)

    def reward(self, **options):
        return DetectionReward(self, self.colors, **options)


def prompt(include, tag="single_object", **more):
    return Prompt("a photo", {"include": include, "tag": tag, **more})


def one(reward, *prompts):
    return torch.as_tensor(reward(torch.rand(len(prompts), 3, 8, 8), prompts)).tolist()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "geneval.jsonl"
    lines = [
        {"tag": "single_object", "prompt": "a photo of a cat", "include": [thing("cat")]},
        {"tag": "colors", "prompt": "a red cup", "include": [thing("cup", color="red")]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_requirements_from_a_prompt_file(file):
    boxes = Boxes(box("cat", 0, 0), box("cup", 20, 0))
    prompts = as_prompts(["a photo of a cat", "a red cup", "something else"])
    scores = one(boxes.reward(prompt_file=str(file)), *prompts)
    assert scores[:2] == [1, 1]
    assert math.isnan(scores[2])
    assert boxes.colored == [("cup", [20])]


def test_colors_are_only_read_where_they_matter():
    """Of the best boxes, if there are enough: a color cannot help an image with too few objects."""
    boxes = Boxes(*(box("cup", x, 0, score=0.9 - x / 100) for x in (0, 20, 40)))
    reward = boxes.reward()
    two, four = ([thing("cup", n, color="red")] for n in (2, 4))
    assert one(reward, prompt(two), prompt(four), prompt([thing("cup", 3)])) == [0.25, 0.375, 1]
    assert boxes.colored == [("cup", [0, 20])]


def test_thresholds_and_number_of_boxes():
    """Counting prompts need a higher score. Every option changes the result."""
    include = [thing("cat", 2)]
    boxes = Boxes(*(box("cat", 20 * i, 0, score=s) for i, s in enumerate((0.95, 0.6, 0.35))))
    reward = boxes.reward()
    assert one(reward, prompt(include, "two_object"), prompt(include, "counting")) == [0.5, 0.5]
    assert boxes.thresholds == [0.3, 0.9]
    assert one(boxes.reward(threshold=0.5), prompt(include)) == [1]
    assert one(boxes.reward(counting_threshold=0.5), prompt(include, "counting")) == [1]
    assert one(boxes.reward(max_boxes=2), prompt(include)) == [1]


def test_graded_training_credit_and_strict_results_by_task(tmp_path):
    """The parts are the verdicts of the benchmark for both scores. Their mean is its score."""
    lines = [
        {"prompt": "a cup", "tag": "single_object", "include": [thing("cup")]},
        {"prompt": "a dog and two cups", "tag": "counting", "include": [thing("cup", 2)]},
        {"prompt": "cats", "tag": "single_object", "include": [thing("cat", 4)]},
        {"prompt": "a bare line", "include": [thing("cat")]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = [*read_prompts("data.prompts", str(tmp_path / "a.jsonl")), "a bare text"]
    boxes = Boxes(*CATS[:3], box("cup", 0, 20))
    expected = {"graded": [1, 0.5, 0.75, -1], "strict": [1, 0, 0, 1]}
    for kind, values in expected.items():
        reward = boxes.reward(score=kind)
        scores, parts, _ = score_with_parts(reward, torch.zeros(5, 3, 8, 8), prompts, batch_size=2)
        assert scores.values[:4].tolist() == values
        assert scores.failed == 1
        assert parts["single_object"].nan_to_num(-1).tolist() == [1, -1, 0, -1, -1]
        assert parts["counting"].nan_to_num(-1).tolist() == [-1, 0, -1, -1, -1]
        assert parts["no task"].nan_to_num(-1).tolist() == [-1, -1, -1, 1, -1]
        assert reward.mean_of_parts


def test_an_evaluation_reports_the_score_of_the_benchmark(tmp_path):
    """Mean over tasks of the strict verdicts, for a reward that returns the graded credit."""

    @register_reward("geneval_with_boxes")
    class WithBoxes(DetectionReward):
        def __init__(self):
            boxes = Boxes(*CATS[:3], box("cup", 0, 20))
            super().__init__(boxes, boxes.colors)

    lines = [
        {"prompt": "three green circles", "tag": "counting", "include": [thing("cat", 4)]},
        {
            "prompt": "red square and blue circle",
            "tag": "colors",
            "include": [thing("cup", color="red")],
        },
        {"prompt": "two green circles", "tag": "colors", "include": [thing("cup", color="red")]},
        {
            "prompt": "yellow triangle above cyan square",
            "tag": "colors",
            "include": [thing("dog", color="red")],
        },
    ]
    path = tmp_path / "geneval.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    values = {
        "data.eval_prompts": str(path),
        "evaluation.num_prompts": 4,
        "evaluation.rewards": ["geneval_with_boxes"],
    }
    run_evaluation(make_request(["base"], values, steps=[1]), tmp_path / "out")
    (row,) = make_table(tmp_path / "out").rows
    assert row.cells["geneval_with_boxes"].value.mean == pytest.approx((0.75 + 1 + 1 + 0) / 4)
    assert row.parts["geneval_with_boxes"] == pytest.approx(
        {"overall": (0 + 2 / 3) / 2, "counting": 0, "colors": 2 / 3}
    )


def test_the_detector_sees_8_bit_images():
    seen = []

    class Sees(Boxes):
        def __call__(self, image, threshold):
            seen.append(image)
            return []

    Sees().reward()(torch.tensor([-1.0, 0.3, 0.5001, 2.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2),
                    [prompt([thing("cat")])])  # fmt: skip
    assert (seen[0][0] * 255).flatten().tolist() == pytest.approx([0, 76, 128, 255])


def test_missing_values_of_a_parquet_file():
    """None for a color, a position or `exclude` is no requirement."""
    entry = {"class": "cat", "count": 1, "color": None, "position": None}
    reward = Boxes(box("cat", 0, 0)).reward()
    assert one(reward, prompt([entry], exclude=None), prompt([entry], tag=None)) == [1, 1]
    assert one(Boxes().reward(score="strict"), prompt([entry])) == [0]


# Errors


@pytest.mark.parametrize(
    ("requirements", "message"),
    [
        ({"include": [thing("cta")]}, r"class='cta': the detector has no such class\. .*'cat'"),
        ({"include": [thing("cat")], "exclude": [thing("tv")]}, "class='tv': the detector has no"),
        ({"include": [thing("cat", 0)]}, "count=0 of class 'cat': give a positive whole number"),
        ({"include": [thing("cat", "1")]}, "count='1' of class 'cat'"),
        ({"include": [thing("cat", color="grey")]}, "color='grey': unknown color. Use one of red"),
        ({"include": [thing("cat", position=["near", 0])]}, r"position=\['near', 0\]: give \[rel"),
        (
            {"include": [thing("cat"), thing("cup", position=["above", 1])]},
            "index of an earlier object",
        ),
        ({"include": [thing("cat"), thing("cup", position="above")]}, "position='above': give"),
        ({"include": [{"class": "cat"}]}, "an object needs a class and a count"),
        ({"include": "cat"}, "include='cat': give a list"),
    ],
)
def test_wrong_requirements_are_errors(requirements, message):
    with pytest.raises(ValueError, match=message):
        check_requirements(requirements, Boxes.classes)
    scores = score(Boxes().reward(), torch.zeros(1, 3, 8, 8), [Prompt("a photo", requirements)])
    assert scores.failed == 1
    assert "ValueError: prompt 'a photo': " in scores.reason


def test_wrong_files_and_options_are_named(file, tmp_path):
    with pytest.raises(ValueError, match="prompt_file=nowhere: there is no such file"):
        Boxes().reward(prompt_file="nowhere")
    assert set(read_requirements(file, Boxes.classes)) == {"a photo of a cat", "a red cup"}
    for line in ('{"prompt": "x", "include": [{"class": "cat"}]}', "[]", '{"prompt": "x"}', "?"):
        file.write_text(f'{{"prompt": "a cat", "include": []}}\n{line}')
        with pytest.raises(SettingsError, match=r"prompt_file=.*: line 2 is not a line of a GenEv"):
            Boxes().reward(prompt_file=str(file))
    with pytest.raises(SettingsError, match=r"rewards\[geneval\]\.path=.*cannot be loaded"):
        build_reward(RewardConfig(name="geneval", path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    "options",
    [{"threshold": 1.5}, {"counting_threshold": -0.1}, {"max_boxes": 0}, {"score": "fraction"}],
)
def test_options_are_checked(options):
    (name,) = options
    with pytest.raises(SettingsError, match=rf"rewards\[geneval\]\.{name}="):
        build_reward(RewardConfig(name="geneval", **options))


# Colors


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    torch.manual_seed(0)
    both = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "hidden_act": "quick_gelu",
    }  # fmt: skip
    text = {"vocab_size": 60, "max_position_embeddings": 60, "bos_token_id": 52, "eos_token_id": 53}
    config = CLIPConfig(
        text_config=both | text,
        vision_config=both | {"image_size": 24, "patch_size": 8},
        projection_dim=8,
    )
    where = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(where)
    clip_tokenizer(60).save_pretrained(where)
    return str(where)


def test_crops_end_at_the_image_and_are_never_empty():
    image = torch.arange(3 * 6 * 8.0).reshape(3, 6, 8) / 144
    assert torch.equal(crop(image, Box("cat", 1, -3, 1.5, 4, 90)), image[:, 2:, :4])
    for corners in ((2.1, 2.1, 2.2, 2.2), (8, 6, 9, 9), (-5, -5, -4, -4)):
        assert crop(image, Box("cat", 1, *corners)).shape[1:] == (1, 1)


def test_clip_colors_are_zero_shot(tiny_clip):
    """Against the definition: mean of the normalized texts, similarity to the masked crop."""
    colors = ClipColors(tiny_clip)
    image = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[5:20, 10:30] = True
    boxes = [Box("cup", 1, 10, 5, 30, 20, mask=mask), Box("cup", 1, 0, 0, 60, 40)]
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    tokenizer = clip_tokenizer(60)
    rows = []
    for color in COLORS:
        tokens = tokenizer(color_texts(color, "cup"), padding="max_length", return_tensors="pt")
        with torch.no_grad():
            texts = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        rows.append(F.normalize(texts.mean(0), dim=-1))
    for found, pixels in zip(boxes, (image[:, 5:20, 10:30], image), strict=True):
        embed = colors.clip.image_embeds(pixels[None])
        expected = (embed @ torch.stack(rows).T)[0]
        torch.testing.assert_close(colors.logits(image, [found], "cup")[0], expected)
    assert colors(image, boxes, "cup") == [
        COLORS[i] for i in colors.logits(image, boxes, "cup").argmax(1).tolist()
    ]
    assert not torch.equal(colors._embeds("cup"), colors._embeds("dog"))


def test_the_background_does_not_matter_with_a_mask(tiny_clip):
    colors = ClipColors(tiny_clip)
    mask = torch.eye(20, dtype=torch.bool)
    found = Box("cup", 1, 2, 2, 18, 18, mask=mask)
    image, other = torch.rand(2, 3, 20, 20).unbind()
    changed = torch.where(mask, image, other)
    assert torch.equal(colors.logits(image, [found], "cup"), colors.logits(changed, [found], "cup"))
    bare = Box("cup", 1, 2, 2, 18, 18)
    assert not torch.equal(
        colors.logits(image, [bare], "cup"), colors.logits(changed, [bare], "cup")
    )


# Detectors


def test_names_of_classes():
    for name, labels in LABELS.items():
        assert {geneval_name(label) for label in labels} == {name}
    assert geneval_name("Wine_Glass") == "wine glass"


def test_best_classes_are_pairs_of_query_and_class():
    """A query with two probable classes gives two objects. "No object" is not a class."""
    logits = torch.tensor([[0.5, 0.4, 0.05, 0.05], [0.1, 0.1, 0.2, 0.6]]).log()
    probabilities, labels, queries = best_classes(logits, 0.15)
    assert probabilities.tolist() == pytest.approx([0.5, 0.4, 0.2])
    assert (labels.tolist(), queries.tolist()) == ([0, 1, 2], [0, 0, 1])
    assert len(best_classes(torch.zeros(50, 4), 0.0)[0]) == 100


def test_scores_of_masks():
    """Class probability times the mean mask probability inside of the mask."""
    logits = torch.full((3, 4, 5), -3.0)
    logits[0, 1:3, 2] = torch.tensor([0.0, 2.0])  # a logit of 0 is outside
    logits[1, 0, 4], logits[1, 3, 1] = 1.0, 3.0
    scores, masks = scored_masks(torch.tensor([0.5, 1.0, 1.0]), logits)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (2, 1, 3)]
    expected = [0.5 * sigmoid[0], (sigmoid[1] + sigmoid[2]) / 2, 0]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert masks.sum((1, 2)).tolist() == [1, 2, 0]
    assert mask_corners(masks[0]) == (2, 2, 3, 3)
    assert mask_corners(masks[1]) == (1, 0, 5, 4)


@pytest.fixture(scope="module")
def tiny_mask2former(tmp_path_factory):
    """A tiny Mask2Former with a Swin backbone and three classes of COCO."""
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=6, id2label={0: "cat", 1: "cup", 2: "tvmonitor"},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # the default weights give all queries the same mask
            torch.nn.init.normal_(parameter, std=0.2)
    where = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(where)
    return str(where)


def test_mask2former_is_postprocessed_as_in_mmdetection(tiny_mask2former):
    """All objects of a tiny model against a loop over all pairs of query and class."""
    detector = load_detector(tiny_mask2former)
    assert isinstance(detector, MaskDetector)
    assert (detector.short_side, detector.long_side) == (800, 1333)
    assert detector.classes == {"cat", "cup", "tv"}
    detector.short_side, detector.long_side = 64, 128  # quick
    image = (torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3)) * 255).round() / 255
    image = image.repeat_interleave(4, 1).repeat_interleave(4, 2)
    boxes = detector(image, 0.05)

    big = F.interpolate(image[None] * 255, (64, 64), mode="bilinear").round()
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
    with torch.no_grad():
        output = detector.model((big - mean[:, None, None]) / std[:, None, None])
    masks = F.interpolate(output.masks_queries_logits, (64, 64), mode="bilinear")
    masks = F.interpolate(masks, (32, 32), mode="bilinear")[0]
    expected = []
    for query, probabilities in enumerate(output.class_queries_logits[0].softmax(-1)):
        inside = masks[query] > 0
        for label, name in enumerate(("cat", "cup", "tv")):
            if inside.any():
                value = probabilities[label] * masks[query][inside].sigmoid().mean()
                ys, xs = inside.nonzero().unbind(1)
                place = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1, inside.sum())
                expected.append((float(value), name, *map(float, place)))
    expected = sorted(entry for entry in expected if entry[0] > 0.05)
    assert len({entry[2:] for entry in expected}) > 2
    ours = sorted((b.score, b.name, b.x0, b.y0, b.x1, b.y1, int(b.mask.sum())) for b in boxes)
    assert [entry[1:] for entry in ours] == [entry[1:] for entry in expected]
    assert [entry[0] for entry in ours] == pytest.approx([e[0] for e in expected], abs=1e-4)
    assert all(found.mask.shape == (32, 32) and found.mask.dtype == torch.bool for found in boxes)
    middle = (expected[0][0] + expected[-1][0]) / 2
    assert 0 < len(detector(image, middle)) < len(boxes)


@pytest.mark.parametrize(
    ("shape", "size", "padded"),
    [((50, 100), (48, 96), (64, 96)), ((100, 50), (96, 48), (96, 64)), ((90, 90), (64, 64), None)],
)
def test_masks_have_the_pixels_of_the_image(tiny_mask2former, shape, size, padded):
    """A model that marks red pixels finds a red square: resizing and padding are reverted."""
    detector, seen = MaskDetector(tiny_mask2former, short_side=64, long_side=96), []

    def red(pixel_values):
        seen.append(tuple(pixel_values.shape[-2:]))
        mask = F.avg_pool2d(pixel_values[:, :1] - pixel_values[:, 1:2], 4) - 2
        return SimpleNamespace(
            class_queries_logits=torch.tensor([[[9.0, 0, 0, 0]]]), masks_queries_logits=mask * 10
        )

    detector.model = red
    image = torch.zeros(3, *shape)
    image[0, 15:40, 20:45] = 1
    (found,) = detector(image, 0.3)
    assert seen == [padded or size]
    corners = np.array([found.x0, found.y0, found.x1, found.y1])
    assert np.abs(corners - [20, 15, 45, 40]).max() <= 4
    truth = image[0] > 0
    assert found.mask.shape == truth.shape
    assert (found.mask & truth).sum() / (found.mask | truth).sum() > 0.8
    assert detector._resize(image).shape[-2:] == size


def test_geneval_with_mask2former_and_clip(tiny_mask2former, tiny_clip):
    """The whole reward with tiny models: finite scores, and colors of the classifier."""
    config = RewardConfig(
        name="geneval", path=tiny_mask2former, color_model=tiny_clip,
        threshold=0.01, counting_threshold=1.0, max_boxes=1,
    )  # fmt: skip
    reward = build_reward(config)
    reward.detector.short_side = reward.detector.long_side = 64
    image = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    prompts = [prompt([thing("cat", color=color)], "colors") for color in COLORS]
    prompts += [prompt([thing("cat")]), prompt([thing("cat")], "counting")]
    seen = reward.explain(image.expand(12, -1, -1, -1), prompts)
    assert sorted(seen.scores.tolist()) == [0] + [0.5] * 9 + [1] * 2  # the cat has one color
    assert seen.scores[-1] == 0  # no box has a score above 1
    assert {task: float(part.nansum()) for task, part in seen.parts.items()} == {
        "colors": 1, "single_object": 1, "counting": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="class='tvmonitor': the detector has no such class"):
        one(reward, prompt([thing("tvmonitor")]))


def test_errors_name_the_color_model(tiny_mask2former, tmp_path):
    with pytest.raises(SettingsError, match=r"rewards\[geneval\]\.color_model=.*cannot be loaded"):
        build_reward(
            RewardConfig(name="geneval", path=tiny_mask2former, color_model=str(tmp_path / "no"))
        )


def test_a_detector_without_masks(tmp_path, tiny_clip):
    """A tiny YOLOS with random weights: boxes have names of GenEval and no masks."""
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=[32, 32], patch_size=8, num_detection_tokens=5,
        id2label={0: "cat", 1: "remote"}, label2id={"cat": 0, "remote": 1},
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(tmp_path)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(tmp_path)
    detector = load_detector(str(tmp_path))
    assert isinstance(detector, BoxDetector)
    boxes = detector(torch.rand(3, 32, 32), 0.0)
    assert len(boxes) == 5
    assert {found.name for found in boxes} <= detector.classes == {"cat", "tv remote"}
    assert all(np.isfinite([b.x0, b.y0, b.x1, b.y1]).all() and b.mask is None for b in boxes)
    best = max(found.score for found in boxes)
    assert all(found.score > 0.99 * best for found in detector(torch.rand(3, 32, 32), 0.99 * best))
    options = {"path": str(tmp_path), "color_model": tiny_clip}
    reward = build_reward(RewardConfig(name="geneval", threshold=1.0, **options))
    line = {"include": [thing("cat")], "exclude": [thing("tv remote")]}
    assert reward(torch.rand(1, 3, 32, 32), [Prompt("a cat", line)]).tolist() == [0]
    reward = build_reward(RewardConfig(name="geneval", threshold=0.0, max_boxes=1, **options))
    name = boxes[0].name
    include = [thing(name, color="red")]
    assert one(reward, Prompt("x", {"include": include}))[0] in (0.5, 1)
