"""run.yaml says with which settings every step was trained."""

import pytest
from toy import PROMPTS, Toy, red

from flowgrain import Trainer
from flowgrain.records.run_yaml import read_run


@pytest.fixture
def two(tiny):
    return tiny.with_changes({"training.max_steps": 2, "training.checkpoint_every": 1})


def toy(config, folder):
    given = {"prompts": PROMPTS, "eval_prompts": PROMPTS, "rewards": {"red": red}}
    return Trainer(config, folder, backbone=Toy(), **given)


def resumed(config, folder, progress=None):
    trainer = toy(config, folder)
    trainer.resume()
    trainer.train(progress)


def stop_at(step):
    def progress(metrics):
        if metrics["step"] == step:
            raise KeyboardInterrupt

    return progress


def test_a_resume_that_trains_nothing_leaves_the_file(two, tmp_path):
    toy(two, tmp_path).train()
    before = (tmp_path / "run.yaml").read_bytes()
    resumed(two.with_changes({"optimizer.learning_rate": 5e-5}), tmp_path)
    toy(two.with_changes({"training.max_steps": 9}), tmp_path).resume()
    assert (tmp_path / "run.yaml").read_bytes() == before
    assert read_run(tmp_path)["history"] == []


def test_the_history_has_the_first_step_of_every_change(two, tmp_path):
    toy(two, tmp_path).train()
    four = two.with_changes({"training.max_steps": 4, "optimizer.learning_rate": 5e-5})
    resumed(four, tmp_path)
    resumed(four.with_changes({"training.max_steps": 5, "training.ema_every": 3}), tmp_path)
    saved = read_run(tmp_path)
    assert saved["config"]["optimizer"]["learning_rate"] == 5e-5
    assert saved["config"]["training"]["max_steps"] == 5
    rate, steps = "config.optimizer.learning_rate", "config.training.max_steps"
    first = {"first_step": 3, "changed": {rate: [1e-4, 5e-5], steps: [2, 4]}}
    second = {"first_step": 5, "changed": {"config.training.ema_every": [1, 3], steps: [4, 5]}}
    assert [dict(sorted(e.items())) for e in saved["history"]] == [
        {"changed": first["changed"], "first_step": 3},
        {"changed": second["changed"], "first_step": 5},
    ]


def test_settings_of_steps_that_are_trained_again_are_dropped(two, tmp_path):
    """Steps 3 and 4 had another rate. A resume from step 2 trains them again with a third."""
    toy(two, tmp_path).train()
    sparse = two.with_changes({"training.max_steps": 6, "training.checkpoint_every": 5})
    with pytest.raises(KeyboardInterrupt):
        resumed(sparse.with_changes({"optimizer.learning_rate": 5e-5}), tmp_path, stop_at(4))
    assert read_run(tmp_path)["config"]["optimizer"]["learning_rate"] == 5e-5
    third = sparse.with_changes({"optimizer.learning_rate": 2e-5})
    with pytest.raises(KeyboardInterrupt):
        resumed(third, tmp_path, stop_at(3))
    (entry,) = read_run(tmp_path)["history"]
    assert entry["first_step"] == 3
    assert entry["changed"]["config.optimizer.learning_rate"] == [1e-4, 2e-5]
    # The first rate again: its only change is the number of steps.
    resumed(sparse, tmp_path)
    (entry,) = read_run(tmp_path)["history"]
    assert "config.optimizer.learning_rate" not in entry["changed"]
    assert read_run(tmp_path)["config"]["optimizer"]["learning_rate"] == 1e-4


def test_values_that_occur_twice_are_written_in_full(two, tmp_path):
    toy(two, tmp_path).train()
    changes = {"optimizer.betas": [0.5, 0.9], "training.max_steps": 3}
    resumed(two.with_changes(changes), tmp_path)
    text = (tmp_path / "run.yaml").read_text()
    assert "&id" not in text
    assert "config.optimizer.betas" in text


def test_a_run_that_starts_again_has_no_history(two, tmp_path):
    late = two.with_changes({"training.checkpoint_every": 0})
    with pytest.raises(KeyboardInterrupt):
        toy(late, tmp_path).train(stop_at(1))
    other = late.with_changes({"optimizer.learning_rate": 5e-5})
    resumed(other, tmp_path)
    saved = read_run(tmp_path)
    assert saved["history"] == []
    assert saved["config"]["optimizer"]["learning_rate"] == 5e-5


def test_another_environment_is_recorded(two, tmp_path, monkeypatch):
    toy(two, tmp_path).train()
    from flowgrain.training import run_files

    environment = run_files.describe_environment()
    changed = {**environment, "python": "3.99"}
    monkeypatch.setattr(run_files, "describe_environment", lambda: changed)
    resumed(two.with_changes({"training.max_steps": 3}), tmp_path)
    (entry,) = read_run(tmp_path)["history"]
    assert entry["changed"]["python"] == [environment["python"], "3.99"]
