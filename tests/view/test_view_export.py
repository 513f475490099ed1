"""Static exports."""

import base64
import json
import re

import pytest
from command_line import flowgrain, refused, succeeded
from records.fake_runs import write_run

from flowgrain.view import Catalog, export
from flowgrain.view.assets import Assets
from flowgrain.view.export import render


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "runs" / "demo", steps=20, group_steps=3, evaluations=5, images=3)
    write_run(tmp_path / "runs" / "a b", steps=4, group_steps=1, size=80, thumbnail=48)
    return tmp_path / "runs"


def data_of(page):
    """The answers in a page."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    return json.loads(text)


def test_one_file_has_everything(runs, tmp_path):
    text = succeeded("view", runs, "--export", tmp_path / "out" / "page.html")
    page = (tmp_path / "out" / "page.html").read_text()
    data = data_of(page)
    assert [row["id"] for row in data["/api/runs"]["runs"]] == ["a b", "demo"]
    demo = data["/api/runs/demo"]
    assert (demo["group_steps"], demo["evaluation_steps"]) == ([20], [0, 20])
    assert len(data["/api/runs/demo/metrics"]["step"]) == 21
    assert len(data["/api/runs/demo/evaluations"]["evaluations"]) == 5
    assert data["/api/runs/a%20b/groups/1"]["step"] == 1
    image = data["/api/runs/demo/groups/20/0/3.webp"]
    assert base64.b64decode(image.removeprefix("data:image/webp;base64,"))[8:12] == b"WEBP"
    full = data["/api/runs/a%20b/groups/1"]["prompts"][0]["full"]
    for place in full:
        name = f"/api/runs/a%20b/groups/1/0/{place}.webp"
        assert len(data[f"{name}?full=1"]) > len(data[name])
    sources = [row["id"] for row in data["/api/sources"]["sources"]]
    assert sources == ["run:a b@0", "run:a b@4", "run:demo@0", "run:demo@20"]
    assert data["/api/sources/run%3Ademo%4020"]["prompts"]
    assert data["/api/sources/run%3Ademo%4020/2.webp"].startswith("data:image/webp")
    images = sum(name.partition("?")[0].endswith(".webp") for name in data)
    assert f"2 runs, {images} images" in text
    assert not list(runs.glob("*/arena"))


def test_nothing_is_loaded_from_elsewhere(runs, tmp_path):
    succeeded("view", runs, "--export", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    html = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src data: 'sha256-")
    assert "unsafe" not in policy
    imports = json.loads(re.search(r'<script type="importmap">(.*?)</script>', page)[1])["imports"]
    scripts = [name for name in Assets().names if name.endswith(".js")]
    assert len(imports) == len(scripts)
    for uri in imports.values():
        code = base64.b64decode(uri.removeprefix("data:text/javascript;base64,")).decode()
        names = re.findall(r"""^import .*?["']([^"']+)["']|from ["']([^"']+)["']""", code, re.M)
        assert {a or b for a, b in names} <= set(imports)
    main = re.search(r'<script type="module">import "(.*?)";</script>', page)[1]
    assert "main" in main
    assert main in imports


def test_a_directory_has_its_images_beside_the_page(runs, tmp_path):
    succeeded("view", runs / "demo", "--export", tmp_path / "out")
    data = data_of((tmp_path / "out" / "index.html").read_text())
    names = [value for name, value in data.items() if ".webp" in name]
    assert sorted(set(names)) == sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.webp")
    )
    succeeded("view", runs / "demo", "--export", tmp_path / "out")  # again
    assert "other files" in refused("view", runs, "--export", runs / "demo")


def test_the_size_is_bounded(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MEGABYTES", 0.002)
    result = flowgrain("view", runs, "--export", tmp_path / "page.html")
    data = data_of((tmp_path / "page.html").read_text())
    size = sum(len(value) for name, value in data.items() if ".webp" in name)
    assert 0 < size < 0.002 * 2**20 * 1.5
    assert re.search(r"left out: \d+ images", result.stderr)


def test_texts_cannot_end_the_script(runs, tmp_path):
    file = runs / "demo" / "evaluations" / "step-000020.json"
    values, text = json.loads(file.read_text()), "</script><script>alert(1)</script><!--"
    file.write_text(json.dumps({**values, "prompts": [text] * len(values["prompts"])}))
    succeeded("view", runs, "--export", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert text not in page
    assert data_of(page)["/api/runs/demo/evaluations/20"]["prompts"][0] == text


def test_damaged_files_are_left_out_with_a_note(runs, tmp_path):
    (runs / "demo" / "evaluations" / "step-000020.json").write_text("{")
    (runs / "a b" / "run.yaml").write_text("[")
    result = flowgrain("view", runs, "--export", tmp_path / "page.html")
    data = data_of((tmp_path / "page.html").read_text())
    assert result.status == 0
    assert "/api/runs/demo/evaluations/20" not in data
    assert [row["id"] for row in data["/api/runs"]["runs"]] == ["demo"]
    assert "step-000020.json" in result.stderr
    assert "run.yaml" in result.stderr


def test_no_directory_of_this_computer_is_exported(runs, tmp_path):
    (runs / "demo" / "evaluations" / "step-000020.json").write_text("{")
    (runs / "a b" / "run.yaml").write_text("[")
    (runs / "away").symlink_to(tmp_path)
    flowgrain("view", runs, "--export", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "folder" not in data_of(page)["/api/runs"]["runs"][0]
    assert "runs/a b/run.yaml" in str(data_of(page)["/api/runs"]["damaged"])
    assert str(tmp_path) not in json.dumps(data_of(page))


def test_nothing_to_export(tmp_path):
    assert "no run to export" in refused("view", tmp_path, "--export", tmp_path / "x.html")


def test_a_page_without_data_is_the_page_of_the_server():
    page = render(Assets(), {})
    assert data_of(page) == {}
    assert page.count("<script") == Assets().text("index.html").count("<script") + 1


def test_many_runs_have_fewer_points(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ALL_POINTS", 100)
    for name in ("a", "b"):
        write_run(tmp_path / name, steps=200, evaluations=0, group_steps=0)
    catalog = Catalog([tmp_path])
    data = dict(export.answers(catalog, catalog.entries("run"), []))
    assert len(data["/api/runs/a/metrics"]["step"]) == 50
