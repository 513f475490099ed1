"""Sources of images, and the votes of the arena."""

import json
import shutil
import threading
import zipfile

import numpy as np
import pyarrow
import pytest
from command_line import flowgrain, refused, succeeded
from PIL import Image
from pyarrow import parquet
from records.fake_runs import TEXTS, picture, write_run
from view_client import check_again, client_of, get

from flowgrain.image_data import check_image_files, load_images, read_image_data
from flowgrain.view import votes

A, B = "run:one@0", "run:one@4"
VOTE = {"a": A, "b": B, "place": 1, "left": "b", "vote": "b"}
IMAGES = ("a_image", "b_image")
HEADERS = {"X-Flowgrain": "1"}


@pytest.fixture
def folder(tmp_path):
    """A run, and an evaluation of the same prompts."""
    write_run(tmp_path / "one", steps=4, evaluations=2, images=4)
    write_evaluation(tmp_path / "table", ("base", "one"), images=True)
    return tmp_path


def write_evaluation(folder, labels, images):
    """Two chunks of every label at 16 steps with seed 0, as `flowgrain evaluate` writes them."""
    folder.mkdir()
    (folder / "evaluation.yaml").write_text(f"models: {json.dumps(dict.fromkeys(labels, 'x'))}\n")
    for number, label in enumerate(labels):
        for first in (0, 64):
            places = list(range(first, first + 64))
            columns = {
                "model": [label] * 64,
                "steps": [16] * 64,
                "seed": [0] * 64,
                "place": places,
                "prompt": [TEXTS[place % len(TEXTS)] for place in places],
                "towers": np.float32([place / 128 + number for place in places]),
                "oracle/missing": np.float32([0.0] * 64),
                "oracle/missing#weight": np.float32([1.0] * 64),
            }
            file = folder / "scores" / label / f"0016-0-{first:06d}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(pyarrow.table(columns), file)
            for place in places[:3] if images else ():
                path = folder / "images" / label / "0016-0" / f"{place:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(16, place)).save(path)


def test_sources_of_runs_and_evaluations(folder):
    client = client_of(folder)
    rows = {row["id"]: row for row in get(client, "/api/sources")["sources"]}
    table = ["evaluation:table:base@16-0", "evaluation:table:one@16-0"]
    assert list(rows) == [A, B, *table]
    assert (rows[B]["step"], rows[B]["images"], rows[B]["seed"]) == (4, 4, 0)
    assert rows[A]["prompts_key"] == rows[B]["prompts_key"] != rows[table[0]]["prompts_key"]
    found = get(client, f"/api/sources/{table[1]}")
    assert (found["num_steps"], found["images"], found["run"]) == (16, 128, "table")
    assert found["prompts"][:5] == [TEXTS[i % 4] for i in range(5)]
    assert found["scores"] == {"towers": pytest.approx([i / 128 + 1 for i in range(128)])}
    image = client.get("/api/sources/evaluation%3Atable%3Aone%4016-0/2.webp")
    assert (image.status_code, image.headers["content-type"]) == (200, "image/png")
    assert client.get("/api/sources/run%3Aone%404/2.webp").headers["content-type"] == "image/webp"
    for missing in ("run:one@3", "run:two@4", "run:one", "x", "evaluation:table:base@1-0"):
        get(client, f"/api/sources/{missing}", 404)
    get(client, f"/api/sources/{table[0]}/3.webp", 404)  # not kept
    overview = get(client, "/api/runs")["evaluations"]
    assert overview == [
        {
            "id": "table",
            "kind": "evaluation",
            "folder": str(folder / "table"),
            "labels": ["base", "one"],
            "steps": [16],
        }
    ]


def test_a_damaged_file_of_scores_is_left_out(folder):
    (folder / "table" / "scores" / "base" / "0016-0-000000.parquet").write_bytes(b"PAR1")
    client = client_of(folder)
    found = get(client, "/api/sources")
    assert "0016-0-000000.parquet" in found["damaged"][0]
    assert get(client, "/api/sources/evaluation:table:one@16-0")["images"] == 128
    assert (folder / "table" / "scores" / "base" / "0016-0-000000.parquet").exists()
    assert not (folder / "table" / "scores.parquet").exists()


def test_a_vote_is_on_the_disk_and_counts(folder):
    client = client_of(folder)
    for vote in ("b", "b", "a", "tie"):
        answer = client.post("/api/votes", json={**VOTE, "vote": vote}, headers=HEADERS)
        assert answer.status_code == 201
        assert answer.json()["prompt"] == TEXTS[1]
    lines = [json.loads(line) for line in (folder / "one/arena/votes.jsonl").open()]
    assert [line["vote"] for line in lines] == ["b", "b", "a", "tie"]
    assert set(lines[0]) == {"time", "a", "b", "prompt", "place", "left", "vote", *IMAGES}
    found = get(client, f"/api/votes?a={A}&b={B}")
    assert (found["wins_a"], found["wins_b"], found["ties"]) == (1, 2, 1)
    assert found["win_rate"]["mean"] == (1 + 0.5) / 4
    assert 0 < found["win_rate"]["low"] < 0.375 < found["win_rate"]["high"] < 1
    swapped = get(client, f"/api/votes?a={B}&b={A}")
    assert (swapped["wins_a"], swapped["wins_b"], swapped["ties"]) == (2, 1, 1)
    assert [vote["left"] for vote in swapped["votes"]] == ["a"] * 4
    get(client, "/api/votes?a=x&b=y", 404)


WRONG = {
    "no object": [],
    "text": "x",
    "no source": {**VOTE, "b": "run:two@4"},
    "one source": {**VOTE, "b": A},
    "no place": {**VOTE, "place": 4},
    "negative place": {**VOTE, "place": -1},
    "true": {**VOTE, "place": True},
    "left": {**VOTE, "left": "c"},
    "vote": {**VOTE, "vote": ["a"]},
    "other prompts": {**VOTE, "b": "evaluation:table:base@16-0", "a": "run:other@2"},
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_vote_is_refused(folder, name):
    write_run(folder / "other", steps=2, images=4)
    file = folder / "other" / "evaluations" / "step-000002.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "prompts": ["other"] * len(values["prompts"])}))
    answer = client_of(folder).post("/api/votes", json=WRONG[name], headers=HEADERS)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]
    assert not list(folder.glob("*/arena"))


def test_votes_of_several_tabs_at_once(folder):
    client = client_of(folder)

    def vote():
        for _ in range(10):
            client.post("/api/votes", json=VOTE, headers=HEADERS)

    tabs = [threading.Thread(target=vote) for _ in range(4)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    assert get(client, f"/api/votes?a={A}&b={B}")["wins_b"] == 40


def test_a_half_written_vote_is_left_out(folder):
    file = folder / "one" / "arena" / "votes.jsonl"
    file.parent.mkdir()
    file.write_text('{"time": "2026-01-01", "a": "run:on')
    client = client_of(folder)
    assert client.post("/api/votes", json=VOTE, headers=HEADERS).status_code == 201
    assert get(client, f"/api/votes?a={A}&b={B}")["wins_b"] == 1
    assert len(file.read_text().splitlines()) == 2


def test_a_full_file_of_votes(folder, monkeypatch):
    monkeypatch.setattr(votes, "MAX_BYTES", 100)
    client = client_of(folder)
    assert client.post("/api/votes", json=VOTE, headers=HEADERS).status_code == 201
    answer = client.post("/api/votes", json=VOTE, headers=HEADERS)
    assert (answer.status_code, "Move it away" in answer.json()["error"]) == (400, True)


def check_pairs(file, image):
    """The data set is what `data.pairs` of Diffusion-DPO reads."""
    found = read_image_data("pairs", str(file)).prompts
    check_image_files(found)
    assert [prompt.text for prompt in found] == [TEXTS[1], TEXTS[2]]
    chosen, rejected = (load_images(found[0], 32, 32) * 255).round().byte().numpy()
    assert (chosen.transpose(1, 2, 0) == image(4)).all()
    assert (rejected.transpose(1, 2, 0) == image(0)).all()


def test_votes_become_a_data_set_of_pairs(folder, tmp_path):
    client = client_of(folder)
    path = f"/api/votes/export?a={A}&b={B}"
    get(client, path, 404)
    for vote in (VOTE, {**VOTE, "vote": "tie"}, {**VOTE, "place": 2, "vote": "a"}):
        client.post("/api/votes", json=vote, headers=HEADERS)
    answer = client.get(path)
    assert answer.headers["content-type"] == "application/zip"
    (tmp_path / "pairs.zip").write_bytes(answer.content)
    zipfile.ZipFile(tmp_path / "pairs.zip").extractall(tmp_path / "pairs")
    check_pairs(tmp_path / "pairs" / "pairs.jsonl", lambda step: picture(32, 1, step))
    out = tmp_path / "preferences"
    text = succeeded("view", folder, "--export-votes", out)
    assert "2 pairs" in text
    check_pairs(out / "pairs.jsonl", lambda step: picture(32, 1, step))
    assert "not empty" in refused("view", folder, "--export-votes", out)


def test_votes_on_images_that_are_gone_are_left_out(folder, tmp_path):
    client = client_of(folder)
    for vote in (VOTE, {**VOTE, "a": "evaluation:table:base@16-0", "place": 0}):
        client.post("/api/votes", json=vote, headers=HEADERS)
    (folder / "table" / "images" / "base" / "0016-0" / "000000.png").unlink()
    result = flowgrain("view", folder, "--export-votes", tmp_path / "out")
    assert result.status == 0
    assert "left out: vote of" in result.stderr
    assert "1 pairs" in result.stdout


def test_votes_on_other_images_do_not_count(folder, tmp_path, monkeypatch):
    check_again(monkeypatch)
    client, tally = client_of(folder), f"/api/votes?a={A}&b={B}"
    file = folder / "one" / "arena" / "votes.jsonl"
    client.post("/api/votes", json=VOTE, headers=HEADERS)
    vote = json.loads(file.read_text())
    old = {name: value for name, value in vote.items() if name not in IMAGES}
    for other in (old, {**vote, "a_image": vote["b_image"]}, {**vote, "b_image": None}):
        with file.open("a") as lines:
            lines.write(json.dumps(other) + "\n")
    assert get(client, tally)["votes"] == [vote]
    assert get(client, f"/api/votes?a={B}&b={A}")["votes"][0]["b_image"] == vote["a_image"]
    evaluations = folder / "one" / "evaluations"
    shutil.copy(evaluations / "images-000000.zip", evaluations / "images-000004.zip")
    assert get(client, tally)["votes"] == []
    get(client, tally.replace("?", "/export?"), 404)
    assert "Vote in the arena" in refused("view", folder, "--export-votes", tmp_path / "out")


def test_votes_do_not_move_to_another_run(tmp_path):
    x = write_run(tmp_path / "x" / "one", steps=4, images=4, size=32)
    y = write_run(tmp_path / "y" / "one", steps=4, images=4, size=48)
    vote, tally = {**VOTE, "b": "run:one-2@4"}, "/api/votes?a=run:one@0&b=run:one-2@4"
    client_of(x, y).post("/api/votes", json=vote, headers=HEADERS)
    assert get(client_of(x, y), tally)["wins_b"] == 1
    assert get(client_of(y, x), tally)["votes"] == []


def test_no_votes(folder, tmp_path):
    assert "Vote in the arena" in refused("view", folder, "--export-votes", tmp_path / "out")
