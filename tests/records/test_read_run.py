"""Reading of a run's directory."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from records.fake_runs import TEXTS, picture, write_run

from flowgrain import SettingsError, load_run
from flowgrain.records import DamagedRecord
from flowgrain.records.damaged import set_damaged_files_aside
from flowgrain.records.groups import GroupTree


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "demo")


def test_a_run(folder):
    run = load_run(folder)
    assert (run.name, run.method, run.model, run.status) == (
        "demo",
        "flow_grpo",
        "shapes",
        "finished",
    )
    assert run.rewards == ["towers", "oracle"]
    assert [line["step"] for line in run.metrics] == list(range(21))
    assert [evaluation.step for evaluation in run.evaluations] == [0, 10, 20]
    assert run.groups.steps == list(run.groups) == [1, 7, 14, 20]
    assert run.alarms[0]["monitor"] == "edge_density"
    assert load_run(folder / "run.yaml").folder == folder


def test_no_run(tmp_path):
    with pytest.raises(SettingsError, match="not the directory of a run"):
        load_run(tmp_path)


def test_reading_imports_no_torch(folder):
    code = (
        "import sys, flowgrain\n"
        f"run = flowgrain.load_run({str(folder)!r})\n"
        "run._repr_html_(), run.history, run.evaluations, run.groups[7]._repr_html_()\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_history(folder):
    history = load_run(folder).history
    assert {len(column) for column in history.values()} == {21}
    assert history["step"] == list(range(21))
    assert math.isnan(history["loss"][0])
    assert math.isnan(history["eval/towers"][1])
    assert history["eval/towers"][20] == pytest.approx(0.35 + 0.4 * (1 - math.exp(-1)))


def test_a_group(folder):
    group = load_run(folder).groups[7]
    assert [prompt.recorded for prompt in group.prompts] == [True, True, False]
    assert group.prompts[0].text == TEXTS[7 % 4]
    assert math.isnan(group.prompts[0].rewards["oracle"][0])
    assert np.array_equal(np.asarray(group.image(1, 5)), picture(32, 5, 8))
    full = group.prompts[1].full
    assert np.array_equal(np.asarray(group.image(1, full[0], full=True)), picture(32, full[0], 8))
    with pytest.raises(KeyError):
        group.image(2, 0)
    with pytest.raises(KeyError, match=r"step 8 is not recorded. Recorded steps: \[1, 7, 14, 20\]"):
        load_run(folder).groups[8]
    table = group.table(0)
    assert {len(column) for column in table.values()} == {6}
    assert table["advantage"] == pytest.approx(group.prompts[0].advantage)


def test_thumbnails_of_large_images(tmp_path):
    folder = write_run(tmp_path / "large", size=200, thumbnail=80, group_steps=1, images=2)
    group = load_run(folder).groups[1]
    (best, *_) = group.prompts[0].full
    assert group.image(0, best).size == (80, 80)
    assert group.image(0, best, full=True).size == (200, 200)
    difference = np.asarray(group.image(0, best, full=True)) - picture(200, best, 1).astype(int)
    assert np.abs(difference).mean() < 5


def test_evaluation_images(folder):
    evaluation = load_run(folder).evaluations[1]
    assert evaluation.num_images == 8
    assert np.array_equal(np.asarray(evaluation.image(3)), picture(32, 3, 10))
    assert math.isnan(evaluation.monitors["diversity"][0])
    assert evaluation.base["towers"]["std"] == 0.1
    with pytest.raises(KeyError):
        evaluation.image(8)


def test_files_are_the_same_again(folder, tmp_path):
    again = write_run(tmp_path / "again" / "demo")
    for path in sorted(folder.rglob("*.zip")):
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes()


def test_texts_are_escaped(tmp_path):
    folder = write_run(tmp_path / "demo", method="<i>m</i>", rewards=("<b>r</b>",))
    run = load_run(folder)
    pages = [run._repr_html_(), run.history._repr_html_(), run.groups[14]._repr_html_()]
    assert all("<b>r" not in page and "<i>" not in page for page in pages)
    assert "two towers &lt;b&gt;at night" in pages[2]
    assert pages[2].count("<img") == 12


@pytest.mark.parametrize(
    ("holder", "status"),
    [
        (None, "stopped"),
        ({"pid": os.getpid(), "started": "2999-01-01 00:00:00+00:00"}, "running"),
        ({"pid": os.getpid(), "started": "2001-01-01 00:00:00+00:00"}, "unfinished"),
        ({"pid": -1}, "unfinished"),
        ({"host": "another", "pid": 1}, "running"),
    ],
)
def test_status(tmp_path, holder, status):
    folder = write_run(tmp_path / "demo", max_steps=100, running=True)
    file = folder / ".lock.json"
    host = json.loads(file.read_text())["host"]
    if holder is None:
        file.unlink()
    else:
        file.write_text(json.dumps({"host": host} | holder))
    assert load_run(folder).status == status


def _rewrite(path, change):
    """Replace step.json of a group file by change(values), or by the bytes that it returns."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    values = change(json.loads(members["step.json"]))
    members["step.json"] = values if isinstance(values, bytes) else json.dumps(values).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: b"{",
        lambda values: [],
        lambda values: values | {"format": 2},
        lambda values: values | {"prompts": [{}]},
        lambda values: {key: value for key, value in values.items() if key != "tree"},
        lambda values: values | {"tree": values["tree"] | {"parent": [0] * 50}},
        lambda values: values | {"tree": values["tree"] | {"leaves": [10**9]}},
        lambda values: values | {"sigmas": "x"},
        lambda values: values | {"sigmas": [10**400]},
        lambda values: values | {"image_size": [1]},
    ],
)
def test_damaged_groups(folder, change):
    _rewrite(folder / "groups" / "step-000007.zip", change)
    with pytest.raises(DamagedRecord, match=r"step-000007\.zip"):
        load_run(folder).groups[7]


def test_a_truncated_group(folder):
    path = folder / "groups" / "step-000007.zip"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedRecord, match="damaged \\(File is not a zip file\\)"):
        load_run(folder).groups[7]


def test_a_compressed_member_is_refused(folder):
    path = folder / "groups" / "step-000007.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("step.json", b" " * 1000)
    with pytest.raises(DamagedRecord, match="is compressed"):
        load_run(folder).groups[7]


def test_a_damaged_image(folder):
    group = load_run(folder).groups[7]
    with zipfile.ZipFile(group.path, "a") as archive:
        archive.writestr("001/999.webp", b"no image")
    with pytest.raises(DamagedRecord, match="image 999 of prompt 1: not a WebP image"):
        group.image(1, 999)


def test_a_damaged_evaluation_is_left_out(folder, caplog):
    (folder / "evaluations" / "step-000010.json").write_text("{}")
    assert [evaluation.step for evaluation in load_run(folder).evaluations] == [0, 20]
    assert "step-000010.json: damaged ('prompts' is missing). It is left out." in caplog.text


def test_a_number_that_is_too_large_for_a_float_is_damage(folder):
    path = folder / "evaluations" / "step-000010.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"guidance_scale": 10**400}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "loss": 10**400}) + "\n")
    run = load_run(folder)
    assert [evaluation.step for evaluation in run.evaluations] == [0, 20]
    assert [line["step"] for line in run.metrics] == list(range(21))
    (message,) = set_damaged_files_aside(folder)
    assert "guidance_scale has a value that is not a number" in message


def test_damaged_alarms_are_left_out(folder):
    with (folder / "alarms.jsonl").open("a") as file:
        file.write('{"step": \n[]\n{"step": 20}\n')
    assert [alarm["step"] for alarm in load_run(folder).alarms] == [10, 20]


def test_the_advantage_of_a_leaf_is_of_the_rows_for_which_it_counts(folder):
    # Leaf 4 completes the state of row 1, leaf 5 of row 2, and row 6 has no advantage.
    tree = GroupTree(
        parent=[-1, 0, 1, 1, 3, 2, 2],
        grid_index=[0, 1, 2, 2, 3, 3, 3],
        stochastic=[False, True, True, False, False, False, True],
        leaves=[4, 5, 6],
        image=[4, 5, 6],
        channel=[1, 2, 3],
        edges=[1, 2, 6],
    )
    assert tree.channel_per_state
    group = load_run(folder).groups[7]
    prompt = dataclasses.replace(group.prompts[0], advantage=[3.0, -1.0, math.nan])
    group = dataclasses.replace(group, tree=tree, prompts=[prompt])
    assert group.tree.credited_leaves == {1: [4], 2: [5], 6: [6]}
    np.testing.assert_equal(group.leaf_advantage(0), [3.0, -1.0, math.nan])
    shared = dataclasses.replace(tree, channel=[0, 0, 0])
    group = dataclasses.replace(group, tree=shared)
    assert group.leaf_advantage(0) == [3.0, 1.0, 1.0]
