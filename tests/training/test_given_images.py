"""Training on data sets of images: pairs for Diffusion-DPO, and single images for SFT."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from toy import PROMPTS, Toy

from flowgrain import RunStopped, SettingsError, Trainer, load_config
from flowgrain.core.regression import squared_error
from flowgrain.data import latent_noise
from flowgrain.report.run_page import write_report
from flowgrain.training.step import rollout_loss

BUNDLED = ["two red circles", "three green circles", "one blue square", "two yellow squares"]


class Encoder(Toy):
    """The toy backbone, which encodes an image as its colors at two places."""

    def encode_images(self, images):
        return torch.stack([images[:, :, 0, 0], images[:, :, -1, -1]], 1)


def write_images(folder, texts, kind):
    """A data set with one row per text and random images."""
    random, rows = np.random.default_rng(1), []
    columns = ("image_chosen", "image_rejected") if kind == "pairs" else ("image",)
    for number, text in enumerate(texts):
        row = {"prompt": text}
        for name in columns:
            row[name] = f"{name}-{number}.png"
            pixels = random.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / row[name])
        rows.append(row)
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def config_of(kind, file, changes=None):
    method = {"pairs": "diffusion_dpo", "images": "sft"}[kind]
    values = {
        f"data.{kind}": file,
        "sampling.num_steps": 5,
        "sampling.batch_size": 5,
        "method.draws": 3,
        "optimizer.learning_rate": 1e-2,
        "training.prompts_per_step": 2,
        "training.max_steps": 4,
        "evaluation.every": 0,
        "evaluation.rewards": [],
        "runtime.seed": 5,
    }
    return load_config(method, {**values, **(changes or {})})


def toy(images, prompts):
    return images.mean((1, 2, 3))


def toy_trainer(tmp_path, kind, changes=None, out="run", backbone=None):
    file = write_images(tmp_path, PROMPTS, kind)
    config = config_of(kind, file, changes)
    given = {"rewards": {"toy": toy}, "eval_prompts": PROMPTS, "backbone": backbone or Encoder()}
    return Trainer(config, tmp_path / out, **given)


def draws(trainer, batch):
    """x_t, t, eps, x0 of every draw of every image, and the prompt, without the trainer's code."""
    method, images = trainer.method, len(batch.tree.leaves)
    prompt = np.repeat(np.arange(2), images // 2)
    owner = prompt if method.shares_draws else np.arange(images)
    random = np.random.default_rng([5, batch.step])
    levels = method.draw_levels(random, len(set(owner.tolist())), trainer.sigmas.numpy())
    kind = "forward of group" if method.shares_draws else "forward"
    t = torch.from_numpy(levels.sigma[owner]).flatten()
    keys = [(o, int(n)) for o in owner.tolist() for n in levels.number[o]]
    eps = torch.stack([latent_noise((2, 3), kind, 5, batch.step, *key) for key in keys])
    x0 = batch.rollout.latents.repeat_interleave(3, 0)
    mixed = (1 - t)[:, None, None] * x0 + t[:, None, None] * eps
    return mixed, t, eps, x0, torch.from_numpy(prompt).repeat_interleave(3)


@pytest.mark.parametrize("kind", ["pairs", "images"])
def test_the_loss_is_the_published_loss_of_the_images(tmp_path, kind):
    trainer = toy_trainer(tmp_path, kind, {"training.micro_batch_size": 4})
    with torch.no_grad():
        for p in trainer.policy.model.parameters():
            p += 0.05
    batch = trainer.collector.collect(1)
    mixed, t, eps, x0, prompt = draws(trainer, batch)
    cond = {name: value[prompt] for name, value in batch.cond.items()}
    error = squared_error(trainer.policy.train_velocity(mixed, t, cond, 1.0), eps - x0)
    if kind == "images":
        expected = error.mean()
    else:
        before = squared_error(trainer.policy.old_velocity(mixed, t, cond, 1.0), eps - x0)
        better, worse = (error - before).reshape(2, 2, 3).unbind(1)
        expected = -torch.nn.functional.logsigmoid(-50 * (better - worse)).mean()
    losses = rollout_loss(trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas)
    (share,) = losses.updates
    terms = [losses.terms(0, place)["loss"] for place in range(len(share.micro_batches))]
    loss = torch.cat(terms).sum() / share.count
    parameters = list(trainer.policy.model.parameters())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    )


def test_the_images_of_a_step_belong_to_its_prompts(tmp_path):
    """Every epoch visits every row once, in an order that depends on the seed."""
    trainer = toy_trainer(tmp_path, "pairs")
    seen = []
    for step in (1, 2):
        batch = trainer.collector.collect(step)
        seen += [prompt.text for prompt in batch.prompts]
        for number, prompt in enumerate(batch.prompts):
            row = PROMPTS.index(prompt.text)
            names = (f"image_chosen-{row}.png", f"image_rejected-{row}.png")
            assert [image.name for image in prompt.images] == list(names)
            latents = trainer.backbone.encode_images(batch.images[2 * number : 2 * number + 2])
            torch.testing.assert_close(batch.rollout.latents[2 * number : 2 * number + 2], latents)
        assert batch.advantage.tolist() == [1, -1, 1, -1]
    assert sorted(seen) == sorted(PROMPTS)


@pytest.mark.parametrize("kind", ["pairs", "images"])
def test_a_step_samples_nothing_and_is_priced(tmp_path, kind):
    from flowgrain.planning.plan import RunPlan

    trainer = toy_trainer(tmp_path, kind)
    metrics, plan = trainer.step(1), RunPlan(trainer.config).to_dict()
    for name in ("forward_passes", "train_forward_passes", "frozen_forward_passes", "decodes"):
        assert metrics[name] == 2 * plan[name], name
    assert metrics["forward_passes"] == metrics["decodes"] == plan["reward_calls"] == 0
    assert metrics["train_forward_passes"] == 2 * 3 * (2 if kind == "pairs" else 1)
    assert "published_forward_passes" not in plan
    assert metrics["grad_norm"] > 0
    assert not [name for name in metrics if name.startswith("reward/")]


def test_the_reference_stays_the_model_before_training(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, "pairs")
    # Sampled images would replace the reference after this step.
    monkeypatch.setattr(type(trainer.method), "decay", lambda method, updates: 0.0)
    inputs = (torch.ones(1, 2, 3), torch.full((1,), 0.5), trainer.policy.encode(["one"]), 1.0)
    start = trainer.policy.old_velocity(*inputs)
    trainer.step(1)
    assert torch.equal(trainer.policy.old_velocity(*inputs), start)
    assert not torch.equal(trainer.policy.train_velocity(*inputs), start)


def test_pairs_are_learned(tmp_path):
    """The preferred images become more likely than the rejected ones: the loss falls."""
    trainer = toy_trainer(tmp_path, "pairs", {"training.prompts_per_step": 4})
    losses = [trainer.step(step)["loss"] for step in range(1, 41)]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert np.mean(losses[-10:]) < 0.5 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "images"])
def test_a_run_of_the_bundled_model_is_resumed_exactly(tmp_path, kind):
    file = write_images(tmp_path, BUNDLED, kind)
    changes = {"evaluation.every": None, "evaluation.num_prompts": 4, "training.max_steps": 3}

    def trainer(out, steps):
        return Trainer(config_of(kind, file, {**changes, "training.max_steps": steps}), out)

    whole = trainer(tmp_path / "whole", 3)
    lines = whole.train()
    assert any(name.startswith("eval/") for name in lines[-1])
    trainer(tmp_path / "cut", 2).train()
    resumed = trainer(tmp_path / "cut", 3)
    resumed.resume()
    resumed.train()
    for name, value in whole.policy.parameters.items():
        assert torch.equal(value, resumed.policy.parameters[name]), name
    assert write_report(tmp_path / "whole").exists()


def test_a_resumed_run_needs_the_same_images(tmp_path):
    trainer = toy_trainer(tmp_path, "images")
    trainer.train()
    file = tmp_path / "images.jsonl"
    file.write_text(file.read_text().replace("image-0.png", "image-1.png"))
    config, given = trainer.config, {"rewards": {"toy": toy}, "eval_prompts": PROMPTS}
    other = Trainer(config, tmp_path / "run", backbone=Encoder(), **given)
    with pytest.raises(SettingsError, match=r"data\.images: the training prompts and images diff"):
        other.resume()


# -------------------------------------------------------------------------------------- errors


def test_settings_that_do_not_fit(tmp_path):
    file = write_images(tmp_path, PROMPTS, "pairs")
    rate = "optimizer.learning_rate=1e-3"
    for method, changes, message in (
        ("sft", [f"data.pairs={file}"], r"data\.pairs=.*: .*cannot train .* method diffusion_dpo"),
        ("g2rpo", [f"data.images={file}"], r"data\.images=.*: .* or use method sft\."),
        ("sft", [f"data.images={file}", f"data.pairs={file}"], "cannot train on this kind"),
        ("diffusion_dpo", [f"data.images={file}", f"data.pairs={file}"], "use either data.pairs"),
        ("sft", [f"data.images={file}", "data.prompts=a.txt"], r"data\.prompts=a\.txt: the train"),
        ("sft", [f"data.images={file}", "method.group_size=8"], "group_size=8: has no effect with"),
    ):
        with pytest.raises(SettingsError, match=message):
            load_config(method, [rate, *changes])


def test_missing_images_are_found_before_the_model_is_loaded(tmp_path):
    file = write_images(tmp_path, PROMPTS, "images")
    (tmp_path / "image-2.png").unlink()
    config = config_of("images", file, {"model.name": "sd3", "model.path": "/nowhere"})
    with pytest.raises(SettingsError, match=r"row 3: there is no file .*image-2\.png"):
        Trainer(config, tmp_path / "run")


def test_an_image_that_breaks_during_the_run_stops_it(tmp_path):
    trainer = toy_trainer(tmp_path, "images", {"training.prompts_per_step": 4})
    path = tmp_path / "image-2.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunStopped, match=r"row 3: .*image-2\.png cannot be read .*Replace it"):
        trainer.step(1)
    with pytest.raises(RunStopped) as stopped:  # a resumed run needs all rows
        trainer.train()
    assert "Replace it; the run is saved in" in str(stopped.value)
    assert "remove" not in str(stopped.value)


def test_a_backbone_that_does_not_encode_images(tmp_path):
    with pytest.raises(SettingsError, match=r"backbone Toy has no method encode_images"):
        toy_trainer(tmp_path, "images", backbone=Toy())


def test_a_backbone_with_latents_of_another_shape(tmp_path):
    class Wrong(Encoder):
        def encode_images(self, images):
            return images

    trainer = toy_trainer(tmp_path, "images", backbone=Wrong())
    with pytest.raises(RunStopped, match=r"Wrong: encode_images returns a tensor \[1, 3, 32, 32\]"):
        trainer.step(1)


def test_prompts_from_python_do_not_replace_a_data_set(tmp_path):
    config = config_of("images", write_images(tmp_path, PROMPTS, "images"))
    given = {"rewards": {"toy": toy}, "eval_prompts": PROMPTS, "backbone": Encoder()}
    with pytest.raises(SettingsError, match="Remove the argument prompts"):
        Trainer(config, tmp_path / "run", prompts=PROMPTS, **given)


def test_ties_are_reported(tmp_path, caplog):
    file = write_images(tmp_path, PROMPTS, "pairs")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    rows[0] = {
        "prompt": rows[0]["prompt"],
        "jpg_0": rows[0]["image_chosen"],
        "jpg_1": rows[0]["image_rejected"],
        "label_0": 0.5,
        "label_1": 0.5,
    }
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"rewards": {"toy": toy}, "eval_prompts": PROMPTS, "backbone": Encoder()}
    trainer = Trainer(config_of("pairs", file), tmp_path / "run", **given)
    assert len(trainer.prompts) == 3
    assert "1 pairs are ties and are left out. 3 pairs remain." in caplog.text


def test_a_prompt_that_cannot_be_encoded_is_named_by_its_row(tmp_path):
    """Rows are counted in the file, with the ties."""
    file = write_images(tmp_path, [*BUNDLED[:3], "green circle"], "pairs")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    tie = {"jpg_0": "image_chosen-0.png", "jpg_1": "image_rejected-0.png"}
    rows[0] = {"prompt": BUNDLED[0], **tie, "label_0": 1, "label_1": 1}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SettingsError, match=r"pairs\.jsonl: row 4: the shapes model cannot read"):
        Trainer(config_of("pairs", file, {"evaluation.rewards": ["oracle"]}), tmp_path / "run")


def test_rows_that_are_repeated_within_a_step_are_reported(tmp_path, caplog):
    toy_trainer(tmp_path, "images", {"training.prompts_per_step": 4}, out="enough")
    assert not caplog.text
    toy_trainer(tmp_path, "images", {"training.prompts_per_step": 5}, out="few")
    assert "4 rows are fewer than training.prompts_per_step=5" in caplog.text


def test_pairs_are_also_evaluated_if_there_are_no_other_prompts(tmp_path):
    """The last tenth of the rows, which is not used for training."""

    class WithoutPrompts(Encoder):
        def bundled_prompts(self, split):
            return []

    config = config_of("images", write_images(tmp_path, PROMPTS, "images"))
    trainer = Trainer(config, tmp_path / "run", rewards={"toy": toy}, backbone=WithoutPrompts())
    assert [prompt.text for prompt in trainer.prompts] == PROMPTS[:-1]
    assert [prompt.text for prompt in trainer.eval_prompts] == PROMPTS[-1:]
