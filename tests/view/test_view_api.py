"""The answers of the server, on runs that no training wrote."""

import io
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from records.fake_runs import TEXTS, picture, write_run, write_runs
from view_client import check_again, client_of, get

from flowgrain.statistics import confidence_interval


@pytest.fixture
def runs(tmp_path):
    """Three runs, one of them below a comparison."""
    write_run(tmp_path / "demo", steps=30, group_steps=3, evaluations=4)
    write_run(tmp_path / "full" / "runs" / "g2rpo+towers+1", steps=6, method="g2rpo", seed=1)
    write_run(tmp_path / "full" / "runs" / "<b>bold</b>", steps=6, seed=2, running=True)
    return tmp_path


def test_the_list_of_runs(runs):
    found = get(client_of(runs), "/api/runs")
    rows = {row["id"]: row for row in found["runs"]}
    assert list(rows) == ["demo", "full/<b>bold</b>", "full/g2rpo+towers+1"]
    assert found["damaged"] == []
    demo = rows["demo"]
    lines = [json.loads(line) for line in (runs / "demo" / "metrics.jsonl").open()]
    towers = [line["eval/towers"] for line in lines if "eval/towers" in line]
    assert (demo["kind"], demo["method"], demo["model"]) == ("run", "flow_grpo", "shapes")
    assert (demo["step"], demo["max_steps"], demo["status"]) == (30, 30, "finished")
    assert demo["rewards"] == ["towers", "oracle"]
    assert (demo["first"]["towers"], demo["last"]["towers"]) == (towers[0], towers[-1])
    assert demo["best"]["towers"] == {"value": max(towers), "step": 30}
    assert demo["seconds"] == pytest.approx(sum(line.get("seconds", 0) for line in lines))
    assert (demo["alarms"], demo["seed"]) == (1, 0)
    assert demo["started"] <= demo["updated"]
    assert rows["full/<b>bold</b>"]["status"] == "running"


def test_a_run(runs):
    found = get(client_of(runs), "/api/runs/demo")
    record = yaml.safe_load((runs / "demo" / "run.yaml").read_text())
    assert found["config"] == record["config"]
    assert found["versions"] == record["versions"]
    assert found["group_steps"] == [1, 16, 30]
    assert found["evaluation_steps"] == [0, 10, 20, 30]
    assert found["alarms"][0]["monitor"] == "edge_density"
    assert found["best_checkpoint"] is found["calibration"] is None
    assert found["cost"]["forward_passes"] == 960 * 30
    assert set(found["cost"]["stages"]) == {"sample", "decode", "score", "update"}
    assert {"reward/towers", "eval/oracle", "monitor/diversity"} <= set(found["keys"])
    (runs / "demo" / "best.json").write_text('{"step": 20, "score": 0.6}')
    (runs / "demo" / "calibration.json").write_text('{"psi": [1.0]}')
    found = get(client_of(runs), "/api/runs/demo")
    assert found["best_checkpoint"] == {"step": 20, "score": 0.6}
    assert found["calibration"] == {"psi": [1.0]}


@pytest.mark.parametrize("id", ["full/g2rpo+towers+1", "full%2Fg2rpo%2Btowers%2B1"])
def test_an_id_with_slashes(runs, id):
    client = client_of(runs)
    assert get(client, f"/api/runs/{id}")["method"] == "g2rpo"
    assert get(client, f"/api/runs/{id}/metrics")["step"][-1] == 6
    assert get(client, f"/api/runs/{id}/groups/6")["step"] == 6


def test_metrics_in_few_points_are_means(runs):
    client = client_of(runs)
    lines = [json.loads(line) for line in (runs / "demo" / "metrics.jsonl").open()]
    found = get(client, "/api/runs/demo/metrics?keys=reward/towers,eval/towers,unknown&points=8")
    assert set(found["columns"]) == {"reward/towers", "eval/towers"}
    edges = np.linspace(0, len(lines), 9).astype(int)
    buckets = [lines[a:b] for a, b in itertools.pairwise(edges)]
    assert found["step"] == [bucket[-1]["step"] for bucket in buckets]
    for key, column in found["columns"].items():
        for value, bucket in zip(column, buckets, strict=True):
            values = [line[key] for line in bucket if key in line]
            assert value == (pytest.approx(np.mean(values)) if values else None)
    assert found["seconds"][-1] == pytest.approx(sum(line.get("seconds", 0) for line in lines))
    assert found["passes"][-1] == 30 * (960 + 64)
    full = get(client, "/api/runs/demo/metrics")
    assert full["step"] == [line["step"] for line in lines]
    assert full["columns"]["kl"] == [line.get("kl") for line in lines]


@pytest.mark.parametrize("points", ["0", "-1", "x", "1e3", "100000", "9" * 4000])
def test_wrong_points(runs, points):
    assert "points" in get(client_of(runs), f"/api/runs/demo/metrics?points={points}", 400)["error"]


def test_numbers_that_are_not_finite_are_null(runs):
    with (runs / "demo" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "kl": NaN, "loss": 1e999, "grad_norm": null}\n')
    columns = get(client_of(runs), "/api/runs/demo/metrics")["columns"]
    assert [columns[key][-1] for key in ("kl", "loss", "grad_norm")] == [None, None, None]


def test_groups(runs):
    client = client_of(runs)
    found = get(client, "/api/runs/demo/groups/16")
    assert (found["step"], found["num_steps"], len(found["prompts"])) == (16, 8, 3)
    assert len(found["tree"]["leaves"]) == len(found["prompts"][0]["rewards"]["towers"]) == 6
    assert found["prompts"][0]["rewards"]["oracle"][0] is None
    prompts = get(client, "/api/runs/demo/groups/16/summary")["prompts"]
    towers = found["prompts"][1]["rewards"]["towers"]
    assert prompts[1]["mean"]["towers"] == pytest.approx(np.mean(towers))
    assert prompts[1]["std"]["towers"] == pytest.approx(np.std(towers))
    assert [prompt["failed"] for prompt in prompts] == [1, 0, 0]
    assert [prompt["recorded"] for prompt in prompts] == [True, True, False]
    advantage = found["prompts"][1]["advantage"]
    assert prompts[1]["advantage"] == [min(advantage), max(advantage)]
    assert not prompts[1]["zero"]


def test_images_of_groups(runs):
    client = client_of(runs)
    answer = client.get("/api/runs/demo/groups/16/1/4.webp")
    assert answer.headers["content-type"] == "image/webp"
    image = np.array(Image.open(io.BytesIO(answer.content)))
    assert (image == picture(32, 4, 17)).all()
    full = get(client, "/api/runs/demo/groups/16")["prompts"][1]["full"]
    for place in (full[0], 1):  # a place without a full image has its thumbnail
        assert client.get(f"/api/runs/demo/groups/16/1/{place}.webp?full=1").status_code == 200
    for missing in ("16/2/0", "16/1/99", "15/0/0", "9" * 300 + "/0/0"):
        get(client, f"/api/runs/demo/groups/{missing}.webp", 404 if len(missing) < 99 else 422)


def test_an_image_of_a_group_that_was_written_again(runs, monkeypatch):
    check_again(monkeypatch)
    client, path = client_of(runs), "/api/runs/demo/groups/16/1/4.webp"
    first = client.get(path)
    assert first.headers["cache-control"] == "private, no-cache"
    known = {"If-None-Match": first.headers["etag"]}
    assert client.get(path, headers=known).status_code == 304
    groups = runs / "demo" / "groups"
    shutil.copy(groups / "step-000001.zip", groups / "step-000016.zip")
    again = client.get(path, headers=known)
    assert (again.status_code, again.content != first.content) == (200, True)


def test_evaluations(runs):
    client = client_of(runs)
    rows = get(client, "/api/runs/demo/evaluations")["evaluations"]
    record = get(client, "/api/runs/demo/evaluations/20")
    assert [row["step"] for row in rows] == [0, 10, 20, 30]
    interval = confidence_interval(np.array(record["scores"]["towers"]))
    assert rows[2]["means"]["towers"]["low"] == pytest.approx(interval.low)
    assert rows[2]["monitors"]["diversity"]["mean"] is not None
    assert (rows[0]["base"], set(rows[2]["base"]["towers"])) == ({}, {"mean", "low", "high", "std"})
    assert record["monitors"]["diversity"][0] is None
    assert (record["images"], record["prompts"][0]) == (8, TEXTS[0])
    answer = client.get("/api/runs/demo/evaluations/20/5.webp")
    assert (np.array(Image.open(io.BytesIO(answer.content))) == picture(32, 5, 20)).all()
    for missing in ("21", "20/8.webp"):
        get(client, f"/api/runs/demo/evaluations/{missing}", 404)


def test_an_image_that_the_browser_has(runs):
    client = client_of(runs)
    first = client.get("/api/runs/demo/evaluations/20/5.webp")
    again = client.get(
        "/api/runs/demo/evaluations/20/5.webp", headers={"If-None-Match": first.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")


def test_differences_of_settings(runs):
    path = "/api/diff?a=demo&b=full/g2rpo%2Btowers%2B1"
    rows = {row["path"]: (row["a"], row["b"]) for row in get(client_of(runs), path)["rows"]}
    assert rows["method.name"] == ("flow_grpo", "g2rpo")
    assert rows["runtime.seed"] == (0, 1)
    assert "sampling.num_steps" not in rows
    get(client_of(runs), "/api/diff?a=demo", 404)


def test_ids_are_unique_and_stay(tmp_path, monkeypatch):
    check_again(monkeypatch)
    write_runs(tmp_path / "b", 1, steps=2)
    client = client_of(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").mkdir()
    assert [row["id"] for row in get(client, "/api/runs")["runs"]] == ["run-000"]
    write_runs(tmp_path / "a", 1, steps=3)  # another run with the same name
    steps = {row["id"]: row["step"] for row in get(client, "/api/runs")["runs"]}
    assert steps == {"run-000": 2, "run-000-2": 3}
    shutil.rmtree(tmp_path / "b")
    assert [row["id"] for row in get(client, "/api/runs")["runs"]] == ["run-000-2"]


def test_a_run_directory_itself_and_names_of_addresses(tmp_path):
    write_run(tmp_path / "demo", steps=2)
    write_run(tmp_path / "groups", steps=2)
    bad_name = b"bad\xff".decode(errors="surrogateescape")
    write_run(tmp_path / "bad", steps=2).rename(tmp_path / bad_name)
    assert [row["id"] for row in get(client_of(tmp_path / "demo"), "/api/runs")["runs"]] == ["demo"]
    client = client_of(tmp_path)
    ids = [row["id"] for row in get(client, "/api/runs")["runs"]]
    assert ids == ["bad_", "demo", "groups_"]
    for id in ids:
        assert get(client, f"/api/runs/{id}")["step"] == 2


def test_the_search_has_a_bounded_depth(tmp_path):
    deep = tmp_path.joinpath(*"abcdefgh")
    write_run(deep, steps=2)
    write_run(tmp_path / "a" / "x", steps=2)
    assert [row["id"] for row in get(client_of(tmp_path), "/api/runs")["runs"]] == ["a/x"]


def test_a_run_without_evaluations_shows_rollouts(tmp_path):
    write_run(tmp_path / "demo", steps=5, evaluations=0)
    row = get(client_of(tmp_path), "/api/runs")["runs"][0]
    lines = [json.loads(line) for line in (tmp_path / "demo" / "metrics.jsonl").open()]
    values = [line["reward/towers"] for line in lines]
    assert (row["first"]["towers"], row["last"]["towers"]) == (values[0], values[-1])
    best = max(values)
    assert row["best"]["towers"] == {"value": best, "step": values.index(best) + 1}
    assert not math.isnan(row["seconds"])


def test_large_answers_are_compressed(runs):
    client = client_of(runs)
    answer = client.get("/api/runs/demo/metrics", headers={"Accept-Encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    image = client.get("/api/runs/demo/groups/16/1/4.webp", headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in image.headers
