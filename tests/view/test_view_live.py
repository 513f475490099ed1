"""Runs that train while the server shows them, and files that are damaged."""

import json
import os
import zipfile

import pytest
from records.fake_runs import write_run, write_runs
from view_client import check_again, client_of, get

from flowgrain.view import Catalog, metrics
from flowgrain.view.metrics import Curves, GrowingFile, Summary


@pytest.fixture
def demo(tmp_path, monkeypatch):
    check_again(monkeypatch)
    return write_run(tmp_path / "demo", steps=4, max_steps=8)


def append(folder, text):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def line(step, **values):
    return json.dumps({"step": step, "seconds": 1.5, **values}) + "\n"


def test_new_steps_are_shown(demo):
    client = client_of(demo)
    before = get(client, "/api/runs")["runs"][0]
    append(demo, line(5, **{"eval/towers": 0.875}))
    after = get(client, "/api/runs")["runs"][0]
    assert (before["step"], after["step"], after["last"]["towers"]) == (4, 5, 0.875)
    assert after["seconds"] == pytest.approx(before["seconds"] + 1.5)
    assert get(client, "/api/runs/demo/metrics")["step"][-1] == 5
    write_run(demo.parent / "other", steps=2, group_steps=1)
    assert get(client_of(demo.parent), "/api/runs/other")["group_steps"] == [1]


def test_only_new_bytes_are_parsed(demo, monkeypatch):
    parsed = []
    real = metrics.parse_metrics
    monkeypatch.setattr(metrics, "parse_metrics", lambda c: parsed.append(c) or real(c))
    curves = Curves(demo / "metrics.jsonl")
    curves.update()
    append(demo, line(5, kl=0.5))
    curves.update()
    curves.update()
    assert parsed[1:] == [line(5, kl=0.5).encode(), b""]
    assert curves.column("kl")[-1] == 0.5


def test_a_line_that_is_still_being_written_waits(demo):
    client = client_of(demo)
    append(demo, line(5)[:12])
    assert get(client, "/api/runs/demo/metrics")["step"][-1] == 4
    append(demo, line(5)[12:])
    assert get(client, "/api/runs/demo/metrics")["step"][-1] == 5
    assert get(client, "/api/runs/demo")["damaged"] == []


def test_a_resumed_run_is_read_again(demo):
    client = client_of(demo)
    assert get(client, "/api/runs/demo/metrics")["step"][-1] == 4
    new = demo / "new"
    new.write_text(line(0) + line(1, kl=0.25))
    new.replace(demo / "metrics.jsonl")
    found = get(client, "/api/runs/demo/metrics")
    assert (found["step"], found["columns"]["kl"]) == ([0, 1], [None, 0.25])
    assert get(client, "/api/runs")["runs"][0]["step"] == 1
    (demo / "metrics.jsonl").write_text(line(0))  # the same file, but shorter
    assert get(client, "/api/runs/demo/metrics")["step"] == [0]
    (demo / "metrics.jsonl").unlink()
    assert get(client, "/api/runs/demo/metrics")["step"] == []


def test_a_file_that_does_not_exist_yet(tmp_path):
    file = GrowingFile(tmp_path / "metrics.jsonl")
    assert file.read_new() == (b"", False)
    (tmp_path / "metrics.jsonl").write_bytes(b"a\nb")
    assert file.read_new() == (b"a\n", True)
    assert file.read_new() == (b"", False)


def test_the_summary_agrees_with_the_curves(demo):
    append(demo, '{"step": 5, "seconds": 1.2.3}\nnot JSON "eval/towers"\n')
    summary, curves = Summary(demo / "metrics.jsonl"), Curves(demo / "metrics.jsonl")
    summary.update()
    curves.update()
    assert summary.last["step"] == curves.column("step")[-1] == 4
    assert summary.seconds == pytest.approx(curves.total(["seconds"])[-1])
    steps = [step for step, _ in summary.scores("eval/", ["towers"])["towers"]]
    assert steps == [0, 2, 4]
    assert [found.number for found in curves.damaged] == [6, 7]


def test_changes_are_told_since_a_version(tmp_path, monkeypatch):
    check_again(monkeypatch)
    paths = write_runs(tmp_path, 3, steps=2)
    catalog = Catalog([tmp_path])
    catalog.refresh()
    seen = catalog.version
    catalog.refresh()
    assert catalog.changed_since(seen) == []
    append(paths[1], line(3))
    catalog.refresh()
    catalog.refresh()
    assert catalog.changed_since(seen) == ["run-001"]
    write_run(tmp_path / "run-003", steps=2)
    paths[0].rename(tmp_path.parent / "gone")
    catalog.refresh()
    assert set(catalog.changed_since(seen)) == {"run-000", "run-001", "run-003"}


def test_files_are_checked_at_most_once_a_second(tmp_path, monkeypatch):
    catalog, checks = Catalog([tmp_path]), []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: checks.append(path) or real(path))
    for _ in range(5):
        catalog.entries("run")
    assert len(checks) == 1


def test_a_new_file_with_the_number_of_the_old_one(demo):
    client = client_of(demo)
    assert get(client, "/api/runs/demo/metrics")["step"][-1] == 4
    lines = [line(step, kl=0.25) for step in range(40)]
    (demo / "metrics.jsonl").write_text("".join(lines))  # longer than before
    assert get(client, "/api/runs/demo/metrics")["step"] == list(range(40))
    assert get(client, "/api/runs")["runs"][0]["seconds"] == 60


def test_a_pipe_in_place_of_the_metrics(demo):
    (demo / "metrics.jsonl").unlink()
    os.mkfifo(demo / "metrics.jsonl")
    client = client_of(demo)
    assert get(client, "/api/runs")["runs"][0]["step"] == 0
    assert get(client, "/api/runs/demo/metrics")["step"] == []


GARBAGE = {
    "empty": b"",
    "zeros": bytes(64),
    "text": b"hello",
    "half": b'{"step": 3, "config": {"na',
    "list": b"[1, 2]",
    "other types": b'{"step": "x", "config": [], "tree": 3, "prompts": {"a": 1}, "scores": []}',
    "deep": b"[" * 5000,
    "nested": b'{"a":' * 900 + b"1" + b"}" * 900 + b"\n",
    "huge": b'{"step": 1%s, "seconds": 1%s, "seed": 1%s}\n' % ((b"0" * 400,) * 3),
    "endless": b'{"step": 1%s, "config": {"runtime": {"seed": 1}}}\n' % (b"0" * 5000),
    "settings": b"config: {runtime: {seed: 0x1%s, max_steps: 1%s}}\n" % (b"0" * 6000, b"0" * 400),
    "not UTF-8": b"\xff\xfe\x00",
    "dates": b"config: {name: 2026-01-01, 2026-01-02: {1, 2}}\n",
}
FILES = (
    *("run.yaml", "metrics.jsonl", "alarms.jsonl", "best.json", "calibration.json", ".lock.json"),
    *("groups/step-000004.zip", "evaluations/step-000002.json", "evaluations/images-000002.zip"),
    "arena/votes.jsonl",
)
PATHS = (
    *("", "/metrics", "/groups/4", "/groups/4/summary", "/groups/4/0/0.webp", "/evaluations"),
    *("/evaluations/2", "/evaluations/2/0.webp"),
)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", list(GARBAGE))
def test_damaged_files_are_left_out(tmp_path, file, content):
    damaged, _ = write_run(tmp_path / "demo", steps=4), write_run(tmp_path / "intact", steps=4)
    (damaged / "arena").mkdir()
    (damaged / file).write_bytes(GARBAGE[content])
    client = client_of(tmp_path)
    overview = get(client, "/api/runs")
    rows = [row["id"] for row in overview["runs"]]
    assert "intact" in rows
    assert ("demo" in rows) == (not overview["damaged"])
    for path in PATHS:
        answer = client.get(f"/api/runs/demo{path}")
        assert answer.status_code in (200, 404, 422), (path, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]
    assert get(client, "/api/sources")["sources"]
    a, b = ("run%3Aintact%404", "run%3Ademo%404")
    assert client.get(f"/api/votes?a={a}&b={b}").status_code in (200, 422)


def test_damaged_files_are_named(tmp_path):
    demo = write_run(tmp_path / "demo", steps=4)
    append(demo, "half a line\n")
    (demo / "best.json").write_text("{")
    (demo / "evaluations" / "step-000002.json").write_text("{}")
    client = client_of(tmp_path)
    notes = get(client, "/api/runs/demo")["damaged"]
    assert [note.split(":")[0] for note in notes] == ["metrics.jsonl", "best.json"]
    found = get(client, "/api/runs/demo/evaluations")
    assert [row["step"] for row in found["evaluations"]] == [0, 4]
    assert "step-000002.json" in found["damaged"][0]
    assert "step-000002.json" in get(client, "/api/sources")["damaged"][0]
    (demo / "run.yaml").write_text("config: [")
    client = client_of(tmp_path)
    assert "run.yaml" in get(client, "/api/runs")["damaged"][0]
    assert "run.yaml" in get(client, "/api/runs/demo", 422)["error"]


def test_a_compressed_member_is_not_expanded(tmp_path):
    demo = write_run(tmp_path / "demo", steps=4)
    with zipfile.ZipFile(demo / "groups" / "step-000004.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("step.json", "[" * 10_000_000)
    assert "compressed" in get(client_of(tmp_path), "/api/runs/demo/groups/4", 422)["error"]


def test_a_run_that_disappears_between_two_requests(demo, tmp_path):
    client = client_of(tmp_path)
    get(client, "/api/runs/demo")
    demo.rename(tmp_path.parent / "moved")
    get(client, "/api/runs/demo", 404)
    assert get(client, "/api/runs")["runs"] == []
