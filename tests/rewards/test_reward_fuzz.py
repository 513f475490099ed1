"""Arbitrary requests, responses and answers end in a value or in a ValueError."""

import base64
import io
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from flowgrain.rewards.judge import parse_score
from flowgrain.rewards.messages import ScoreRequest, ScoreResponse
from flowgrain.rewards.ocr import quoted
from flowgrain.rewards.unigenbench import parse_points

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def png(width, height, kind="png"):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, format=kind)
    return base64.b64encode(file.getvalue()).decode()


FILES = [png(3, 3), png(3, 3)[:-20], png(4, 3), png(3, 3, "bmp"), "", "not base64"]
images = st.sampled_from(FILES) | st.text(max_size=20)
shapes = st.lists(st.integers(-3, 9), min_size=4, max_size=4)
raw = st.fixed_dictionaries({"shape": shapes, "data": images})
required = {
    "reward": st.text(max_size=5),
    "prompts": st.lists(st.text(max_size=5), max_size=3),
}
optional = {
    "png": st.lists(images, max_size=3) | plain,
    "raw": raw | plain,
    "fields": plain,
    "more": plain,
}


@given(st.fixed_dictionaries(required, optional=optional))
@settings(deadline=None)
def test_requests(body):
    try:
        request = ScoreRequest.model_validate(body)
        prompts = request.prompts_with_fields()
        decoded = request.images(10_000)
    except (ValidationError, ValueError):
        return
    assert len(decoded) == len(prompts)
    assert decoded.shape[1] == 3


def test_a_small_file_with_a_large_image():
    large = ScoreRequest(reward="a", prompts=["a"], png=[png(4000, 4000)])
    assert len(large.png[0]) < 100_000
    with pytest.raises(ValueError, match="more than 1000000 bytes"):
        large.images(1_000_000)
    with pytest.raises(ValueError, match="cannot be decoded"):
        ScoreRequest(reward="a", prompts=["a"], png=[png(3, 3, "bmp")]).images(1_000_000)


@given(st.text(max_size=300) | plain.map(repr), st.integers(0, 5))
def test_answers(text, count):
    value = parse_score(text)
    assert math.isnan(value) or 0 <= value <= 5
    points = parse_points(text, count)
    assert points is None or (len(points) == count and set(points) <= {0.0, 1.0})
    assert all(part.strip() for part in quoted(text))


@given(plain)
def test_responses(body):
    try:
        response = ScoreResponse.model_validate(body)
    except ValidationError:
        return
    assert isinstance(response.scores, list)
