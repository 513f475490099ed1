"""Recording of the groups of training steps."""

import json
import math
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch
from toy import PROMPTS, Toy, green, red
from training.test_given_images import Encoder, config_of, write_images

from flowgrain import METHODS, RunStopped, Trainer, load_config, load_run
from flowgrain.data import Prompt
from flowgrain.methods import ForwardProcess, RewardGradient
from flowgrain.records import GroupStore
from flowgrain.training import groups as groups_module
from flowgrain.training.disk import evaluations_bytes, groups_bytes

WITH_ROLLOUT = [name for name in METHODS if METHODS.get(name).trains_on is None]


def toy(config, folder, rewards=None):
    given = {"prompts": PROMPTS, "eval_prompts": PROMPTS, "rewards": rewards or {"red": red}}
    return Trainer(config, folder, backbone=Toy(), **given)


@pytest.fixture
def recorded(tiny):
    return tiny.with_changes({"training.prompts_per_step": 3})


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def check_images(group):
    """Every image has its rewards: the rewards of the file are those of the image in the file."""
    for number, prompt in enumerate(group.prompts):
        for place in range(len(group.tree.leaves)) if prompt.recorded else ():
            image = as_tensor(group.image(number, place))
            expected = float(red(image, [Prompt(prompt.text)]))
            assert prompt.rewards["red"][place] == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("method", WITH_ROLLOUT)
def test_every_method(tmp_path, method):
    changes = {
        "sampling.num_steps": 11 if method in ("e_grpo", "branchgrpo") else 6,
        "training.prompts_per_step": 3,
        "sampling.prompts_per_chunk": 1 if method in ("g2rpo", "branchgrpo") else None,
        "training.max_steps": 1,
        "evaluation.every": 0,
        "optimizer.learning_rate": 1e-3,
    }
    if method == "densegrpo":
        changes |= {"method.calibration.rounds": 1, "method.calibration.samples": 2}
    trainer = toy(load_config(method, changes), tmp_path)
    trainer.step(1)
    trainer.recorder.finish()
    group = load_run_groups(tmp_path)[1]
    assert [prompt.recorded for prompt in group.prompts] == [True, True, False]
    assert group.method == method
    assert group.sigmas == trainer.sigmas.tolist()
    assert len(group.sigmas) == group.num_steps + 1
    assert len({value for prompt in group.prompts for value in prompt.rewards["red"]}) >= 3
    check_images(group)
    on_images = isinstance(trainer.method, ForwardProcess | RewardGradient)
    assert (group.tree.edges == group.tree.leaves) == on_images
    for prompt in group.prompts:
        assert len(prompt.advantage) == len(group.tree.edges)
    for row in group.tree.edges:
        assert group.tree.credited_leaves[row], "an edge without images"


def load_run_groups(folder):
    """The groups of a run without run.yaml."""
    return GroupStore(folder / "groups")


def test_numbers_are_those_of_the_batch(recorded, tmp_path):
    trainer = toy(recorded, tmp_path, {"red": red, "green": green})
    batch = trainer.collector.collect(1)
    trainer.recorder.write_groups(batch, trainer.sigmas.tolist())
    trainer.recorder.finish()
    group = load_run_groups(tmp_path)[1]
    assert group.reward_weights == {"red": 1.0, "green": 1.0}
    for name in ("red", "green"):
        whole = [value for prompt in group.prompts for value in prompt.rewards[name]]
        assert whole == pytest.approx(batch.scores[name].values.tolist())
    whole = [value for prompt in group.prompts for value in prompt.advantage]
    assert whole == pytest.approx(batch.advantage.tolist())
    assert [prompt.text for prompt in group.prompts] == [p.text for p in batch.prompts]


def test_failed_rewards(recorded, tmp_path):
    def troubled(images, prompts):
        values = red(images, prompts)
        values[1] = math.nan
        return values

    trainer = toy(recorded, tmp_path, {"red": troubled})
    trainer.step(1)
    trainer.recorder.finish()
    first = load_run_groups(tmp_path)[1].prompts[0]
    assert [math.isnan(v) for v in first.rewards["red"]].index(True) == 1
    with zipfile.ZipFile(tmp_path / "groups" / "step-000001.zip") as archive:
        step = json.loads(archive.read("step.json"), parse_constant=pytest.fail)
    assert step["prompts"][0]["rewards"]["red"][1] is None
    assert "Failed rewards: 1" in load_run_groups(tmp_path)[1]._repr_html_()


@pytest.mark.parametrize("kind", ["pairs", "images"])
def test_given_images(tmp_path, kind):
    config = config_of(kind, write_images(tmp_path, PROMPTS, kind), {"training.max_steps": 1})
    given_ = {"rewards": {"red": red}, "eval_prompts": PROMPTS, "backbone": Encoder()}
    trainer = Trainer(config, tmp_path / "run", **given_)
    images = trainer.collector.collect(1).images
    trainer.train()
    group = load_run(tmp_path / "run").groups[1]
    assert group.rewards == []
    assert group.prompts[0].advantage == ([1.0, -1.0] if kind == "pairs" else [1.0])
    assert group.prompts[1].recorded
    leaves = len(group.tree.leaves)
    for number in range(2 * leaves):
        image = as_tensor(group.image(*divmod(number, leaves)))[0]
        torch.testing.assert_close(image, images[number], atol=0.003, rtol=0)
    assert group._repr_html_().count("<img") == 2 * leaves


@pytest.mark.parametrize("size", [32, 64, 65, 512, pytest.param(1024, marks=pytest.mark.slow)])
def test_image_sizes(recorded, tmp_path, size):
    class Large(Toy):
        def decode(self, latents):
            small = super().decode(latents)
            return torch.nn.functional.interpolate(small, size=(size, size // 2))

    config = recorded.with_changes({"training.record.thumbnail": 128})
    trainer = Trainer(config, tmp_path, backbone=Large(), rewards={"red": red}, prompts=PROMPTS)
    trainer.step(1)
    trainer.recorder.finish()
    group = load_run_groups(tmp_path)[1]
    check_images(group)
    assert group.image_size == [size, size // 2]
    small = group.image(0, 0)
    assert small.size == ((size // 2, size) if size <= 128 else (64, 128))
    advantage, full = group.leaf_advantage(0), group.prompts[0].full
    known = [value for value in advantage if not math.isnan(value)]
    if size <= 64:
        assert full == []
        assert group.image(0, 1, full=True) == group.image(0, 1)
    else:
        assert sorted(advantage[place] for place in full) == [min(known), max(known)]
        assert group.image(1, group.prompts[1].full[0], full=True).size == (size // 2, size)
        (other, *_) = set(range(len(advantage))) - set(full)
        with pytest.raises(KeyError):
            group.image(0, other, full=True)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_number_of_images_in_full_size(recorded, tmp_path, count):
    class Large(Toy):
        def decode(self, latents):
            return torch.nn.functional.interpolate(super().decode(latents), size=(66, 66))

    config = recorded.with_changes({"training.record.full_size": count})
    trainer = Trainer(config, tmp_path, backbone=Large(), rewards={"red": red}, prompts=PROMPTS)
    trainer.step(1)
    trainer.recorder.finish()
    (full, *_) = [prompt.full for prompt in load_run_groups(tmp_path)[1].prompts]
    assert len(full) == count


@pytest.mark.parametrize("changes", [{"prompts": 0}, {"steps": 0}])
def test_nothing_is_recorded(tiny, tmp_path, changes):
    config = tiny.with_changes({f"training.record.{k}": v for k, v in changes.items()})
    toy(config, tmp_path).train()
    assert load_run(tmp_path).groups.steps == []


def test_recording_does_not_change_the_run(tiny, tmp_path):
    lines = []
    for prompts in (0, 2):
        config = tiny.with_changes({"training.record.prompts": prompts})
        metrics = toy(config, tmp_path / str(prompts)).train()
        lines.append([{k: v for k, v in m.items() if "seconds" not in k} for m in metrics])
    assert lines[0] == lines[1]


def test_a_resumed_run_has_the_same_files(tiny, tmp_path):
    """Also if the stride doubles between the checkpoint and the end of the killed run."""
    changes = {
        "training.max_steps": 14,
        "training.checkpoint_every": 5,
        "training.record.steps": 5,
        "evaluation.every": 4,
    }
    config = tiny.with_changes(changes)
    toy(config, tmp_path / "whole").train()
    killed = toy(config, tmp_path / "killed")

    def kill(metrics):
        if metrics["step"] == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed.train(kill)
    assert load_run(tmp_path / "killed").groups.steps == [1, 4, 8, 9]
    (tmp_path / "killed" / "groups" / ".step-000010.zip.1.tmp").write_bytes(b"PK")
    again = toy(config, tmp_path / "killed")
    assert again.resume() == []
    assert again.steps_done == 5
    again.train()
    whole = load_run(tmp_path / "whole").groups
    assert whole.steps == [1, 4, 8, 12, 14]
    for part in ("groups", "evaluations"):
        files = sorted((tmp_path / "whole" / part).iterdir())
        others = sorted((tmp_path / "killed" / part).iterdir())
        assert [file.name for file in files] == [file.name for file in others]
        for file, other in zip(files, others, strict=True):
            assert file.read_bytes() == other.read_bytes(), file.name


def test_damaged_groups_are_set_aside(tiny, tmp_path):
    toy(tiny, tmp_path).train()
    file = tmp_path / "groups" / "step-000001.zip"
    file.write_bytes(file.read_bytes()[:100])
    assert load_run(tmp_path).groups.steps == [1, 2]
    (message,) = toy(tiny.with_changes({"training.max_steps": 3}), tmp_path).resume()
    assert message.startswith(f"{file}: damaged (")
    assert message.endswith("renamed to damaged-step-000001.zip")
    assert load_run(tmp_path).groups.steps == [2]


def test_an_error_of_the_disk_stops_the_run_and_can_be_resumed(tiny, tmp_path, monkeypatch):
    config = tiny.with_changes({"training.max_steps": 4})
    write = groups_module.write_group

    def full(group, images, thumbnail):
        if group.step == 2:
            raise OSError(28, "No space left on device")
        return write(group, images, thumbnail)

    monkeypatch.setattr(groups_module, "write_group", full)
    trainer = toy(config, tmp_path)
    with pytest.raises(RunStopped, match=r"No space left on device.*the run is saved in"):
        trainer.train()
    assert trainer.steps_done == 3  # the error is raised when the next step is recorded
    monkeypatch.undo()
    again = toy(config, tmp_path)
    again.resume()
    again.train()
    assert load_run(tmp_path).groups.steps == [1, 4]


def test_all_steps_are_on_the_disk_when_a_checkpoint_is_written(tiny, tmp_path, monkeypatch):
    write = groups_module.write_group
    found = []

    def slow(group, images, thumbnail):
        time.sleep(0.2)
        return write(group, images, thumbnail)

    monkeypatch.setattr(groups_module, "write_group", slow)
    config = tiny.with_changes({"training.max_steps": 2, "training.checkpoint_every": 1})
    trainer = toy(config, tmp_path)

    def checkpointed(metrics):
        found.append(load_run_groups(tmp_path).steps)

    trainer.train(checkpointed)
    assert found == [[1], [1, 2]]


def test_the_history_of_a_trainer(tiny, tmp_path):
    trainer = toy(tiny, tmp_path)
    assert list(trainer.history) == ["step"]
    lines = trainer.train()
    assert trainer.history["reward/red"] == [line["reward/red"] for line in lines]


def test_a_copied_run_is_read(tiny, tmp_path):
    toy(tiny, tmp_path / "run").train()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    run = load_run(tmp_path / "copy")
    assert run.status == "finished"
    check_images(run.groups[2])


def test_the_estimate_of_the_disk(tiny, tmp_path):
    """The files of a run of the bundled model need less, but more than a third."""
    config = tiny.with_changes({"evaluation.every": 1, "evaluation.num_prompts": 24})
    Trainer(config, tmp_path).train()
    for part, estimate in (
        ("groups", groups_bytes(config)),
        ("evaluations", evaluations_bytes(config)),
    ):
        written = sum(file.stat().st_size for file in (tmp_path / part).glob("*.zip"))
        assert estimate / 3 < written < estimate
    none = tiny.with_changes({"training.record.prompts": 0})
    assert groups_bytes(none) == evaluations_bytes(none) == 0
    small = {"training.record.megabytes": 1, "training.max_steps": 10_000}
    assert groups_bytes(tiny.with_changes(small)) == pytest.approx(1e6, rel=0.2)
