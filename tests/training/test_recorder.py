"""The files of a run and its metric loggers."""

import sys
import types

import pytest
import yaml
from toy import Toy, red

import flowgrain
from flowgrain import SettingsError, Trainer, load_config, load_run
from flowgrain.records.evaluations import EVALUATION_IMAGES
from flowgrain.records.metrics import read_metrics
from flowgrain.records.run_yaml import read_run
from flowgrain.training.run_files import read_run_config


def toy(config, folder):
    return Trainer(config, folder, backbone=Toy(), rewards={"red": red})


def test_tensorboard(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy(tiny.with_changes({"runtime.loggers": ["tensorboard"]}), tmp_path).train()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("reward/red")] == [1, 2]


def test_wandb_logs_every_line(tiny, tmp_path, monkeypatch):
    """A stand-in for the two functions that are called. The library itself is not a dependency."""
    logged, started = [], {}

    def init(**options):
        started.update(options)
        return types.SimpleNamespace(log=lambda line, step: logged.append((step, line["loss"])))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    toy(tiny.with_changes({"runtime.loggers": ["wandb"]}), tmp_path).train()
    assert [step for step, _ in logged] == [1, 2]
    assert started["config"]["sampling"]["num_steps"] == 4
    assert started["name"] == "g2rpo"


def test_a_logger_that_is_not_installed_is_an_error_before_the_first_step(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SettingsError, match=r"runtime\.loggers: .*pip install wandb"):
        toy(tiny.with_changes({"runtime.loggers": ["wandb"]}), tmp_path).train()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_run_yaml_restores_the_settings(tiny, tmp_path):
    config = tiny.with_changes({"evaluation.every": 1, "training.max_steps": 1})
    toy(config, tmp_path / "run").train()
    saved = read_run(tmp_path / "run")
    assert saved["versions"]["flowgrain"] == flowgrain.__version__
    assert saved["given"] == ["rewards", "backbone"]
    assert saved["threads"] >= 1
    restored = read_run_config(tmp_path / "run", {"training.max_steps": 5})
    assert restored.training.max_steps == 5
    assert restored == load_config(tmp_path / "run", {"training.max_steps": 5})
    assert restored.method == config.method
    for missing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SettingsError, match=r"not the directory of a run. It has no run\.yaml"):
            read_run(missing)


def test_the_natural_shift_of_the_model_is_recorded_as_a_number(tiny, tmp_path):
    class Shifted(Toy):
        def natural_shift(self, num_steps):
            return 2.5, 0.02

    config = tiny.with_changes({"sampling.shift": "auto", "training.max_steps": 1})
    Trainer(config, tmp_path, backbone=Shifted(), rewards={"red": red}).train()
    sampling = yaml.safe_load((tmp_path / "run.yaml").read_text())["config"]["sampling"]
    assert (sampling["shift"], sampling["shift_terminal"]) == (2.5, 0.02)
    own = tiny.with_changes({"sampling.shift": "auto", "sampling.shift_terminal": 0.1})
    trainer = Trainer(own, backbone=Shifted(), rewards={"red": red})
    assert trainer.config.sampling.shift_terminal == 0.1
    assert float(trainer.sigmas[-2]) == pytest.approx(0.1)


def test_metrics_without_a_line_that_a_kill_cut_and_with_numbers_that_are_not_finite(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "lo')
    (line,) = read_metrics(tmp_path)
    assert line["step"] == 1
    assert line["loss"] != line["loss"]
    assert read_metrics(tmp_path / "nowhere") == []


def test_an_evaluation_records_every_score_and_the_first_images(tiny, tmp_path):
    changes = {
        "evaluation.every": 2,
        "evaluation.num_prompts": EVALUATION_IMAGES + 2,
        "training.max_steps": 3,
    }
    toy(tiny.with_changes(changes), tmp_path).train()
    names = {path.name for path in (tmp_path / "evaluations").iterdir()}
    assert names == {
        *(f"step-{step:06d}.json" for step in (0, 2, 3)),
        *(f"images-{step:06d}.zip" for step in (0, 2, 3)),
    }
    first = load_run(tmp_path).evaluations[0]
    assert len(first.prompts) == len(first.scores["red"]) == EVALUATION_IMAGES + 2
    assert (first.num_steps, first.num_images) == (4, EVALUATION_IMAGES)
    assert not (tmp_path / "images").exists()


def test_a_directory_that_cannot_be_created_is_an_error(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"--out .*cannot be created .*Set another directory"):
        toy(tiny, tmp_path / "file" / "run").train()
