"""Progress without a terminal, and the score after every training."""

import json
import re

from command_line import SMALL, flowgrain, succeeded

from flowgrain.cli import progress
from flowgrain.cli.progress import ProgressDisplay
from flowgrain.units import duration

NO_EVALUATION_SETTING = [word for word in SMALL if not word.startswith("evaluation.every")]


def test_a_line_per_step_without_a_terminal(directory, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    result = flowgrain("train", "g2rpo", *SMALL, "training.max_steps=3", "--out", "run")
    assert result.status == 0
    first, *lines = result.stderr.splitlines()
    assert first == "watch: feature network shapes; action at an alarm warn"
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        left = r", [\d.]+ s left" if number < 3 else ""
        assert re.fullmatch(
            rf"step {number}/3, towers -?\d\.\d{{3}}, [\d,]+ passes/s{left}", line
        ) or re.fullmatch(rf"step {number}/3, oracle -?\d\.\d{{3}}, [\d,]+ passes/s{left}", line)


def test_lines_are_rare(capsys, monkeypatch):
    now = iter([0.0, *range(1, 1001)])
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with ProgressDisplay("step", 100, 1100) as display:
        for step in range(101, 1101):
            display.show(step, text="[red] 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 999 // 30 + 1
    assert lines[0] == "step 101/1100, [red] 0.5, 17 min left"
    assert lines[-1] == "step 1100/1100, [red] 0.5"


def test_an_evaluation_shows_its_chunks(directory):
    result = flowgrain("evaluate", "shapes", "evaluation.num_prompts=70", "--steps", "1")
    assert result.status == 0
    assert "chunk 1/2, " in result.stderr
    assert "chunk 2/2\n" in result.stderr


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_training_ends_with_a_score(directory):
    output = succeeded("train", "g2rpo", *NO_EVALUATION_SETTING, "--out", "run")
    assert re.search(r"Held-out oracle \d\.\d{3} -> \d\.\d{3}", output)
    metrics = metrics_of(directory / "run")
    assert ["eval/oracle" in line for line in metrics] == [True, False, True]
    # A resumed run is evaluated after its new last step.
    output = succeeded("train", "--resume", "run", "training.max_steps=3")
    assert re.search(r"Held-out oracle \d\.\d{3} -> \d\.\d{3}", output)
    metrics = metrics_of(directory / "run")
    assert ["eval/oracle" in line for line in metrics] == [True, False, True, True]


def test_the_score_is_short_and_can_be_switched_off(directory):
    words = [word for word in NO_EVALUATION_SETTING if "num_prompts" not in word]
    succeeded("train", "g2rpo", *words, "training.max_steps=1", "--out", "run")
    evaluation = json.loads((directory / "run/evaluations/step-000001.json").read_text())
    assert len(evaluation["prompts"]) == 64
    output = succeeded("train", "g2rpo", *SMALL, "--out", "off")
    assert "Held-out" not in output
    assert not any((directory / "off" / "evaluations").iterdir())


def test_durations():
    times = (0.04, 9, 45, 100, 3600, 7200, 90 * 3600)
    words = ["0.0 s", "9.0 s", "45 s", "2 min", "60 min", "2.0 h", "3.8 days"]
    assert [duration(seconds) for seconds in times] == words
