"""Whatever comes from outside ends in a value or in our own error: settings, prompt files, checkpoints, requests, answers."""

import base64
import io
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from flowgrain.training import checkpoint
from flowgrain import SettingsError
from flowgrain.config import schema as settings_module
from flowgrain.data import read_prompts
from flowgrain.rewards.judge import parse_points, parse_score
from flowgrain.rewards.ocr import quoted
from flowgrain.rewards.service import Answer, Question
from flowgrain.config.schema import Settings

FILES = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(list(Settings.model_fields)) | st.text(max_size=10), plain | st.text(max_size=30), max_size=4)
)
def test_settings(values):
    try:
        found = settings_module.settings(values)
    except SettingsError as error:
        assert str(error)
    else:
        assert settings_module.settings(found.model_dump()) == found


@FILES
@given(
    st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".parquet"]), st.binary(max_size=200) | st.text(max_size=80).map(str.encode)
)
def test_prompt_files(tmp_path, ending, data):
    file = tmp_path / f"a{ending}"
    file.write_bytes(data)
    try:
        found = read_prompts("prompts", str(file))
    except SettingsError as error:
        assert str(file) in str(error)
    else:
        assert found
        assert all(prompt.strip() for prompt in found)


@FILES
@given(st.lists(plain, max_size=4))
def test_prompt_files_of_json(tmp_path, rows):
    for ending, text in ((".json", json.dumps(rows)), (".jsonl", "\n".join(map(json.dumps, rows)))):
        (tmp_path / f"a{ending}").write_text(text)
        try:
            found = read_prompts("prompts", str(tmp_path / f"a{ending}"))
        except SettingsError:
            continue
        assert len(found) == len(rows)


@FILES
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=30), plain)
def test_checkpoints(tmp_path, place, noise, manifest):
    """A byte changed anywhere, or another manifest: damaged, and never anything else."""
    path = checkpoint.save(tmp_path, 1, {"a": torch.arange(9.0)}, {"b": 1}, None, keep=1)
    file = next(path.glob("*.safetensors"))
    whole = file.read_bytes()
    place %= len(whole)
    changed = whole[:place] + noise + whole[place + len(noise) :]
    file.write_bytes(changed)
    if changed != whole:
        with pytest.raises(checkpoint.CheckpointError, match="is damaged"):
            checkpoint.load(path)
    file.write_bytes(whole)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.CheckpointError, match="is damaged"):
        checkpoint.load(path)


def png(width, height, kind="png"):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, format=kind)
    return base64.b64encode(file.getvalue()).decode()


images = st.sampled_from([png(3, 3), png(3, 3)[:-20], png(4, 3), png(3, 3, "bmp"), "", "no base64"]) | st.text(max_size=20)
raw = st.fixed_dictionaries({"shape": st.lists(st.integers(-3, 9), min_size=4, max_size=4), "data": images})


must = {"reward": st.text(max_size=5), "prompts": st.lists(st.text(max_size=5), max_size=3)}
may = {"png": st.lists(images, max_size=3) | plain, "raw": raw | plain, "fields": plain, "more": plain}


@given(st.fixed_dictionaries(must, optional=may))
@settings(deadline=None)
def test_requests(body):
    try:
        question = Question.model_validate(body)
        prompts = question.asked()
        found = question.images(10_000)
    except (ValidationError, ValueError):
        return
    assert len(found) == len(prompts)
    assert found.shape[1] == 3


def test_a_picture_that_is_small_until_it_is_opened():
    large = Question(reward="a", prompts=["a"], png=[png(4000, 4000)])
    assert len(large.png[0]) < 100_000
    with pytest.raises(ValueError, match="more than 1000000 bytes"):
        large.images(1_000_000)
    with pytest.raises(ValueError, match="cannot be read"):
        Question(reward="a", prompts=["a"], png=[png(3, 3, "bmp")]).images(1_000_000)


@given(st.text(max_size=300) | plain.map(repr), st.integers(0, 5))
def test_answers(text, count):
    value = parse_score(text)
    assert math.isnan(value) or 0 <= value <= 5
    found = parse_points(text, count)
    assert found is None or (len(found) == count and set(found) <= {0.0, 1.0})
    assert all(one.strip() for one in quoted(text))


@given(plain)
def test_answers_of_a_service(body):
    try:
        found = Answer.model_validate(body)
    except ValidationError:
        return
    assert isinstance(found.scores, list)
