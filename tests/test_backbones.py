"""The real backbones on tiny twins: parity with diffusers' own pipelines, embeddings that are kept, training, export, errors."""

import logging

import numpy as np
import pytest
import torch
import twins
from diffusers import Flux2KleinPipeline, FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline, ZImagePipeline

from flowgrain import Run, SettingsError
from flowgrain.models import Dtypes, Source, load_backbone
from flowgrain.training.policy import load_dtypes
from flowgrain.core.sde import sigma_grid
from flowgrain.config.schema import settings
from flowgrain.evaluation.survey import open_model, targets
from flowgrain.training.trainer import load_model

PROMPTS = ["a red cat", "two blue dogs", "a green bird", "seven trees"]
PIPELINES = {
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
    "flux2": Flux2KleinPipeline,
    "qwen_image": QwenImagePipeline,
    "zimage": ZImagePipeline,
}
SIZE = {"height": 32, "width": 48, "max_prompt_tokens": 40}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("twins")
    twins.sd3(root / "sd3")
    twins.sd3(root / "sd3-no-t5", with_t5=False)
    twins.flux(root / "flux")
    twins.flux(root / "schnell", guidance=False)
    twins.flux2(root / "flux2")
    twins.qwen_image(root / "qwen_image")
    twins.zimage(root / "zimage")
    return root


def brightness(images, prompts):
    return images.mean((1, 2, 3)) + 0.1 * images[:, 0].std((1, 2))


def run_of(model, weights, tmp_path, **changes):
    values = {
        "model": model, "weights": str(weights), "num_steps": 4, "group_size": 3, "granularities": (1, 2), "prompts_per_step": 2,
        "max_steps": 2, "eval_num_steps": 3, "eval_prompts": 2, "learning_rate": 1e-2, "guidance_scale": 3.5, **SIZE, **changes,
    }  # fmt: skip
    return Run(settings(values), tmp_path, prompts=PROMPTS, eval_prompts=PROMPTS[:2], rewards={"brightness": brightness})


def latents_of(run, count):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *run.backbone.latent_shape, generator=generator)


def images_of_pipeline(pipe, run, noise, num_steps, guidance, prompts):
    """The pipeline's own images from our noise on our grid: it applies the shift itself."""
    pipe.set_progress_bar_config(disable=True)
    sigmas = np.linspace(1, 1 / num_steps, num_steps).tolist()
    guided = {"guidance_scale": guidance}
    if isinstance(pipe, QwenImagePipeline):
        guided = {"true_cfg_scale": guidance, "negative_prompt": [""] * len(prompts)}
    if isinstance(pipe, ZImagePipeline):
        guided = {"guidance_scale": guidance - 1}  # v + scale (v - v_free)
    found = pipe(
        prompt=list(prompts), height=run.settings.height, width=run.settings.width, latents=noise, sigmas=sigmas,
        num_inference_steps=num_steps, max_sequence_length=run.settings.max_prompt_tokens, output_type="pt", **guided,
    )  # fmt: skip
    return found.images


@pytest.mark.parametrize(
    ("model", "weights", "guidance"),
    [
        ("sd3", "sd3", 4.5),
        ("sd3", "sd3", 1.0),
        ("sd3", "sd3-no-t5", 3.0),
        ("flux", "flux", 3.5),
        ("flux", "schnell", 1.0),
        ("flux2", "flux2", 4.0),
        ("flux2", "flux2", 1.0),
        ("qwen_image", "qwen_image", 4.0),
        ("qwen_image", "qwen_image", 1.0),
        ("zimage", "zimage", 5.0),
        ("zimage", "zimage", 1.0),
    ],
)
def test_our_images_are_the_pipelines(folders, tmp_path, model, weights, guidance):
    """fp32, 1e-4: the pipeline rounds timesteps to 1000 sigma in fp32, we hand the model sigma itself. One prompt is cut."""
    from flowgrain.training.evaluate import sample

    run = run_of(model, folders / weights, tmp_path, shift="auto", guidance_scale=guidance, num_steps=5)
    noise = latents_of(run, 2)
    prompts = [PROMPTS[0], "a green bird and " * 6]
    ours = sample(run.policy, prompts, noise, run.settings.grid(), guidance, 8)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if weights == "sd3-no-t5" else {}  # from_pretrained wants to be told
    pipe = PIPELINES[model].from_pretrained(folders / weights, **absent)
    theirs = images_of_pipeline(pipe, run, noise, 5, guidance, prompts)
    assert ours.shape == theirs.shape == (2, 3, 32, 48)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model", "size", "mu"),  # mu: each pipeline's own formula with its published constants, at 96 and 4096 tokens
    [
        ("sd3", 48, None),
        ("flux", 48, 0.5 + (1.15 - 0.5) / (4096 - 256) * (96 - 256)),
        ("qwen_image", 48, 0.5 + (0.9 - 0.5) / (8192 - 256) * (96 - 256)),
        ("zimage", 48, None),
        (
            "flux2",
            48,
            8.73809524e-05 * 96 + 1.89833333 + (6 - 10) / 190 * ((0.00016927 - 8.73809524e-05) * 96 + 0.45666666 - 1.89833333),
        ),
        ("flux2", 4 * 4608, 0.00016927 * 8 * 4608 + 0.45666666),
    ],
)
def test_the_natural_shift_is_the_schedulers(folders, model, size, mu):
    backbone = load_backbone(Source(model, str(folders / model), height=32, width=size))
    scheduler = backbone.pipe.scheduler
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6).tolist(), mu=mu)
    torch.testing.assert_close(sigma_grid(6, *backbone.natural_shift(6)), scheduler.sigmas, atol=1e-6, rtol=0)
    assert (backbone.natural_shift(6)[1] == 0.02) == (model == "qwen_image")


@pytest.mark.parametrize("model", PIPELINES)
@pytest.mark.parametrize("rank", [0, 2])
def test_training_resume_and_export(folders, tmp_path, monkeypatch, model, rank):
    """Two steps, a resume to the bit, and the export in a plain pipeline gives our images."""
    from flowgrain.training.evaluate import sample

    monkeypatch.setattr(Run, "report", lambda _: None)  # it draws no less for a small run
    whole = run_of(model, folders / model, tmp_path / "whole", lora_rank=rank, checkpoint_every=1, eval_every=2)
    before, first, last = whole.train()
    assert first["ratio/max"] == 1
    assert first["grad_norm"] > 0
    assert last["eval/brightness"] != before["eval/brightness"]
    run_of(model, folders / model, tmp_path / "cut", lora_rank=rank, checkpoint_every=1, max_steps=1).train()
    again = run_of(model, folders / model, tmp_path / "cut", lora_rank=rank, checkpoint_every=1)
    again.resume()
    again.train()
    for name, parameter in whole.policy.trained.items():
        assert torch.equal(parameter, again.policy.trained[name]), name

    noise = latents_of(whole, 2)
    ours = sample(whole.policy, PROMPTS[:2], noise, sigma_grid(4), 3.5, 8)
    pipe = PIPELINES[model].from_pretrained(folders / model)
    fixed = {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": None}
    pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, **fixed})
    before = images_of_pipeline(pipe, whole, noise, 4, 3.5, PROMPTS[:2])
    if rank:
        pipe.load_lora_weights(str(tmp_path / "whole" / "export" / "lora"))
    else:
        pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path / "whole" / "export" / "transformer")
    theirs = images_of_pipeline(pipe, whole, noise, 4, 3.5, PROMPTS[:2])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (before - theirs).abs().max() > 1e-3
    (target,) = targets([str(tmp_path / "whole" / "export")])
    policy, _ = open_model(target, whole.settings, {})
    again = sample(policy, PROMPTS[:2], noise, sigma_grid(4), 3.5, 8)
    torch.testing.assert_close(again, ours, atol=1e-5, rtol=0)


def test_embeddings_are_kept_and_the_encoders_stay_away(folders, tmp_path, monkeypatch, caplog):
    source = Source("flux", str(folders / "flux"), embedding_cache=str(tmp_path / "cache"), **SIZE)
    first = load_backbone(source).encode(PROMPTS)
    again = load_backbone(source)
    monkeypatch.setattr(again, "_load", lambda **_: pytest.fail("the text encoders were loaded"))
    for name, value in again.encode(PROMPTS).items():
        assert torch.equal(value, first[name])

    damaged = load_backbone(source)
    path = damaged.cache.path(PROMPTS[1])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        for name, value in damaged.encode(PROMPTS).items():
            torch.testing.assert_close(value, first[name], atol=1e-5, rtol=1e-5)
    assert str(path) in caplog.text
    assert damaged.cache.damaged == 1

    other_length = load_backbone(Source(**{**vars(source), "max_prompt_tokens": 12}))
    assert other_length.encode(PROMPTS[:1])["embeds"].shape[1] == 12
    config = folders / "flux" / "text_encoder_2" / "config.json"
    config.write_text(config.read_text() + " ")  # other encoders: what is kept is stale
    assert load_backbone(source).cache.get(PROMPTS[0]) is None


def test_ten_thousand_kept_prompts_take_no_text_encoder(folders, tmp_path, monkeypatch):
    """Through the very call that a step makes, in steps of 24."""
    source = Source("flux", str(folders / "schnell"), embedding_cache=str(tmp_path / "cache"), **SIZE)
    backbone = load_backbone(source)
    kept = {name: value[0] for name, value in backbone.encode(["a"]).items()}
    prompts = [f"prompt {i}" for i in range(10_000)]
    for prompt in prompts:
        backbone.cache.put(prompt, {"pooled": kept["pooled"], "embeds": kept["embeds"][:1]})
    again = load_backbone(source)
    monkeypatch.setattr(again, "_load", lambda **_: pytest.fail("the text encoders were loaded"))
    rows = sum(len(again.encode(prompts[first : first + 24])["pooled"]) for first in range(0, 10_000, 24))
    assert rows == 10_000
    assert again.cache.damaged == 0
    assert len(again._memory) == 512


def test_encode_fills_the_cache(folders, tmp_path):
    import subprocess
    import sys

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = [
        f"weights={folders / 'schnell'}",
        "height=32",
        "width=48",
        "max_prompt_tokens=40",
        f"prompts={tmp_path / 'prompts.txt'}",
    ]
    words += [f"eval_prompts_file={tmp_path / 'prompts.txt'}", f"embedding_cache={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "flowgrain", "encode", "g2rpo", "model=flux", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == len(PROMPTS) + 1  # and the unconditional one
    source = Source("flux", str(folders / "schnell"), embedding_cache=str(tmp_path / "cache"), **SIZE)
    assert all(load_backbone(source).cache.get(prompt) is not None for prompt in PROMPTS)


def test_what_cannot_be_loaded(folders, tmp_path):
    for values, message in (
        ({"weights": ""}, "weights: model=sd3 needs them"),
        ({"weights": str(tmp_path)}, "no model_index.json"),
        ({"height": 30}, "height=30: sd3 takes multiples of 4; 28 or 32"),
        ({"model": "sd4"}, "did you mean 'sd3'"),
        ({"model": "qwen_image", "max_prompt_tokens": 2000}, "max_prompt_tokens=2000: .* 1024 at most"),
    ):
        with pytest.raises(SettingsError, match=message):
            run_of(**{"model": "sd3", "weights": folders / "sd3", "tmp_path": tmp_path, **values})
    long = " ".join(["cat"] * 40)
    with pytest.raises(SettingsError, match="more than 40; shorten it, raise max_prompt_tokens=40"):
        Run(settings({"model": "flux", "weights": str(folders / "flux"), **SIZE}), prompts=[long], eval_prompts=PROMPTS)
    without = {**SIZE, "max_prompt_tokens": 256}
    with pytest.raises(SettingsError, match="more than 77; shorten it, have T5"):
        Run(settings({"model": "sd3", "weights": str(folders / "sd3-no-t5"), **without}), prompts=[long], eval_prompts=PROMPTS)
    Run(
        settings({"model": "flux", "weights": str(folders / "flux"), "long_prompts": "cut", **SIZE}),
        prompts=[long],
        eval_prompts=PROMPTS,
    )


@pytest.mark.parametrize("model", PIPELINES)
def test_dtypes_part_by_part(folders, tmp_path, model):
    """Under LoRA the frozen transformer is read in the computing dtype, the adapter is fp32 and there is one copy; else fp32."""
    coarse = {"dtype": "bfloat16", "encoder_dtype": "bfloat16"}
    run = run_of(model, folders / model, tmp_path, lora_rank=2, vae_dtype="bfloat16", **coarse)
    found = load_model(run.settings)
    assert {p.dtype for part in (found.transformer, found.vae) for p in part.parameters()} == {torch.bfloat16}
    assert run.policy.sampler is run.policy.transformer
    assert {p.dtype for p in run.policy.trained.values()} == {torch.float32}
    assert run.step(1)["ratio/max"] == 1
    assert run.policy.unconditional["embeds"].dtype == torch.bfloat16

    full = run_of(model, folders / model, tmp_path, **coarse)
    assert {p.dtype for part in (full.policy.transformer, full.backbone.vae) for p in part.parameters()} == {torch.float32}
    assert {p.dtype for p in full.policy.sampler.parameters()} == {torch.bfloat16}
    assert full.step(1)["ratio/max"] == 1


def test_dtypes_left_to_us(monkeypatch):
    assert load_dtypes(settings({"lora_rank": 2})) == Dtypes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_dtypes(settings({"lora_rank": 2})) == Dtypes(torch.bfloat16, torch.float32, torch.bfloat16)
    assert load_dtypes(settings({})) == Dtypes(torch.float32, torch.float32, torch.bfloat16)
    assert load_dtypes(settings({"vae_dtype": "bfloat16", "encoder_dtype": "float32"})).encoders == torch.float32
