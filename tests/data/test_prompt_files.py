"""Prompt files of all formats: prompts, other columns, and the errors of unusable files."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowgrain import Prompt, SettingsError
from flowgrain.data import as_prompts, existing_file, prompts_of_step, read_prompts
from flowgrain.rewards import score

FILES = settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def texts(path):
    return [prompt.text for prompt in read_prompts("data.prompts", str(path))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "two red circles", "tag": 1}\n{"prompt": "three green circles"}\n'),
        ("a.csv", 'id,caption\n1,"two red circles"\n2,three green circles\n'),
        ("a.json", '["two red circles", {"text": "three green circles", "n": 2}]'),
        ("a.txt", "\ufefftwo red circles\r\nthree green circles"),
        ("a.prompts", "two red circles\n  three green circles \n"),
    ],
)
def test_every_format(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert texts(tmp_path / name) == ["two red circles", "three green circles"]


@pytest.mark.parametrize("column", ["prompt", "text", "caption", "prompt_en"])
def test_every_text_column(tmp_path, column):
    (tmp_path / "a.jsonl").write_text(json.dumps({column: "two red circles", "n": 2}))
    (prompt,) = read_prompts("data.prompts", str(tmp_path / "a.jsonl"))
    assert prompt == Prompt("two red circles", {"n": 2})


def test_columns_stay_with_their_prompts(tmp_path):
    """From a Parquet file with repeats, Unicode and lists to the reward."""
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"caption": "naïve café 猫\u2028two", "tag": "a", "include": [{"class": "cat"}]},
        {"caption": "x", "tag": "b"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist([*rows, rows[1]]), tmp_path / "a.parquet")
    prompts = read_prompts("data.prompts", str(tmp_path / "a.parquet"))
    assert [prompt.text for prompt in prompts] == ["naïve café 猫\u2028two", "x", "x"]
    assert prompts[0].fields == {"tag": "a", "include": [{"class": "cat"}]}

    def by_tag(images, prompts):
        return [ord(prompt.fields["tag"]) for prompt in prompts]

    chosen = prompts_of_step(prompts, 1, 3, 0)
    scores = score(by_tag, torch.zeros(3, 3, 2, 2), chosen)
    assert sorted(scores.values.tolist()) == [97, 98, 98]


def test_plain_strings_have_no_other_columns():
    assert as_prompts(["a", Prompt("b", {"n": 1})]) == [Prompt("a", {}), Prompt("b", {"n": 1})]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "the file is empty. Write one prompt per line"),
        ("a.txt", "x\n\ny\n", "line 2 is blank"),
        ("a.txt", b"x\n\xff\n", "not UTF-8 text .* at byte 2"),
        ("a.jsonl", '{"prompt": "x"}\n{prompt}\n', "line 2 is not JSON"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1 has no `prompt` field"),
        ("a.json", '{"prompt": "x"}', "not a list"),
        ("a.json", '["\\ud800"]', "line 1 contains a lone surrogate"),
        ("a.parquet", "prompt\n", "not a Parquet file"),
        ("a.csv", "id,words\n1,x\n", "line 2 has no `prompt` field"),
        ("a.csv", "prompt\nx\n  \n", "line 3 is blank"),
    ],
)
def test_an_unusable_file_is_an_error_that_names_it(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(SettingsError, match=message) as error:
        read_prompts("data.prompts", str(tmp_path / name))
    assert str(error.value).startswith(f"data.prompts={tmp_path / name}: ")


def test_a_missing_file_is_an_error_that_names_the_nearest(tmp_path):
    (tmp_path / "prompts.txt").write_text("x")
    missing = tmp_path / "promts.txt"
    with pytest.raises(SettingsError) as error:
        existing_file("data.prompts", str(missing))
    assert str(error.value) == (
        f"data.prompts={missing}: there is no such file. Did you mean {tmp_path / 'prompts.txt'}?"
    )
    with pytest.raises(SettingsError, match="Give the path of a text file"):
        existing_file("data.prompts", str(tmp_path / "nowhere" / "a.txt"))


@FILES
@given(
    st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".parquet"]),
    st.binary(max_size=200) | st.text(max_size=80).map(str.encode),
)
def test_any_bytes_are_prompts_or_an_error_that_names_the_file(tmp_path, ending, data):
    file = tmp_path / f"a{ending}"
    file.write_bytes(data)
    try:
        prompts = read_prompts("data.prompts", str(file))
    except SettingsError as error:
        assert str(file) in str(error)
    else:
        assert prompts
        assert all(prompt.text.strip() for prompt in prompts)


@FILES
@given(st.lists(plain, max_size=4))
def test_any_json_is_prompts_or_an_error(tmp_path, rows):
    of_kind = ((".json", json.dumps(rows)), (".jsonl", "\n".join(map(json.dumps, rows))))
    for ending, text in of_kind:
        (tmp_path / f"a{ending}").write_text(text)
        try:
            prompts = read_prompts("data.prompts", str(tmp_path / f"a{ending}"))
        except SettingsError:
            continue
        assert len(prompts) == len(rows)
