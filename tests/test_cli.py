"""The commands as a user types them."""

import json
import os
import shutil
import subprocess
import sys

import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def flowgrain(*words, cwd=None):
    command = [sys.executable, "-m", "flowgrain", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, check=False)


def test_plan():
    found = json.loads(flowgrain("plan", "g2rpo", "granularities=1,2,3", "--json").stdout)
    assert found["forward_passes"] == 1708
    assert found["published_forward_passes"] == 2188
    drawn = flowgrain("plan", "flow_grpo", "num_steps=4")
    assert "0~1~2~3-4#" in drawn.stdout


def test_errors_are_one_message():
    for words, message in (
        (["train", "granularity=1"], "did you mean 'granularities'"),
        (["train", "dmo"], "did you mean 'demo'"),
        (["train", "demo", "extra"], "write it as key=value"),
        (["train", "--resume", "nowhere"], "no run here"),
        (["evaluate", "shapes", "--steps", "0"], "--steps=0"),
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


def test_train_evaluate_sample_and_repeat(run, tmp_path):
    assert {path.name for path in run.iterdir()} >= {
        "run.yaml", "metrics.jsonl", "checkpoints", "images", "export", "report.html"
    }  # fmt: skip
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "reward/oracle", "advantage/std", "loss", "ratio/mean", "ratio/max", "clip_fraction", "grad_norm"} <= set(
        metrics[1]
    )
    found = json.loads(flowgrain("evaluate", run, "--steps", "4", "--json").stdout)
    oracle = next(r for r in found["results"] if r["metric"] == "oracle")
    assert oracle["mean"] == pytest.approx(metrics[-1]["eval/oracle"])
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
