"""Comparisons: planned, killed, gone on with, told in one table and one page."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

from flowgrain import RunStopped, SettingsError
from flowgrain.studies.compare import Comparison, entries, load_comparison, method_names, results, run_comparison
from flowgrain.report.comparison import table, write_comparison
from flowgrain.shapes.features import diversity, features, frechet, true_features
from flowgrain.shapes.grammar import prompts

SMALL = {
    "name": "small",
    "methods": {"g2rpo": {"granularities": 1}, "mixgrpo": {"window_size": 1}},
    "rewards": {"oracle": "oracle"},
    "seeds": (1, 2),
    "budget": 500,
    "common": {"num_steps": 4, "group_size": 3, "prompts_per_step": 2, "eval_prompts": 4, "eval_num_steps": 2},
    "eval_steps": (2, 3),
    "eval_prompts": 4,
    "curve_points": 1,
}


def small(**changes) -> Comparison:
    return Comparison(**{**SMALL, **changes})


def test_the_budget_is_kept_and_used():
    for entry in entries(small()):
        each = entry.units / entry.settings.max_steps
        assert entry.units <= 500 < entry.units + 1.5 * each, entry.name
    for entry in entries(small(unit="updates", budget=3)):
        assert entry.settings.max_steps == 3
    for entry in entries(small(unit="seconds", budget=7)):
        assert entry.settings.max_seconds == 7


def test_what_cannot_be_compared():
    with pytest.raises(SettingsError, match="budget=10: too small for one rollout of g2rpo; it needs"):
        entries(small(budget=10))
    with pytest.raises(SettingsError, match=r"two runs are named a_b\+oracle\+1"):
        entries(small(methods={"a b": {"method": "g2rpo"}, "a_b": {"method": "g2rpo"}}))
    with pytest.raises(SettingsError, match="mixgrpoo: method='mixgrpoo' does not exist; did you mean 'mixgrpo'"):
        entries(small(methods={"mixgrpoo": {}}))
    with pytest.raises(SettingsError, match="did you mean 'g2rpo'"):
        method_names("g2rp", "quick")
    with pytest.raises(SettingsError, match="stands there twice"):
        method_names("g2rpo,G2RPO", "quick")
    with pytest.raises(SettingsError, match="did you mean 'quick'"):
        load_comparison("quik", {})
    with pytest.raises(SettingsError, match="seed=3: a comparison sets this"):
        entries(small(override={"seed": 3}))
    with pytest.raises(SettingsError, match="budget"):
        load_comparison("quick", {"budget": -1})


def test_the_command_line_comes_last_and_the_methods_keep_their_own():
    chosen = method_names("mixgrpo,densegrpo", "full")
    assert chosen["mixgrpo"]["window_size"] == 2
    assert "psi" in chosen["densegrpo"]
    c = load_comparison("full", {"methods": chosen, "override": {"learning_rate": "0.5"}})
    assert {e.settings.learning_rate for e in entries(c)} == {0.5}


def test_a_broken_reward_is_no_result(tmp_path, monkeypatch):
    (tmp_path / "compare_rewards.py").write_text("def broken(images, prompts):\n    raise OSError('gone')\n")
    monkeypatch.chdir(tmp_path)
    c = small(rewards={"mine": "compare_rewards:broken"}, seeds=(1,), methods={"mixgrpo": {"window_size": 1}})
    with pytest.raises(RunStopped, match="gone"):
        run_comparison(c, tmp_path / "out")
    assert [r["label"] for r in results(tmp_path / "out")] == ["base"]


def test_bundled_comparisons_can_be_planned():
    assert len(entries(load_comparison("full", {}))) == 7 * 2 * 5
    assert len(entries(load_comparison("quick", {}))) == 6
    assert {e.settings.eval_split for e in entries(load_comparison("sweep", {}))} == {"validation"}
    of_sweep = {e.settings.seed for e in entries(load_comparison("sweep", {}))}
    assert not of_sweep & {e.settings.seed for e in entries(load_comparison("full", {}))}


def metrics(folder, name):
    lines = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def test_a_killed_comparison_goes_on(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(SMALL))))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    c = load_comparison(str(file), {})
    run_comparison(c, whole)
    assert len(results(whole)) == 5

    words = [sys.executable, "-m", "flowgrain", "compare", str(file), "--jobs", "1", "--out", str(cut)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    deadline = time.time() + 120
    while time.time() < deadline and len(results(cut)) < 2:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in cut.glob("runs/*/result.json")}
    assert 2 <= len(finished) < 5
    in_two = [*words[:-3], "2", *words[-2:]]
    process = subprocess.Popen(in_two, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and len(list(cut.glob("runs/*/metrics.jsonl"))) <= len(finished):
        time.sleep(0.05)
    with pytest.raises(SettingsError, match="another process works on this comparison"):
        run_comparison(c, cut)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 130, told
    assert "the same command goes on from here" in told
    run_comparison(c, cut, 2)
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())  # they were not run again
    for entry in entries(c):
        assert metrics(cut, entry.name) == metrics(whole, entry.name)
    for a, b in zip(results(cut), results(whole), strict=True):
        assert a["steps"] == b["steps"]

    with pytest.raises(SettingsError, match="other budget"):
        run_comparison(small(budget=600), cut)

    rows = table(c, results(whole), "oracle", 3)
    assert [row.label for row in rows] == ["g2rpo", "mixgrpo"]
    runs = {(r["label"], r["seed"]): r["steps"]["3"]["oracle"] for r in results(whole) if r["seed"]}
    expected = np.mean([runs["mixgrpo", seed] - runs["g2rpo", seed] for seed in (1, 2)])
    assert rows[1].against["oracle"][0] == pytest.approx(expected)
    assert rows[0].seeds == 2
    page = write_comparison(whole).read_text()
    for word in ("mixgrpo", "frechet", "diversity", "data:image/png"):
        assert word in page


def test_frechet_and_diversity():
    """Gaussians of known mean and covariance; true renderings are near each other, noise is far."""
    random = np.random.default_rng(0)
    a = random.normal(size=(20_000, 3))
    b = random.normal(size=(20_000, 3)) * [2, 1, 1] + [1, 0, 0]
    assert frechet(a, b) == pytest.approx(1 + 1 + 4 - 2 * 2, abs=0.1)  # |mean|^2 + tr(1 + 4 - 2 sqrt(4)) on one axis
    assert diversity(np.array([[0.0, 0], [3, 4], [1, 1], [1, 1]]), 2) == pytest.approx(2.5)
    held = list(prompts("held-out"))[:128]
    assert frechet(true_features(held, 0), true_features(held, 1)) < 0.2
    assert frechet(true_features(held, 0), features(torch.rand(128, 3, 32, 32))) > 2
