"""The commands as a user types them."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest

from flowgrain.cli.main import main


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def flowgrain(*words) -> Done:
    """The command in this process: starting one costs seconds."""
    told, complained = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told), redirect_stderr(complained):
        patch.setattr(sys, "argv", ["flowgrain", *map(str, words)])
        patch.setenv("COLUMNS", "120")
        try:
            main()
            status = 0
        except SystemExit as left:
            status = int(left.code or 0)
    return Done(status, told.getvalue(), complained.getvalue())


def test_plan():
    """Once as a process, as a user starts it."""
    command = [sys.executable, "-m", "flowgrain", "plan", "g2rpo", "granularities=1,2,3", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["forward_passes"] == 1708
    assert found["published_forward_passes"] == 2188
    assert "0~1~2~3-4#" in flowgrain("plan", "flow_grpo", "num_steps=4").stdout


def test_errors_are_one_message():
    for words, message in (
        (["train", "granularity=1"], "did you mean 'granularities'"),
        (["train", "dmo"], "did you mean 'demo'"),
        (["train", "demo", "extra"], "write it as key=value"),
        (["train", "--resume", "nowhere"], "no run here"),
        (["evaluate", "shapes", "--steps", "0"], "--steps=0"),
        (["evaluate", "num_steps=3"], "names no model"),
        (["sample", "shapes", "--prompt", "a cat"], "three green circles"),
    ):
        done = flowgrain(*words)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    small = ["num_steps=4", "group_size=3", "prompts_per_step=2", "max_steps=2", "eval_prompts=6", "eval_every=1"]
    done = flowgrain("train", *small, "eval_num_steps=4", "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "Held-out" in done.stdout
    return folder


def test_train_evaluate_sample_and_repeat(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {path.name for path in run.iterdir()} >= {
        "run.yaml", "metrics.jsonl", "checkpoints", "images", "export", "report.html"
    }  # fmt: skip
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "reward/oracle", "advantage/std", "loss", "ratio/mean", "ratio/max", "clip_fraction", "grad_norm"} <= set(
        metrics[1]
    )
    found = json.loads(flowgrain("evaluate", run, "--steps", "4", "--json").stdout)
    assert found["rows"][0]["cells"]["oracle"]["value"]["mean"] == pytest.approx(metrics[-1]["eval/oracle"])
    shown = flowgrain("evaluate", "base", run, "--steps", "2", "--out", "here")
    assert "the difference to the first model" in shown.stdout
    assert {path.name for path in (tmp_path / "here").iterdir()} >= {"scores.parquet", "table.md", "table.json", "index.html"}
    picture = tmp_path / "two.png"
    done = flowgrain("sample", run, "--prompt", "three green circles", "--steps", "4", "--seed", "1", "--out", picture)
    assert done.returncode == 0, done.stderr
    assert picture.stat().st_size > 300
    done = flowgrain("train", run, "max_steps=1", "eval_every=0", "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1200])
def test_report_in_a_browser(run, width):
    """The page lays out without a sideways scroll bar and shows its images."""
    text = (run / "report.html").read_text()
    probe = (
        "<script>addEventListener('load',()=>{document.title=JSON.stringify({wide:document.documentElement.scrollWidth,"
        "view:innerWidth,broken:[...document.images].filter(i=>!i.naturalWidth).length,images:document.images.length})})</script>"
    )
    page = run / f"probe-{width}.html"
    page.write_text(text.replace("</body>", probe + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    command = ["chromium", *flags, f"--window-size={width},900", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120).stdout
    title = dom.split("<title>")[1].split("</title>")[0].replace("&quot;", '"')
    seen = json.loads(title)
    assert seen["images"] > 10
    assert seen["broken"] == 0
    assert seen["wide"] <= seen["view"]
