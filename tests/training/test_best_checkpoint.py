"""The best checkpoint: of a run that an error stopped, damaged, and the base model of all ranks."""

import torch
from toy import PROMPTS, Toy, red

from flowgrain import Trainer
from flowgrain.distributed import World
from flowgrain.records.alarms import read_best
from flowgrain.training import checkpoint, state
from flowgrain.training.best import export_best
from flowgrain.training.watch_files import read_base


def toy(config, folder):
    given = {"rewards": {"red": red}, "prompts": PROMPTS, "eval_prompts": PROMPTS}
    return Trainer(config, folder, backbone=Toy(), **given)


def evaluated(tiny, **changes):
    """Two steps, each of them evaluated and saved."""
    first = {"training.max_steps": 2, "training.checkpoint_every": 1, "evaluation.every": 1}
    return tiny.with_changes({**first, **changes})


def test_an_evaluated_step_that_is_saved_later_keeps_its_score(tiny, tmp_path, monkeypatch):
    trainer = toy(evaluated(tiny), tmp_path)
    save, failed = Trainer.save, []

    def broken(self, metrics):
        if self.steps_done == 2 and not failed:
            failed.append(metrics)
            raise checkpoint.CheckpointError("disk full")
        return save(self, metrics)

    monkeypatch.setattr(Trainer, "save", broken)
    try:
        trainer.train()
    except checkpoint.CheckpointError:
        assert "step-000002" in state.ensure_saved(trainer)
    folder = tmp_path / "checkpoints"
    assert checkpoint.score(folder / "step-000002") == failed[0]["eval/red"]
    best = checkpoint.best(folder)
    assert read_best(tmp_path)["step"] == checkpoint.step_of(best)


def test_a_damaged_best_checkpoint_is_not_exported(tiny, tmp_path, caplog, monkeypatch):
    trainer = toy(evaluated(tiny), tmp_path)
    trainer.train()
    best = tmp_path / "checkpoints" / "step-000001"
    monkeypatch.setattr(checkpoint, "best", lambda folder: best)
    before = {name: value.clone() for name, value in trainer.policy.tensors().items()}
    assert export_best(trainer) == tmp_path / "export" / "best"
    file = next(best.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert export_best(trainer) is None
    assert "best checkpoint is not exported" in caplog.text
    assert "the checksum of" in caplog.text
    for name, value in trainer.policy.tensors().items():
        assert torch.equal(value, before[name])


def test_a_rank_without_the_file_measures_with_the_base_of_the_main_rank(tiny, tmp_path):
    toy(evaluated(tiny), tmp_path / "main").train()
    base = read_base(tmp_path / "main")

    class Other(World):
        def on_main(self, work):
            return base

    trainer = toy(evaluated(tiny), tmp_path / "other")
    trainer.watch.world = Other()
    evaluation = trainer.watch.measure(1, trainer.evaluate(num_images=4))
    assert "path_kl" in evaluation.monitors
