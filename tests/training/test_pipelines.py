"""Runs of the published models on tiny twins: parity with their pipelines, resume, export."""

import subprocess
import sys

import pytest
import torch
import twins
from twins import PARITY_CASES, PIPELINES, PROMPTS, SIZE, pipeline_images

from flowgrain import SettingsError, Trainer, load_config
from flowgrain.core.sde import sigma_grid
from flowgrain.evaluation.targets import find_targets, load_target
from flowgrain.models import Dtypes, ModelConfig, load_backbone
from flowgrain.training.evaluate import sample
from flowgrain.training.load import load_dtypes, load_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("twins")
    twins.save_all(root)
    return root


def brightness(images, prompts):
    return images.mean((1, 2, 3)) + 0.1 * images[:, 0].std((1, 2))


def config_of(name, path, changes=()):
    values = {
        "model.name": name,
        "model.path": str(path),
        "model.embedding_cache": None,
        "model.gradient_checkpointing": False,
        "model.long_prompts": "error",
        **{f"model.{key}": value for key, value in SIZE.items()},
        "method.group_size": 3,
        "method.granularities": [1, 2],
        "sampling.num_steps": 4,
        "sampling.guidance_scale": 3.5,
        "sampling.batch_size": 128,
        "rewards": ["brightness"],
        "optimizer.learning_rate": 1e-2,
        "training.prompts_per_step": 2,
        "training.micro_batch_size": None,
        "training.max_steps": 2,
        "evaluation.every": 0,
        "evaluation.num_steps": 3,
        "evaluation.num_prompts": 2,
        "evaluation.rewards": [],
        "runtime.dtype": "auto",
        "runtime.seed": 0,
    }
    return load_config("g2rpo", {**values, **dict(changes)})


def trainer_of(name, path, out, changes=()):
    return Trainer(
        config_of(name, path, changes),
        out,
        prompts=PROMPTS,
        eval_prompts=PROMPTS[:2],
        rewards={"brightness": brightness},
    )


def noise_of(trainer, count):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *trainer.backbone.latent_shape, generator=generator)


@pytest.mark.parametrize(("name", "folder", "guidance"), PARITY_CASES)
def test_images_match_the_pipeline(folders, tmp_path, name, folder, guidance):
    """On the pipeline's own grid. Within 1e-4: the pipeline rounds timesteps."""
    changes = {
        "sampling.grid": "model",
        "sampling.shift": None,
        "sampling.guidance_scale": guidance,
    }
    changes |= {"sampling.num_steps": 5, "model.long_prompts": "truncate"}
    trainer = trainer_of(name, folders / folder, tmp_path, changes)
    noise = noise_of(trainer, 2)
    prompts = [PROMPTS[0], "a green bird and " * 6]
    images = sample(trainer.policy, prompts, noise, trainer.sigmas, guidance, 8).images
    absent = {"text_encoder_3": None, "tokenizer_3": None} if folder == "sd3-no-t5" else {}
    pipe = PIPELINES[name].from_pretrained(folders / folder, **absent)
    expected = pipeline_images(pipe, noise, 5, guidance, prompts, own_grid=True)
    assert images.shape == expected.shape == (2, 3, 32, 48)
    assert images.std() > 0.01
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("flux", 0),
        ("sd3", 2),
        *(
            pytest.param(name, rank, marks=pytest.mark.slow)
            for name in PIPELINES
            for rank in (0, 2)
            if (name, rank) not in {("flux", 0), ("sd3", 2)}
        ),
    ],
)
def test_train_resume_export(folders, tmp_path, name, rank):
    """A resumed run has the same bits, and a pipeline with the export gives the same images."""
    changes = {"lora.rank": rank, "training.checkpoint_every": 1}
    path = folders / name
    whole = trainer_of(name, path, tmp_path / "whole", {**changes, "evaluation.every": 2})
    before, first, last = whole.train()
    assert first["ratio/max"] == 1
    assert first["grad_norm"] > 0
    assert last["eval/brightness"] != before["eval/brightness"]
    trainer_of(name, path, tmp_path / "cut", {**changes, "training.max_steps": 1}).train()
    resumed = trainer_of(name, path, tmp_path / "cut", changes)
    resumed.resume()
    resumed.train()
    for key, parameter in whole.policy.parameters.items():
        assert torch.equal(parameter, resumed.policy.parameters[key]), key

    noise, export = noise_of(whole, 2), tmp_path / "whole" / "export"
    images = sample(whole.policy, PROMPTS[:2], noise, sigma_grid(4), 3.5, 8).images
    pipe = PIPELINES[name].from_pretrained(path)
    fixed = {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": None}
    pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, **fixed})
    untrained = pipeline_images(pipe, noise, 4, 3.5, PROMPTS[:2])
    if rank:
        pipe.load_lora_weights(str(export / "lora"))
    else:
        pipe.transformer = type(pipe.transformer).from_pretrained(export / "transformer")
    expected = pipeline_images(pipe, noise, 4, 3.5, PROMPTS[:2])
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    assert (untrained - expected).abs().max() > 1e-3
    (target,) = find_targets([str(export)])
    policy, _ = load_target(target, whole.config, {})
    again = sample(policy, PROMPTS[:2], noise, sigma_grid(4), 3.5, 8).images
    torch.testing.assert_close(again, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"lora.rank": 2, "runtime.dtype": "bfloat16"}])
def test_an_empty_backbone_trains_like_a_loaded_one(folders, tmp_path, changes):
    """The trainer builds its own backbone empty, and a backbone from Python has its weights."""
    empty = trainer_of("sd3", folders / "sd3", tmp_path / "empty", changes)
    loaded = Trainer(
        empty.config,
        tmp_path / "loaded",
        prompts=PROMPTS,
        eval_prompts=PROMPTS[:2],
        rewards={"brightness": brightness},
        backbone=load_model(empty.config),
    )
    assert empty.backbone.weights is None
    found = [{k: v for k, v in t.step(1).items() if "seconds" not in k} for t in (empty, loaded)]
    assert found[0] == found[1]
    for name, parameter in empty.policy.parameters.items():
        assert torch.equal(parameter, loaded.policy.parameters[name]), name


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "sd3")) for name in PIPELINES],
)
def test_dtypes_of_a_run(folders, tmp_path, name):
    """LoRA: one transformer in the compute dtype and a float32 adapter. Full: float32 masters."""
    coarse = {"runtime.dtype": "bfloat16", "model.encoder_dtype": "bfloat16"}
    changes = {**coarse, "lora.rank": 2, "model.vae_dtype": "bfloat16"}
    lora = trainer_of(name, folders / name, tmp_path / "lora", changes)
    loaded = load_model(lora.config)
    parts = (loaded.transformer, loaded.vae)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
    assert lora.policy.sampler is lora.policy.model
    assert {p.dtype for p in lora.policy.parameters.values()} == {torch.float32}
    assert lora.step(1)["ratio/max"] == 1
    assert lora.policy.unconditional["embeds"].dtype == torch.bfloat16

    full = trainer_of(name, folders / name, tmp_path / "full", coarse)
    parts = (full.policy.model, full.backbone.vae)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert {p.dtype for p in full.policy.sampler.parameters()} == {torch.bfloat16}
    assert full.step(1)["ratio/max"] == 1


def test_automatic_dtypes(monkeypatch):
    def dtypes(changes):
        return load_dtypes(load_config("g2rpo", changes))

    assert dtypes({"lora.rank": 2}) == Dtypes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    coarse = torch.bfloat16
    assert dtypes({"lora.rank": 2}) == Dtypes(coarse, torch.float32, coarse)
    assert dtypes({}) == Dtypes(torch.float32, torch.float32, coarse)
    given = dtypes({"model.vae_dtype": "bfloat16", "model.encoder_dtype": "float32"})
    assert given == Dtypes(torch.float32, coarse, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.path": ""}, "model.path: model.name=sd3 needs weights"),
        ({"model.height": 30}, "model.height=30: model.name=sd3 needs a multiple of 4"),
        ({"model.name": "sd4"}, "Did you mean 'sd3'"),
    ],
)
def test_models_that_cannot_be_loaded(folders, tmp_path, changes, message):
    with pytest.raises(SettingsError, match=message):
        trainer_of("sd3", folders / "sd3", tmp_path / "run", changes)
    assert not (tmp_path / "run").exists()


def test_long_prompts_of_a_run(folders, tmp_path):
    config = config_of("flux", folders / "flux")
    given = {"eval_prompts": PROMPTS, "rewards": {"brightness": brightness}}
    long = " ".join(["cat"] * 40)
    with pytest.raises(SettingsError, match=r"^data.prompts: prompt 1 has \d+ tokens. The maximum"):
        Trainer(config, tmp_path, prompts=[long], **given)
    config = config.with_changes({"model.long_prompts": "truncate"})
    Trainer(config, tmp_path, prompts=[long], **given)


@pytest.mark.slow
def test_encode_fills_the_cache(folders, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    cache = tmp_path / "cache"
    words = [
        "model.name=flux",
        f"model.path={folders / 'schnell'}",
        f"model.embedding_cache={cache}",
    ]
    words += [f"model.{key}={value}" for key, value in SIZE.items()]
    words += [f"data.{key}={tmp_path / 'prompts.txt'}" for key in ("prompts", "eval_prompts")]
    command = [sys.executable, "-m", "flowgrain", "encode", "g2rpo", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    # The unconditional prompt is also encoded.
    assert len(list(cache.rglob("*.safetensors"))) == len(PROMPTS) + 1
    config = ModelConfig(
        name="flux", path=str(folders / "schnell"), embedding_cache=str(cache), **SIZE
    )
    backbone = load_backbone(config, Dtypes())
    assert all(backbone.cache.get(prompt) is not None for prompt in PROMPTS)
