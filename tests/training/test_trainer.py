"""The training loop: broken rewards, unusable prompts, skipped updates, and runs from Python."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from toy import PROMPTS, Toy, red

from flowgrain import RunStopped, SettingsError, Trainer, load_config
from flowgrain.core.sde import FlowSDE
from flowgrain.methods import METHODS, price
from flowgrain.training import checkpoint
from flowgrain.training.errors import Diverged
from flowgrain.training.step import update


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "is empty"),
        ("red circle and blue square\n\ntwo red circles\n", "line 2 is blank"),
        ("a cat\n", "prompt 1: "),
        ("red circle left of blue square and more\n", "8 words"),
    ],
)
def test_unusable_prompts_are_an_error_before_anything_is_written(tiny, tmp_path, text, message):
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        Trainer(tiny.with_changes({"data.prompts": str(path)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["data.prompts", "data.eval_prompts"])
def test_a_missing_prompt_file_is_found_before_the_model_is_loaded(tiny, tmp_path, setting):
    changes = {setting: "missing.txt", "model.name": "flux", "model.path": "not/loaded"}
    with pytest.raises(SettingsError, match=f"{setting}=missing.txt: there is no such file"):
        Trainer(tiny.with_changes(changes), tmp_path)


def test_evaluation_prompts_from_python_leave_all_of_a_file_to_training(tiny, tmp_path):
    class Bare(Toy):
        def bundled_prompts(self, split):
            return []

    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    config = tiny.with_changes({"data.prompts": str(file)})
    with_own = Trainer(config, backbone=Bare(), rewards={"red": red}, eval_prompts=["one"])
    assert len(with_own.prompts) == 4
    without = Trainer(config, backbone=Bare(), rewards={"red": red})
    assert [p.text for p in without.prompts] == PROMPTS[:3]
    assert [p.text for p in without.eval_prompts] == PROMPTS[3:]


def test_an_unknown_reward_or_backbone_names_the_nearest(tiny):
    with pytest.raises(SettingsError, match="Did you mean 'oracle'"):
        Trainer(tiny.with_changes({"rewards": ["oracel"]}))
    with pytest.raises(SettingsError, match="Did you mean 'shapes'"):
        Trainer(tiny.with_changes({"model.name": "shape"}))
    with pytest.raises(SettingsError, match="rewards is empty"):
        Trainer(tiny, rewards={})


def test_a_device_that_does_not_exist_is_an_error(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=r"runtime\.device=cuda: .*Use cpu or auto"):
        Trainer(tiny.with_changes({"runtime.device": "cuda"}), tmp_path)


def raising(images, prompts):
    raise OSError("server gone")


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (raising, "server gone"),
        (lambda images, prompts: [math.nan] * len(images), "NaN"),
        (lambda images, prompts: [1.0], r"shape \[1\] for 26 images, not \[26\]"),
        (lambda images, prompts: "good", "numbers"),
    ],
)
def test_a_broken_reward_stops_the_run_with_a_checkpoint(tiny, tmp_path, reward, reason):
    trainer = Trainer(tiny, tmp_path, backbone=Toy(), rewards={"mine": reward})
    before = {name: p.clone() for name, p in trainer.policy.parameters.items()}
    with pytest.raises(RunStopped, match=reason):
        trainer.train()
    assert checkpoint.checkpoints(tmp_path / "checkpoints")
    assert all(torch.equal(p, before[name]) for name, p in trainer.policy.parameters.items())


def test_a_reward_by_its_path(tiny, tmp_path, monkeypatch):
    (tmp_path / "trainer_rewards.py").write_text(
        "def bright(images, prompts, *, scale: float = 1.0):\n"
        "    return scale * images.mean((1, 2, 3))\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny.with_changes({"rewards": [{"name": "trainer_rewards:bright", "weight": 2.0}]})
    assert config.reward_weights == {"trainer_rewards:bright": 2.0}
    plain = Trainer(config, tmp_path / "run").step(1)["reward/trainer_rewards:bright"]
    assert 0 < plain < 1
    scaled = tiny.with_changes({"rewards": [{"name": "trainer_rewards:bright", "scale": 2.0}]})
    metrics = Trainer(scaled, tmp_path / "run").step(1)
    assert metrics["reward/trainer_rewards:bright"] == pytest.approx(2 * plain)
    for name, message in (
        ("trainer_rewards:number", "not callable"),
        ("trainer_rewards:none", "cannot be imported"),
    ):
        with pytest.raises(SettingsError, match=message):
            Trainer(tiny.with_changes({"rewards": [name]}))


def test_a_few_failures_are_masked_and_counted(tiny, tmp_path):
    def flaky(images, prompts):
        values = images.mean((1, 2, 3)).numpy().copy()
        values[0] = np.inf
        return values

    metrics = Trainer(tiny, tmp_path, rewards={"mine": flaky}).step(1)
    assert metrics["failed/mine"] == 1
    assert math.isfinite(metrics["reward/mine"])
    assert math.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0
    strict = tiny.with_changes({"training.max_failed_rewards": 0.0})
    with pytest.raises(RunStopped, match=r"training\.max_failed_rewards=0 allows"):
        Trainer(strict, tmp_path, rewards={"mine": flaky}).step(1)


def test_non_finite_updates_are_skipped_and_stop_the_run(tiny, tmp_path):
    changes = {"optimizer.max_skipped_updates": 2, "training.max_steps": 5}
    trainer = Trainer(tiny.with_changes(changes), tmp_path)
    policy = trainer.policy
    before = {name: p.clone() for name, p in policy.parameters.items()}
    batch = trainer.collector.collect(1)
    first = next(iter(policy.parameters.values()))
    policy.train_velocity = lambda x, sigma, cond, guidance: x * first.sum() * torch.nan
    metrics = update(
        trainer.config, trainer.method, policy, trainer.optimizer, batch, trainer.sigmas
    )
    assert metrics["updates/skipped"] == 1
    assert all(torch.equal(p, before[name]) for name, p in policy.parameters.items())
    with pytest.raises(Diverged, match=r"smaller learning rate .*optimizer\.learning_rate=3.33"):
        trainer.train()
    saved = checkpoint.checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in saved] == ["step-000001"]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("g2rpo", {"method.granularities": [1, 2]}),
        ("flow_grpo", {"method.kl_weight": 0.1}),
        ("diffusionnft", {}),
    ],
)
def test_executed_passes_are_those_of_the_plan(tmp_path, method, changes):
    values = {"sampling.num_steps": 4, "method.group_size": 3, "training.prompts_per_step": 2}
    config = load_config(method, {**values, **changes})
    trainer = Trainer(config, tmp_path, backbone=Toy(), rewards={"red": red})
    metrics = trainer.step(1)
    cost = price(config.method, 4, prompts_per_step=2)
    assert metrics["forward_passes"] == 2 * cost.forward_passes
    assert metrics["train_forward_passes"] == 2 * cost.train_forward_passes
    assert metrics["frozen_forward_passes"] == 2 * cost.frozen_forward_passes
    assert metrics["decodes"] == 2 * cost.decodes


def test_a_run_from_python_with_a_custom_reward(tmp_path):
    def redness(images, prompts):
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

    small = {
        "sampling.num_steps": 4,
        "method.group_size": 3,
        "training.prompts_per_step": 2,
        "training.max_steps": 2,
        "evaluation.num_prompts": 4,
        "evaluation.every": 1,
    }
    config, prompts = load_config("demo", small), ["three green circles"]
    trainer = Trainer(config, tmp_path, rewards={"redness": redness}, prompts=prompts)
    metrics = trainer.train()
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert "eval/redness" in metrics[0]
    assert "eval/oracle" in metrics[-1]
    assert trainer.evaluate(num_steps=4).scores["redness"].shape == (4,)
    assert trainer.sample(["two red squares"]).shape == (1, 3, 32, 32)
    saved = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert saved["given"] == ["rewards", "prompts"]
    assert saved["config"]["rewards"] == [{"name": "redness", "weight": 1.0, "batch_size": 256}]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        *("run.yaml", "metrics.jsonl", "checkpoints", "evaluations", "groups", "export"),
        *(".lock", ".saved", "base.npz", "best.json"),
    }
    with pytest.raises(SettingsError, match=r"already contains a run. Resume it with --resume"):
        Trainer(load_config("demo", small), tmp_path).train()


def test_training_time_has_a_limit(tiny, tmp_path):
    config = tiny.with_changes({"training.max_seconds": 1e-9, "training.max_steps": 50})
    trainer = Trainer(config, tmp_path, backbone=Toy(), rewards={"red": red})
    assert [line["step"] for line in trainer.train()] == [1]
    assert trainer.steps_done == 1
    assert checkpoint.checkpoints(tmp_path / "checkpoints")[-1].name == "step-000001"
    again = Trainer(config, tmp_path, backbone=Toy(), rewards={"red": red})
    again.resume()
    assert [line["step"] for line in again.train()] == [1]  # its time is used up


def test_rewards_from_python_keep_the_weights_of_the_settings(tiny, tmp_path):
    config = tiny.with_changes({"rewards": [{"name": "red", "weight": 0.5}]})
    both = {"red": red, "blue": lambda images, prompts: images[:, 2, 0, 0]}
    trainer = Trainer(config, tmp_path, backbone=Toy(), rewards=both)
    assert trainer.collector.reward_weights == {"red": 0.5, "blue": 1.0}
    assert trainer.config.reward_weights == {"red": 0.5, "blue": 1.0}


class Steep(METHODS.get("flow_grpo")):
    """A method that is not registered: Flow-GRPO with a kernel of its own."""

    name = "steep"

    def kernel(self, sigmas):
        return FlowSDE(0.9)


@pytest.mark.parametrize("method", [Steep, Steep(group_size=3)])
def test_a_method_class_or_instance_from_python(tiny, tmp_path, method):
    trainer = Trainer(tiny, tmp_path, backbone=Toy(), rewards={"red": red}, method=method)
    assert isinstance(trainer.method, Steep)
    assert trainer.collector.kernel() == FlowSDE(0.9)
    metrics = trainer.step(1)
    size = 24 if method is Steep else 3
    assert metrics["decodes"] == 2 * size  # two prompts
    assert trainer.config.to_dict()["method"]["name"] == "steep"


def test_a_method_from_python_is_checked_against_the_grid(tiny, tmp_path):
    late = METHODS.get("flow_grpo")(sde_steps=(7,))
    with pytest.raises(SettingsError, match=r"method\.sde_steps=\[7\].*sampling\.num_steps=4"):
        Trainer(tiny, tmp_path, method=late)


def test_a_trainer_does_not_share_the_state_of_its_method(tmp_path):
    changes = {
        "sampling.num_steps": 4,
        "method.group_size": 3,
        "method.calibration.rounds": 1,
        "method.calibration.samples": 2,
        "training.prompts_per_step": 1,
    }
    config = load_config("densegrpo", changes)
    trainer = Trainer(config, tmp_path, backbone=Toy(), rewards={"red": red})
    trainer.step(1)
    assert not trainer.method.needs_calibration
    assert config.method.needs_calibration
    written = json.loads((tmp_path / "calibration.json").read_text())
    assert written["psi"] == trainer.method.state_dict()["psi"]
    assert len(written["rounds"]) == 1
    plain = load_config("diffusionnft", {"method.group_size": 3})
    without_noise = Trainer(plain, tmp_path / "b", backbone=Toy(), rewards={"red": red})
    with pytest.raises(TypeError, match="no noise to calibrate"):
        without_noise.calibrate()
