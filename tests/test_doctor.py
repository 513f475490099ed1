"""What the doctor finds, and what it says of what is not well."""

import psutil
import pytest

from flowgrain.planning.doctor import examine, memory
from flowgrain.config.schema import settings
from flowgrain.training.trainer import Run


def test_a_run_that_is_well(tiny, tmp_path):
    findings = {one.what: one for one in examine(tiny, tmp_path / "run")}
    assert all(one.well for one in findings.values()), findings
    assert {"versions", "device", "prompts", "forward", "decode", "reward oracle", "memory", "disk", "the run"} <= set(findings)
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_trained_on_and_held_out(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("two red circles\ntwo red circles\none blue square\n")
    s = settings({**tiny.model_dump(), "prompts": str(tmp_path / "a.txt"), "eval_prompts_file": str(tmp_path / "a.txt")})
    found = {one.what: one for one in examine(s, tmp_path / "run")}["prompts"]
    assert not found.well
    assert "1 of the former are repeats" in found.said
    assert "2 of the latter are trained on too" in found.said


def test_memory_by_part(tiny, tmp_path):
    run = Run(settings({**tiny.model_dump(), "ema_decay": 0.9, "kl_weight": 0.1}), tmp_path)
    found, count = memory(run).parts, sum(p.numel() for p in run.policy.transformer.parameters())
    assert found["transformer"] == found["gradients"] == found["EMA"] == found["reference"] == 4 * count
    assert found["AdamW"] == 8 * count
    lora = memory(Run(settings({**tiny.model_dump(), "lora_rank": 2}), tmp_path)).parts
    assert lora["AdamW"] < found["AdamW"] / 10


def test_what_is_not_well_is_told(tiny, tmp_path, monkeypatch):
    (tmp_path / "doctor_rewards.py").write_text("def broken(images, prompts):\n    raise OSError('server gone')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"total": 1000})())
    s = settings({**tiny.model_dump(), "rewards": "doctor_rewards:broken"})
    findings = {one.what: one for one in examine(s, tmp_path / "run")}
    assert not findings["reward doctor_rewards:broken"].well
    assert "server gone" in findings["reward doctor_rewards:broken"].said
    assert not findings["memory"].well
    assert "lora_rank=32" in findings["memory"].said


@pytest.mark.parametrize("method", ["densegrpo", "diffusionnft"])
def test_the_cost_is_the_plans(tiny, tmp_path, method):
    s = settings({"method": method, "num_steps": 4, "group_size": 3, "prompts_per_step": 2, "eval_rewards": ()})
    said = {one.what: one.said for one in examine(s, tmp_path)}["the run"]
    assert "sampling passes" in said
    assert ("of calibration" in said) == (method == "densegrpo")
