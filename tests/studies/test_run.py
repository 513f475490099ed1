"""A comparison that is killed continues, and its results equal those of an uninterrupted one."""

import json
import multiprocessing
import sys
import time

import pytest
import torch
import yaml
from studies.test_comparison import SMALL

from flowgrain.settings import SettingsError
from flowgrain.studies.comparison import load_comparison
from flowgrain.studies.entries import plan_entries
from flowgrain.studies.measure import estimated_seconds, machine_speed
from flowgrain.studies.results import by_seed, read_comparison, results
from flowgrain.studies.run import run_comparison
from flowgrain.studies.workers import PRELOAD
from flowgrain.training import Interrupted, RunStopped

INTERRUPTED = 130


def run_in_process(file, folder, jobs):
    """Run the comparison in `file`. An interruption is written to `folder`/message.txt."""
    torch.set_num_threads(1)
    try:
        run_comparison(load_comparison(file), folder, jobs)
    except Interrupted as error:
        (folder / "message.txt").write_text(str(error))
        sys.exit(INTERRUPTED)


def start(file, folder, jobs):
    """A process that runs the comparison in `file`. All of them share a fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=run_in_process, args=(file, folder, jobs))
    process.start()
    return process


def wait_until(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process.is_alive(), process.exitcode
        time.sleep(0.01)


def metrics(folder, name):
    lines = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


@pytest.mark.slow
def test_a_killed_comparison_continues(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    comparison = load_comparison(file)
    run_comparison(comparison, whole)
    assert len(results(whole)) == 5

    process = start(file, cut, 1)
    wait_until(lambda: len(results(cut)) >= 2, process)
    process.kill()
    process.join()
    finished = {path: path.stat().st_mtime_ns for path in cut.glob("runs/*/result.json")}
    assert 2 <= len(finished) < 5

    process = start(file, cut, 2)
    wait_until(lambda: len(list(cut.glob("runs/*/metrics.jsonl"))) > len(finished), process)
    with pytest.raises(SettingsError, match="another process works on this comparison"):
        run_comparison(comparison, cut)
    process.terminate()
    process.join(120)
    assert process.exitcode == INTERRUPTED
    assert "Run the same command to continue" in (cut / "message.txt").read_text()

    seen = []
    state = run_comparison(comparison, cut, 2, lambda state, name: seen.append((state.done, name)))
    assert state.done == state.total == 5
    assert seen == [] or seen[-1][0] == 5
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    for entry in plan_entries(comparison):
        assert metrics(cut, entry.name) == metrics(whole, entry.name)
    for a, b in zip(results(cut), results(whole), strict=True):
        timed = ("seconds", "seconds/measure")
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed
        }

    with pytest.raises(SettingsError, match="other budget"):
        run_comparison(load_comparison(file, budget=400), cut)
    assert read_comparison(cut) == comparison
    check_results(whole, comparison)


def check_results(folder, comparison):
    """What was spent is what was planned, and every metric is measured at every number of steps."""
    of_runs = {r["label"] + str(r["seed"]): r for r in results(folder)}
    for entry in plan_entries(comparison):
        result = of_runs[entry.label + str(entry.config.runtime.seed)]
        assert result["units"] == entry.units
        assert result["rollouts"] == entry.config.training.max_steps
        assert result["stopped"] is None
    for result in of_runs.values():
        assert set(result["steps"]) == {"2", "3"}
        for of_steps in result["steps"].values():
            assert {"oracle", "towers", "preference", "frechet", "diversity"} <= set(of_steps)
    values = by_seed(results(folder), "mixgrpo", "oracle", 3, "oracle")
    assert values == {s: of_runs[f"mixgrpo{s}"]["steps"]["3"]["oracle"] for s in (1, 2)}


def test_a_broken_reward_gives_no_result(tmp_path, monkeypatch):
    (tmp_path / "compare_rewards.py").write_text(
        "def broken(images, prompts):\n    raise OSError('gone')\n"
    )
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    comparison = load_comparison(
        file, rewards=[["compare_rewards:broken"]], seeds=[1], methods=["mixgrpo"]
    )
    with pytest.raises(
        RunStopped, match=r"1 of 2 runs failed: mixgrpo\+compare_rewards:broken\+1: .*gone"
    ):
        run_comparison(comparison, tmp_path / "out")
    assert [r["label"] for r in results(tmp_path / "out")] == ["base"]


def test_a_diverged_run_is_a_result(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    overrides = [
        "optimizer.learning_rate=1e30",
        "optimizer.max_skipped_updates=1",
        "training.max_failed_rewards=1",
    ]
    comparison = load_comparison(file, seeds=[1], methods=["mixgrpo"], overrides=overrides)
    state = run_comparison(comparison, tmp_path / "out")
    (name,) = state.diverged
    assert name == "mixgrpo+oracle+1"
    assert "the model is destroyed: " in state.diverged[name]
    assert "images contain NaN or infinity" in state.diverged[name]
    result = next(r for r in results(tmp_path / "out") if r["label"] == "mixgrpo")
    assert result["stopped"] == state.diverged[name]


def test_the_time_of_a_run_is_estimated_from_the_speed_of_the_machine(tmp_path):
    entry = plan_entries(load_comparison("quick"))[0]
    speed = machine_speed(entry.config.with_changes({"sampling.batch_size": 8}))
    assert set(speed) == {"passes", "decodes", "scores"}
    assert all(rate > 0 for rate in speed.values())
    known = {"passes": 100.0, "decodes": 1000.0, "scores": 1000.0}
    config = entry.config
    per_step = len(config.tree().leaves) * config.training.prompts_per_step
    images = config.training.max_steps * per_step
    passes = entry.units - 2 * images  # each image is decoded and scored
    expected = (passes + entry.evaluation_passes) / 100 + 2 * images / 1000
    assert estimated_seconds(entry, known) == pytest.approx(expected)
