"""A destroyed model or a failed evaluation stops a run, and is not exported."""

import os
import subprocess
import sys

import pytest
import torch
from toy import PROMPTS, Toy, red

from flowgrain import RunStopped, Trainer
from flowgrain.distributed import SINGLE
from flowgrain.training import checkpoint
from flowgrain.training.errors import Diverged
from flowgrain.training.health import EvaluationFailed, first_not_finite


def toy(config, folder, reward=red):
    given = {"prompts": PROMPTS, "eval_prompts": PROMPTS, "rewards": {"red": reward}}
    return Trainer(config, folder, backbone=Toy(), **given)


@pytest.fixture
def three(tiny):
    return tiny.with_changes(
        {"training.max_steps": 3, "training.checkpoint_every": 1, "training.ema_decay": 0.9}
    )


def steps_of(folder):
    return [path.name for path in checkpoint.checkpoints(folder / "checkpoints")]


@pytest.mark.slow
def test_a_learning_rate_that_destroys_the_model(tmp_path):
    """By the command of a user: exit status 1, one line, no export."""
    words = (
        *("demo", "optimizer.learning_rate=1e12", "training.max_steps=2", "evaluation.every=2"),
        *("sampling.num_steps=4", "method.group_size=3", "training.prompts_per_step=2"),
        *("evaluation.num_prompts=6", "evaluation.num_steps=4", "runtime.threads=1"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "flowgrain", "train", *words, "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: step 2: the model is destroyed: ")
    assert last.endswith("optimizer.learning_rate=0.0001")
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["weights", "ema"])
def test_parameters_that_are_not_finite(three, tmp_path, value, kind):
    trainer = toy(three, tmp_path)
    update = trainer.policy.after_update

    def broken():
        update()
        if trainer.policy.updates == 2:
            with torch.no_grad():
                next(t for n, t in trainer.policy.tensors().items() if n.startswith(kind))[0] = (
                    value
                )

    trainer.policy.after_update = broken
    with pytest.raises(Diverged) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith(f"step 2: the model is destroyed: {kind}.")
    assert "A resume uses" in message
    assert "step-000001. Use a smaller learning rate than 0.0001" in message
    assert "config.with_changes({'optimizer.learning_rate': 3.33333e-05}), " in message
    assert message.endswith("call resume(), then train()")
    assert "\n" not in message
    assert steps_of(tmp_path) == ["step-000001"]
    assert not (tmp_path / "export").exists()
    again = toy(three.with_changes({"optimizer.learning_rate": 1e-5}), tmp_path)
    again.resume()
    assert [line["step"] for line in again.train()] == [1, 2, 3]
    assert (tmp_path / "export").exists()


def test_broken_parameters_are_never_exported(three, tmp_path):
    trainer = toy(three, tmp_path)
    trainer.train()
    before = (tmp_path / "export" / "transformer" / "weights.pt").read_bytes()
    with torch.no_grad():
        trainer.policy.ema.shadow_params[0][0] = torch.nan
    with pytest.raises(RunStopped, match=r"export: not written, because .* contains NaN"):
        trainer.export()
    assert (tmp_path / "export" / "transformer" / "weights.pt").read_bytes() == before
    assert list(tmp_path.glob(".export*")) == []


def test_evaluation_images_that_are_not_finite(three, tmp_path):
    """Weights that are finite but so large that the images are not."""
    config = three.with_changes({"evaluation.every": 2, "training.max_steps": 2})
    trainer = toy(config, tmp_path)
    update = trainer.policy.after_update
    decode = trainer.backbone.decode

    def destroyed():
        update()
        if trainer.policy.updates == 2:
            trainer.backbone.decode = lambda latents: decode(latents) * torch.nan

    trainer.policy.after_update = destroyed
    with pytest.raises(Diverged, match=r"after step 2: the model is destroyed: 4 of 4 images"):
        trainer.train()
    assert steps_of(tmp_path) == ["step-000001"]
    assert not (tmp_path / "export").exists()
    assert [line["step"] for line in trainer.recorder.read_metrics()] == [0, 1]
    assert not (tmp_path / "evaluations" / "step-000002.json").exists()


@pytest.mark.parametrize(
    ("allowed", "failing", "stops"),
    [(0.2, 1, True), (0.25, 1, False), (0.0, 1, True), (1.0, 3, False), (1.0, 4, True)],
)
def test_a_reward_that_fails_on_images_of_an_evaluation(three, tmp_path, allowed, failing, stops):
    changes = {
        "evaluation.every": 2,
        "training.max_steps": 2,
        "training.max_failed_rewards": allowed,
    }
    calls = []

    def flaky(images, prompts):
        values = red(images, prompts)
        if len(images) == 4:  # an evaluation
            calls.append(1)
            if len(calls) == 2:
                values[:failing] = torch.nan
        return values

    trainer = toy(three.with_changes(changes), tmp_path, flaky)
    if not stops:
        assert len(trainer.train()) == 3
        return
    with pytest.raises(EvaluationFailed) as error:
        trainer.train()
    message = str(error.value)
    assert f"after step 2: reward 'red' failed on {failing} of 4 images" in message
    reason = ", which leaves none" if allowed == 1 else f"training.max_failed_rewards={allowed:g} "
    assert reason in message
    assert f"Fix the reward, then resume with Trainer(config, '{tmp_path}', " in message
    assert steps_of(tmp_path)[-1] == "step-000002"  # the weights are good
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("first", [1, 2])
def test_rollout_images_that_are_not_finite(three, tmp_path, first):
    """The checkpoint before the broken rollout is not used again."""
    trainer = toy(three, tmp_path)
    update, decode = trainer.policy.after_update, trainer.backbone.decode

    def broken():
        update()
        if trainer.policy.updates == first:
            trainer.backbone.decode = lambda latents: decode(latents) * torch.nan

    trainer.policy.after_update = broken
    with pytest.raises(Diverged) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith(f"step {first + 1}: the model is destroyed: ")
    assert "images contain NaN or infinity" in message
    assert f"Its checkpoint was renamed to damaged-step-{first:06d}" in message
    assert ("no earlier checkpoint: a resume starts at step 0" in message) == (first == 1)
    assert "'optimizer.learning_rate': 3.33333e-05" in message
    assert steps_of(tmp_path) == ["step-000001"][: first - 1]
    assert (tmp_path / "checkpoints" / f"damaged-step-{first:06d}").is_dir()
    again = toy(three.with_changes({"optimizer.learning_rate": 1e-5}), tmp_path)
    again.resume()
    assert again.steps_done == first - 1
    assert [line["step"] for line in again.train()] == [1, 2, 3]


def test_a_model_that_is_broken_before_training(three, tmp_path):
    trainer = toy(three, tmp_path)
    trainer.backbone.decode = lambda latents: torch.full((len(latents), 3, 2, 2), torch.nan)
    with pytest.raises(Diverged, match=r"step 1: .*No step was trained\. Check .* runtime\.dtype="):
        trainer.train()
    assert steps_of(tmp_path) == []


def test_an_evaluated_reward_that_is_not_trained_can_be_removed(three, tmp_path):
    changes = {"evaluation.every": 1, "evaluation.rewards": ["towers"]}
    trainer = toy(three.with_changes(changes), tmp_path)
    trainer.eval_rewards["towers"] = lambda images, prompts: [torch.nan] * len(images)
    with pytest.raises(EvaluationFailed, match=r"or remove it from evaluation\.rewards, then"):
        trainer.train()


def test_a_reward_that_fails_before_the_first_step(three, tmp_path):
    def failing(images, prompts):
        raise OSError("gone")

    trainer = toy(three.with_changes({"evaluation.every": 1}), tmp_path, failing)
    with pytest.raises(
        EvaluationFailed,
        match=r"after step 0: reward 'red' failed on 4 of 4 images \(.*gone.*\), more than",
    ):
        trainer.train()
    again = toy(three, tmp_path)
    again.resume()
    assert [line["step"] for line in again.train()] == [1, 2, 3]


def test_the_first_tensor_that_is_not_finite():
    good = {"a": torch.ones(2), "n": torch.tensor([1, 2]), "empty": torch.ones(0)}
    assert first_not_finite(good, SINGLE) is None
    assert first_not_finite({}, SINGLE) is None
    bad = {**good, "b": torch.tensor([1.0, -torch.inf]), "c": torch.tensor(torch.nan)}
    assert first_not_finite(bad, SINGLE) == "b"
