"""The findings of the doctor, and the advice in those that failed."""

import psutil
import pytest
import torch

from flowgrain.config import load_config
from flowgrain.models.shapes import ShapesBackbone
from flowgrain.planning import doctor, first_step
from flowgrain.planning.doctor import examine
from flowgrain.planning.rehearse import RehearsalError
from flowgrain.training import fit


def findings_of(config, folder):
    return {finding.name: finding for finding in examine(config, folder)}


def test_a_run_without_problems(tiny, tmp_path):
    findings = findings_of(tiny, tmp_path / "run")
    assert all(finding.ok for finding in findings.values()), findings
    assert set(findings) == {
        "versions",
        "device",
        "memory",
        "disk",
        "prompts",
        "encoding",
        "forward pass",
        "decoding",
        "reward oracle",
        "cost",
    }
    assert "s per step" in findings["cost"].message
    assert not (tmp_path / "run").exists()


def test_prompts_for_training_and_evaluation(tiny, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("two red circles\ntwo red circles\none blue square\n")
    config = tiny.with_changes({"data.prompts": str(file), "data.eval_prompts": str(file)})
    found = findings_of(config, tmp_path / "run")["prompts"]
    assert not found.ok
    assert "1 training prompts are repeats" in found.message
    assert "2 evaluation prompts are also training prompts" in found.message


def test_memory_is_checked_before_the_model_is_loaded(tiny, tmp_path, monkeypatch):
    small = type("Memory", (), {"total": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", small)
    monkeypatch.setattr(doctor, "Trainer", None)  # calling it would fail
    findings = findings_of(tiny, tmp_path / "run")
    assert not findings["memory"].ok
    message = findings["memory"].message
    assert "The model was not loaded. The largest part is " in message
    assert "Try lora.rank=32, model.gradient_checkpointing=true or more GPUs." in message
    assert findings["cost"].ok
    assert "forward pass" not in findings
    lora = findings_of(tiny.with_changes({"lora.rank": 4}), tmp_path / "run")
    assert "lora.rank=32" not in lora["memory"].message


def test_a_model_that_is_loaded_to_measure_its_size(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", type("Memory", (), {"total": 1000}))
    monkeypatch.setattr(doctor, "model_size", lambda *_: None)
    memory = findings_of(tiny, tmp_path / "run")["memory"]
    assert not memory.ok
    assert "not loaded" not in memory.message
    assert "This does not fit. The largest part is " in memory.message


def test_the_memory_is_that_of_the_container_and_the_advice_is_about_the_largest_part(
    tiny, tmp_path, monkeypatch
):
    limit = tmp_path / "memory.max"
    limit.write_text("100000000")
    monkeypatch.setattr(fit, "_CGROUP", limit)
    config = tiny.with_changes({"training.prompts_per_step": 5000})
    message = findings_of(config, tmp_path / "run")["memory"].message
    assert " of 0.10 GB, without activations" in message
    assert "The largest part is latents. Try a smaller training.prompts_per_step" in message
    assert "lora.rank" not in message


def test_a_run_is_rehearsed_with_its_context_parallelism(tmp_path, monkeypatch):
    """The doctor itself runs in one process."""
    config = load_config("flux/g2rpo", {"runtime.context_parallel": 2, "data.prompts": "a.txt"})
    asked = []

    def rehearsed(config, gpus, gpu):
        asked.append((config.runtime.context_parallel, gpus))
        raise RehearsalError("no such operator", "Traceback")

    monkeypatch.setattr(psutil, "virtual_memory", type("Memory", (), {"total": 1e12}))
    monkeypatch.setattr(fit, "_CGROUP", tmp_path / "none")
    monkeypatch.setattr(first_step, "rehearse", rehearsed)
    findings = {finding.name: finding for finding in examine(config, tmp_path / "run", gpus=8)}
    assert asked.pop() == (2, 8)
    assert not findings["first step"].ok
    assert findings["first step"].message.startswith("The rehearsal fails: no such operator")
    assert "processes" not in findings
    findings = {finding.name: finding for finding in examine(config, tmp_path / "run", gpus=3)}
    assert not findings["processes"].ok
    assert "--gpus 3 is not a multiple of 2" in findings["processes"].message


def test_a_full_disk(tiny, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    disk = findings_of(tiny, tmp_path / "run")["disk"]
    assert not disk.ok
    assert "lower training.keep_checkpoints=2" in disk.message


def test_records_that_are_larger_than_the_checkpoints(tiny, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    changes = {"training.max_steps": 1000, "training.record.megabytes": 9000}
    changes |= {"training.record.steps": 1000, "training.record.prompts": 500}
    config = tiny.with_changes({**changes, "training.prompts_per_step": 500})
    disk = findings_of(config, tmp_path / "run")["disk"]
    assert "for recorded groups" in disk.message
    assert "lower training.record.megabytes=9000" in disk.message


def test_a_reward_that_fails(tiny, tmp_path, monkeypatch):
    (tmp_path / "doctor_rewards.py").write_text(
        "def broken(images, prompts):\n    raise OSError('server gone')\n"
    )
    monkeypatch.chdir(tmp_path)
    config = tiny.with_changes({"rewards": ["doctor_rewards:broken"]})
    found = findings_of(config, tmp_path / "run")["reward doctor_rewards:broken"]
    assert not found.ok
    assert "server gone" in found.message


def test_parts_of_the_model_that_fail(tiny, tmp_path, monkeypatch):
    def no_decoder(self, latents):
        raise RuntimeError("no decoder")

    monkeypatch.setattr(ShapesBackbone, "decode", no_decoder)
    findings = findings_of(tiny, tmp_path / "run")
    assert "no decoder" in findings["decoding"].message
    assert "decoding failed" in findings["reward oracle"].message
    assert findings["forward pass"].ok


def test_approximate_tails(tiny, tmp_path):
    config = tiny.with_changes({"sampling.num_steps": 6, "sampling.tail_cache": "taylorseer:3"})
    tail = findings_of(config, tmp_path / "run")["approximate tail"]
    assert tail.ok
    assert "relative error of the first step 0.0%" in tail.message


@pytest.mark.parametrize("method", ["densegrpo", "diffusionnft"])
def test_the_cost_is_that_of_the_plan(tmp_path, method):
    changes = {
        "sampling.num_steps": 4,
        "method.group_size": 3,
        "training.prompts_per_step": 2,
        "evaluation.rewards": [],
    }
    message = findings_of(load_config(method, changes), tmp_path)["cost"].message
    assert "sampling forward passes" in message
    assert ("calibration" in message) == (method == "densegrpo")
    assert "True CFG" not in message
    guided = load_config(method, {**changes, "sampling.guidance_scale": 4.5})
    assert "True CFG doubles" in findings_of(guided, tmp_path)["cost"].message


PLUGIN = """
from flowgrain.models import register_backbone
from toy import Toy

register_backbone("doctor_toy")(Toy)
"""


def test_a_backbone_of_unknown_size(tmp_path):
    """The size is measured after loading, before copies are made."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    config = load_config(
        "g2rpo",
        {
            "model.name": "doctor_toy",
            "sampling.num_steps": 4,
            "rewards": ["toy:red"],
            "evaluation.rewards": [],
        },
        plugins=[tmp_path / "plugin.py"],
    )
    findings = findings_of(config, tmp_path / "run")
    failed = [name for name, finding in findings.items() if not finding.ok]
    assert failed == ["prompts"]  # the toy has the same prompts for training and evaluation
    assert "weights 0.0 MB" in findings["memory"].message


def test_all_checks_are_made_after_the_first_failure(tiny, tmp_path):
    """Nothing works: no GPU, no prompts, one reward that cannot be loaded, one that can."""
    changes = {
        "runtime.device": "cuda",
        "data.prompts": str(tmp_path / "nothing.txt"),
        "rewards": ["nothing:at_all", "towers", "aesthetic"],
    }
    config = tiny.with_changes(changes)
    findings = findings_of(config, tmp_path / "run")
    failed = [name for name, finding in findings.items() if not finding.ok]
    rewards = ["reward nothing:at_all", "reward aesthetic"]
    expected = ["data.prompts", *rewards]
    if not torch.cuda.is_available():
        expected = ["device", *expected]
    assert failed == expected
    assert findings["reward towers"].ok
    assert findings["model"].ok
    assert findings["data.eval_prompts"].ok
    assert "Give the path of a text file" in findings["data.prompts"].message
    assert "SettingsError" not in " ".join(finding.message for finding in findings.values())
    assert findings["cost"].ok
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_loaded(tiny, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("two red circles\n")
    changes = {"model.path": str(tmp_path), "data.prompts": str(file)}
    findings = findings_of(tiny.with_changes(changes), tmp_path / "run")
    failed = [name for name, finding in findings.items() if not finding.ok]
    assert failed == ["model"]
    assert "contains no words.safetensors" in findings["model"].message
    assert findings["data.prompts"].message == "1 prompt"
    assert findings["reward oracle"].ok


@pytest.mark.parametrize(
    ("steps", "words"), [(1, "(0.5 epochs)"), (2, "(1 epoch)"), (2400, "(1,200 epochs)")]
)
def test_epochs_and_times_in_words(tiny, tmp_path, steps, words):
    file = tmp_path / "a.txt"
    file.write_text("two red circles\none blue square\none red square\nthree red circles\n")
    changes = {"data.prompts": str(file), "training.max_steps": steps}
    findings = findings_of(tiny.with_changes(changes), tmp_path / "run")
    assert words in findings["prompts"].message
    assert "0.0 h" not in findings["cost"].message
