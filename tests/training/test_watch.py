"""The watch of a run: its files, the actions of an alarm, the best checkpoint, exact resumes."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy import PROMPTS, Toy, green, red

from flowgrain import RunStopped, SettingsError, Trainer, load_config
from flowgrain.config.watch import WatchConfig
from flowgrain.monitors import MONITORS
from flowgrain.records.alarms import read_alarms, read_best
from flowgrain.training import checkpoint
from flowgrain.training.alarms import Finding, Measured
from flowgrain.training.watch import _message
from flowgrain.training.watch_files import read_base

BAD = Finding("dark", "up", 0.3, 0.2, 0.4, 0.1)
WITHOUT_NET = {name for name in MONITORS if name not in ("feature_distance", "diversity")}


@pytest.fixture
def watched(tiny):
    """Four steps, each of them evaluated and saved."""
    return tiny.with_changes(
        {
            "training.max_steps": 4,
            "training.checkpoint_every": 1,
            "training.keep_checkpoints": 9,
            "training.ema_decay": 0.5,
            "evaluation.every": 1,
        }
    )


def toy(config, folder, **given):
    given = {"rewards": {"red": red}, **given}
    return Trainer(config, folder, backbone=Toy(), prompts=PROMPTS, eval_prompts=PROMPTS, **given)


def resumed(config, folder):
    trainer = toy(config, folder)
    trainer.resume()
    return trainer


def record(folder, step):
    return json.loads((folder / "evaluations" / f"step-{step:06d}.json").read_text())


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in found]


@pytest.fixture
def alarm_after(monkeypatch):
    """A function that makes the rule hold at the given evaluations: 1 is the first after step 0."""

    def arrange(*evaluations):
        count = [0]

        def find(base, now, weights, rule):
            assert isinstance(base, Measured)
            count[0] += 1
            return [BAD] if count[0] in evaluations else []

        monkeypatch.setattr("flowgrain.training.watch.find", find)

    return arrange


def test_records_and_metrics(watched, tmp_path):
    toy(watched, tmp_path, rewards={"red": red, "green": green}).train()
    first, last = record(tmp_path, 0), record(tmp_path, 4)
    assert set(first["monitors"]) == set(last["monitors"]) == WITHOUT_NET
    assert all(len(values) == 4 for values in last["monitors"].values())
    assert "base" not in first
    assert set(last["base"]) == {"red", "green", *WITHOUT_NET}
    for name, difference in last["base"].items():
        before, after = ({**e["scores"], **e["monitors"]}[name] for e in (first, last))
        assert difference["mean"] == pytest.approx(np.mean(np.subtract(after, before)), abs=1e-6)
        assert difference["std"] == pytest.approx(np.std(before, ddof=1), abs=1e-6)
    assert first["monitors"]["path_kl"] == [0, 0, 0, 0]
    assert all(value > 0 for value in last["monitors"]["path_kl"])
    metrics = lines(tmp_path)
    assert metrics[4]["eval/monitor/dark"] == np.mean(last["monitors"]["dark"])
    assert metrics[4]["alarms"] == 0
    assert "alarms" not in metrics[0]
    rollouts = {name for name in metrics[1] if name.startswith("monitor/")}
    assert rollouts == {f"monitor/{name}" for name in MONITORS if MONITORS[name].rollouts}
    assert not (tmp_path / "alarms.jsonl").exists()


def test_the_latent_norm_is_the_norm_of_the_decoded_latents(watched, tmp_path):
    trainer, seen = toy(watched, tmp_path), []
    decode = trainer.backbone.decode
    trainer.backbone.decode = lambda latents: (seen.append(latents), decode(latents))[1]
    evaluation = trainer.evaluate(num_images=3)
    expected = torch.cat(seen).flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(torch.from_numpy(evaluation.monitors["latent_norm"]), expected)


def test_the_bundled_model_has_features(tiny, tmp_path):
    """At step 0 the distance is 0, and the mean distance of two images of a prompt is 1."""
    changes = {"training.max_steps": 1, "evaluation.every": None, "evaluation.num_prompts": 20}
    Trainer(tiny.with_changes(changes), tmp_path).train()
    first, last = record(tmp_path, 0)["monitors"], record(tmp_path, 1)["monitors"]
    assert set(first) == set(last) == set(MONITORS)
    assert first["feature_distance"] == [0] * 20
    assert np.mean(first["diversity"][:16]) == pytest.approx(1)
    assert first["diversity"][16:] == [None] * 4
    assert first["path_kl"][8:] == [None] * 12
    assert all(value > 0 for value in last["feature_distance"])
    assert read_best(tmp_path)["step"] == 1


def test_a_real_alarm(watched, tmp_path, caplog):
    """Training on `red` changes the norm of the latents. The smallest change is an alarm here."""
    changes = {
        "watch.threshold": 0,
        "watch.direction": "change",
        "watch.monitor": ["latent_norm"],
        "evaluation.num_prompts": 64,
        "optimizer.learning_rate": 3e-2,
        "training.prompts_per_step": 8,
        "training.ema_decay": 0.0,
    }
    toy(watched.with_changes(changes), tmp_path).train()
    alarms = read_alarms(tmp_path)
    assert alarms
    alarm, base = alarms[-1], record(tmp_path, alarms[-1]["step"])["base"]["latent_norm"]
    assert alarm["monitor"] == "latent_norm"
    assert alarm["action"] == "warn"
    assert alarm["difference"] == pytest.approx(base["mean"])
    assert (alarm["low"], alarm["high"]) == pytest.approx((base["low"], base["high"]))
    assert alarm["message"] in caplog.text


def test_warn(watched, tmp_path, alarm_after, caplog):
    """Every evaluation for which the rule holds has a line, and its checkpoint is not the best."""
    alarm_after(2, 3)
    with caplog.at_level(logging.WARNING):
        toy(watched, tmp_path).train()
    assert [line["step"] for line in read_alarms(tmp_path)] == [2, 3]
    assert [line.get("alarms") for line in lines(tmp_path)] == [None, 0, 1, 1, 0]
    assert caplog.text.count("dark changed by +0.3 [+0.2, +0.4], more than 0.1") == 2
    saved = checkpoint.checkpoints(tmp_path / "checkpoints")
    assert [checkpoint.score(path) is None for path in saved] == [False, True, True, False]
    best = read_best(tmp_path)
    assert best["step"] in (1, 4)
    assert best["rule"] == "highest trained reward among checkpoints without an alarm"
    assert best["score"] == pytest.approx(
        max(lines(tmp_path)[step]["eval/red"] for step in (1, 4)), abs=1e-6
    )


def test_the_message_has_the_threshold_of_the_kind():
    rule = WatchConfig(threshold=1.5, reward_threshold=0.2)
    assert "dark changed by +0.3 [+0.2, +0.4], more than 0.1 (1.5 standard" in _message(
        3, BAD, rule
    )
    reward = dataclasses.replace(BAD, monitor="towers")
    assert "more than 0.1 (0.2 standard" in _message(3, reward, rule)


def test_patience(watched, tmp_path, alarm_after):
    alarm_after(1, 3, 4)
    toy(watched.with_changes({"watch.patience": 2}), tmp_path).train()
    (alarm,) = read_alarms(tmp_path)
    assert (alarm["step"], alarm["evaluations"]) == (4, 2)


def weights(folder):
    return torch.load(folder / "transformer" / "weights.pt")


def test_the_best_checkpoint_is_exported_and_the_policy_is_unchanged(
    watched, tmp_path, alarm_after
):
    alarm_after(2, 3, 4)  # leaves the first
    trainer = toy(watched, tmp_path)
    trainer.train()
    assert read_best(tmp_path)["step"] == 1
    saved = checkpoint.path_of(tmp_path / "checkpoints", 1)
    tensors = {k: v for f in saved.glob("*.safetensors") for k, v in load_file(f).items()}
    for name, value in weights(tmp_path / "export" / "best").items():
        assert torch.equal(value, tensors[f"ema.{name}"])
    final = weights(tmp_path / "export")
    with trainer.policy.averaged():
        for name, parameter in trainer.policy.parameters.items():
            assert torch.equal(parameter, final[name])
            assert not torch.equal(parameter, tensors[f"ema.{name}"])


def test_without_a_good_checkpoint_there_is_no_best(watched, tmp_path, alarm_after):
    alarm_after(1, 2, 3, 4)
    toy(watched, tmp_path).train()
    assert read_best(tmp_path) is None
    assert not (tmp_path / "export" / "best").exists()
    assert (tmp_path / "export" / "transformer").exists()


def test_stop_and_go_on(watched, tmp_path, alarm_after):
    alarm_after(2)
    config = watched.with_changes({"watch.action": "stop"})
    message = (
        r"step 2: alarm: .* dark changed by \+0\.3 .*step-000001\. See the images with .* "
        r"To resume without a stop: Trainer\("
        r"config\.with_changes\({'watch\.action': warn}\)"
    )
    with pytest.raises(RunStopped, match=message):
        toy(config, tmp_path).train()
    assert checkpoint.checkpoints(tmp_path / "checkpoints")[-1].name == "step-000002"
    assert (tmp_path / "export" / "best" / "transformer").exists()
    assert read_alarms(tmp_path)[0]["action"] == "stop"
    resumed(config.with_changes({"watch.action": "warn"}), tmp_path).train()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]
    assert [alarm["step"] for alarm in read_alarms(tmp_path)] == [2]


def test_an_alarm_at_the_last_step_does_not_stop_the_export(watched, tmp_path, alarm_after):
    alarm_after(4)
    toy(watched.with_changes({"watch.action": "stop"}), tmp_path).train()
    assert (tmp_path / "export" / "transformer").exists()


def test_a_lower_learning_rate_resumes_to_the_bit(watched, tmp_path, alarm_after):
    config = watched.with_changes({"watch.action": "lower_learning_rate"})
    alarm_after(1, 3)
    whole = toy(config, tmp_path / "whole")
    whole.train()
    assert whole.optimizer.adamw.param_groups[0]["lr"] == pytest.approx(2.5e-5)

    alarm_after(1, 3)
    cut = toy(config, tmp_path / "cut")

    def stop(metrics):
        if metrics["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.train(stop)
    again = resumed(config, tmp_path / "cut")
    assert again.optimizer.adamw.param_groups[0]["lr"] == pytest.approx(5e-5)
    again.train()
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    alarms = [read_alarms(tmp_path / name) for name in ("whole", "cut")]
    assert alarms[0] == alarms[1]
    names = list(whole.policy.parameters)
    assert all(torch.equal(whole.policy.parameters[n], again.policy.parameters[n]) for n in names)
    # Other actions use the learning rate of the settings.
    full = resumed(config.with_changes({"watch.action": "warn"}), tmp_path / "cut")
    assert full.optimizer.adamw.param_groups[0]["lr"] == 1e-4


def test_patience_and_alarms_survive_a_resume(watched, tmp_path, alarm_after):
    """The counter is in the checkpoint, and alarms after it are raised again."""
    config = watched.with_changes({"watch.patience": 2, "training.checkpoint_every": 2})
    alarm_after(1, 2, 3, 4, 5)
    first = toy(config, tmp_path)

    def stop(metrics):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(stop)
    assert [a["step"] for a in read_alarms(tmp_path)] == [2, 3]
    again = resumed(config, tmp_path)
    assert [a["step"] for a in read_alarms(tmp_path)] == [2]
    again.train()
    assert [(a["step"], a["evaluations"]) for a in read_alarms(tmp_path)] == [
        (2, 2),
        (3, 3),
        (4, 4),
    ]


def test_off(watched, tmp_path):
    toy(watched.with_changes({"watch.action": "off"}), tmp_path).train()
    assert record(tmp_path, 4)["monitors"] == {}
    assert "base" not in record(tmp_path, 4)
    assert not any("monitor/" in name or name == "alarms" for name in lines(tmp_path)[-1])
    assert not (tmp_path / "base.npz").exists()
    assert read_best(tmp_path) is not None


def test_a_run_without_an_evaluation_before_training(watched, tmp_path, caplog):
    changes = {"evaluation.every": 0, "training.max_steps": 1}
    toy(watched.with_changes(changes), tmp_path).train()
    assert read_best(tmp_path) is None
    with caplog.at_level(logging.WARNING):
        resumed(watched, tmp_path).train()
    assert "no evaluation of the base model" in caplog.text
    assert "alarms" not in lines(tmp_path)[-1]
    assert "path_kl" not in record(tmp_path, 4)["monitors"]
    assert "dark" in record(tmp_path, 4)["monitors"]


def test_a_damaged_base_is_left_out(watched, tmp_path, caplog):
    toy(watched.with_changes({"training.max_steps": 1}), tmp_path).train()
    (tmp_path / "base.npz").write_bytes(b"PK damaged")
    resumed(watched, tmp_path).train()
    assert "base.npz is damaged" in caplog.text
    assert "path_kl" not in record(tmp_path, 4)["monitors"]
    assert record(tmp_path, 4)["base"]["dark"]["mean"] is not None


def test_other_evaluation_settings_are_not_compared(watched, tmp_path, caplog):
    toy(watched.with_changes({"training.max_steps": 1}), tmp_path).train()
    resumed(watched.with_changes({"evaluation.num_steps": 2}), tmp_path).train()
    assert "evaluation.num_steps was 4 before training and is 2" in caplog.text
    assert "base" not in record(tmp_path, 4)


def test_the_base_belongs_to_the_first_evaluation(watched, tmp_path):
    """A run that is killed before its first checkpoint starts again, also with its base."""
    changes = {"training.checkpoint_every": 0}
    first = toy(watched.with_changes(changes), tmp_path)

    def stop(metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(stop)
    assert read_base(tmp_path) is not None
    trainer = resumed(watched, tmp_path)
    assert not (tmp_path / "base.npz").exists()
    trainer.train()
    assert record(tmp_path, 0)["monitors"]["path_kl"] == [0, 0, 0, 0]


def test_broken_images_have_no_monitors(watched, tmp_path):
    class Broken(Toy):
        def decode(self, latents):
            images = super().decode(latents).clone()
            images[0] = torch.nan
            return images

    config = watched.with_changes({"training.max_failed_rewards": 1.0, "evaluation.every": 4})
    trainer = Trainer(config, tmp_path, backbone=Broken(), rewards={"red": red})
    trainer.train()
    monitors = record(tmp_path, 4)["monitors"]
    assert monitors["dark"][0] is None
    assert None not in monitors["dark"][1:]
    assert np.isfinite(lines(tmp_path)[-1]["eval/monitor/dark"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"watch.monitor": ["darkness"]},
            r"there is no monitor .* 'darkness'. Did you mean 'dark'",
        ),
        ({"watch.monitor": ["towers"], "rewards": ["towers"]}, "'towers' is trained"),
        ({"watch.features": "clip"}, r"watch\.features=clip: .* Set watch\.clip"),
        ({"watch.clip": "x", "watch.features": "none"}, r"watch\.clip=x: has no effect"),
        ({"watch.threshold": -1.0}, r"watch\.threshold"),
        ({"watch.reward_threshold": -1.0}, r"watch\.reward_threshold"),
    ],
)
def test_settings_that_cannot_be_used(changes, message):
    with pytest.raises(SettingsError, match=message):
        load_config("g2rpo", changes)


def test_a_held_out_reward_can_be_named():
    changes = {"watch.monitor": ["dark", "towers"], "evaluation.rewards": ["towers"]}
    assert load_config("g2rpo", changes).watch.monitor == ("dark", "towers")


@pytest.mark.parametrize("name", ["monitor", "dark"])
def test_reserved_names_of_rewards(watched, tmp_path, name):
    with pytest.raises(SettingsError, match=f"'{name}' is the name of .*{name}_reward"):
        toy(watched, tmp_path, rewards={name: red})


def test_a_clip_model_that_cannot_be_loaded(watched, tmp_path):
    config = watched.with_changes({"watch.clip": str(tmp_path / "nothing")})
    with pytest.raises(SettingsError, match=r"watch\.clip=.*nothing: the model cannot be loaded"):
        toy(config, tmp_path / "run")
