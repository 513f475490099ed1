"""A run is found by its directory and resumed only with its own prompts, method and steps."""

from pathlib import Path

import pytest
from toy import PROMPTS, Toy, red

from flowgrain import PolicyGradient, SettingsError, Trainer, load_config
from flowgrain.training.run_files import read_run_config

SMALL = {
    "sampling.num_steps": 4,
    "method.group_size": 3,
    "training.prompts_per_step": 2,
    "training.max_steps": 2,
    "training.checkpoint_every": 1,
    "evaluation.every": 0,
}


def toy_trainer(folder, prompts=PROMPTS, **options):
    config = load_config("g2rpo", SMALL)
    return Trainer(
        config,
        folder,
        backbone=Toy(),
        prompts=prompts,
        eval_prompts=PROMPTS,
        rewards={"red": red},
        **options,
    )


def test_a_directory_named_like_a_method_is_the_run_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_trainer("flow-grpo").train()
    assert read_run_config(Path("flow-grpo")).method.name == "g2rpo"


def test_other_prompts_are_refused_on_resume(tmp_path):
    toy_trainer(tmp_path / "run").train()
    with pytest.raises(SettingsError, match=r"data\.prompts: the training prompts differ"):
        toy_trainer(tmp_path / "run", prompts=PROMPTS[::-1]).resume()


def test_a_full_disk_after_the_update_saves_this_step(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path / "run")

    def fail(batch, sigmas):
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer.recorder, "write_groups", fail)
    with pytest.raises(RuntimeError, match="step-000001"):
        trainer.train()
    resumed = toy_trainer(tmp_path / "run")
    resumed.resume()
    assert (resumed.steps_done, resumed.policy.updates) == (1, 1)


class Plain(PolicyGradient):
    """A method that is not registered."""

    name = "plain_of_this_test"

    def plan(self, tree, step, seed):
        for branch in tree.sde(tree.root(), fan=self.group_size):
            tree.image(tree.ode(branch))


def test_the_files_of_a_run_with_a_method_from_python_can_be_read(tmp_path):
    toy_trainer(tmp_path / "run", method=Plain(group_size=3)).train()
    assert isinstance(read_run_config(tmp_path / "run").method, Plain)


def test_a_method_from_python_must_fit_the_other_settings(tmp_path):
    config = load_config("g2rpo", {**SMALL, "sampling.tail_cache": "taylorseer:2"})
    late = load_config("flow_grpo", {"sampling.num_steps": 4}).method
    with pytest.raises(SettingsError, match=r"sampling\.tail_cache"):
        Trainer(config, tmp_path, method=late, backbone=Toy(), rewards={"red": red})
