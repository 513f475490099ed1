"""The files on the pages of docs/extending train two steps through the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowgrain.cli.main import app

DOCS = Path(__file__).parents[2] / "docs" / "extending"
SMALL = (
    "training.max_steps=2",
    "training.prompts_per_step=2",
    "sampling.num_steps=6",
    "method.group_size=4",
)
RUNS = {
    "method": (40, "late_grpo.py", ["late_grpo", "method.start=0.25", *SMALL]),
    "reward": (
        40,
        "brightness.py",
        ["flow_grpo", "rewards=[{name: brightness, target: 0.3},color]", *SMALL],
    ),
    "backbone": (
        80,
        "pixels.py",
        [
            *("flow_grpo", "model.name=pixels", "rewards=[brightness]"),
            *("lora.rank=0", "optimizer.learning_rate=1e-3", *SMALL),
        ],
    ),
}


def first_block(page: str) -> str:
    """The first Python block of a page."""
    return re.search(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)[1]


@pytest.mark.parametrize("page", RUNS)
@pytest.mark.slow
def test_the_file_on_the_page_trains(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most_lines, file, words = RUNS[page]
    assert len(first_block(page).splitlines()) <= most_lines
    plugins = {file: first_block(page)}
    if page == "backbone":
        plugins["brightness.py"] = first_block("reward")
    for name, code in plugins.items():
        (tmp_path / name).write_text(code)
    options = [word for name in plugins for word in ("--plugin", name)]
    train = ["train", *words, *options, "--out", "run", "evaluation.num_prompts=2"]
    monkeypatch.chdir(tmp_path)
    if page == "method":  # a process of its own, as a user starts it
        subprocess.run([sys.executable, "-m", "flowgrain", *train], check=True, capture_output=True)
    else:
        result = CliRunner().invoke(app, train, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]  # step 0 is the evaluation before training
    assert all(line["grad_norm"] > 0 for line in lines[1:])
    assert Path("run/export/transformer/config.json").exists()


def test_rewards_that_compare_images_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The file with a reward and a pairwise judge, on the page about rewards."""
    page = (DOCS / "reward.md").read_text()
    (code,) = re.findall(r'```python\n("""closest\.py.*?)```', page, re.DOTALL)
    (tmp_path / "closest.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    rewards = "rewards=[closest,{name: pairwise, judge: {name: brighter, margin: 0.01}}]"
    train = ["train", "flow_grpo", rewards, *SMALL, "--plugin", "closest.py", "--out", "run"]
    result = CliRunner().invoke(app, [*train, "evaluation.num_prompts=2"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "rewards[pairwise] is not evaluated, because it compares the images" in caplog.text
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["failed/closest"] == line["failed/pairwise"] == 0
    assert line["reward/pairwise"] == pytest.approx(0.5)
    assert "eval/oracle" in line
    assert "eval/pairwise" not in line
