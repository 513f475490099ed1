"""Backbones on tiny twins: parity with diffusers' pipelines, embedding cache, dtypes, errors."""

import itertools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import twins
from twins import PARITY_CASES, PIPELINES, PROMPTS, SIZE, pipeline_images

from flowgrain import SettingsError
from flowgrain.core.sde import sigma_grid
from flowgrain.models import CustomGuidance, Dtypes, ModelConfig, load_backbone


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("twins")
    twins.save_all(root)
    return root


def config_of(name, path, **changes):
    return ModelConfig(**{"name": name, "path": str(path), **SIZE, **changes})


def sample(backbone, prompts, noise, sigmas, guidance):
    """Images of Euler steps on the grid `sigmas`, with the guidance of the backbone."""
    cond, free = backbone.encode(prompts), backbone.encode([""])
    x = noise
    for sigma, next_sigma in itertools.pairwise(sigmas):
        level = sigma.expand(len(x))
        if backbone.embedded_guidance:
            given = {**cond, "guidance": torch.full((len(x),), guidance)}
            v = backbone.velocity(backbone.transformer, x, level, given)
        else:
            v = backbone.velocity(backbone.transformer, x, level, cond)
            unconditional = {name: value.expand_as(cond[name]) for name, value in free.items()}
            v_free = backbone.velocity(backbone.transformer, x, level, unconditional)
            if guidance != 1 and isinstance(backbone, CustomGuidance):
                v = backbone.guide(v, v_free, guidance)
            elif guidance != 1:
                v = v_free + guidance * (v - v_free)
        x = x + (next_sigma - sigma) * v
    return backbone.decode(x)


@pytest.mark.parametrize(("name", "folder", "guidance"), PARITY_CASES)
@torch.no_grad()
def test_images_match_the_pipeline(folders, name, folder, guidance):
    """The pipeline is called without noise levels. One of the prompts is truncated.

    Within 1e-4 in float32: the pipeline rounds timesteps.
    """
    backbone = load_backbone(config_of(name, folders / folder), Dtypes())
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, *backbone.latent_shape, generator=generator)
    prompts = [PROMPTS[0], "a green bird and " * 6]
    grid = sigma_grid(5, *backbone.natural_shift(5))
    images = sample(backbone, prompts, noise, grid, guidance)
    # from_pretrained must be told which parts were not saved.
    absent = {"text_encoder_3": None, "tokenizer_3": None} if folder == "sd3-no-t5" else {}
    pipe = PIPELINES[name].from_pretrained(folders / folder, **absent)
    expected = pipeline_images(pipe, noise, 5, guidance, prompts, own_grid=True)
    assert images.shape == expected.shape == (2, 3, 32, 48)
    assert images.std() > 0.01
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    if name == "sd3":  # on the grid without sigma_min, the images are others
        other = sample(backbone, prompts, noise, sigma_grid(5, 3.0), guidance)
        assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2", "qwen_image", "zimage"])
@torch.no_grad()
def test_encoding_is_the_inverse_of_decoding(folders, monkeypatch, name):
    """Except for the VAE, whose input of the decoder is used as the output of the encoder."""
    backbone = load_backbone(config_of(name, folders / name), Dtypes())
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    images = backbone.decode(latents)
    encoded = backbone.encode_images(images)
    assert encoded.shape == latents.shape
    assert encoded.dtype == torch.float32
    raw = []
    monkeypatch.setattr(backbone, "_images", lambda latents: raw.append(latents) or latents)
    backbone.decode(latents)
    posterior = SimpleNamespace(mode=lambda: raw[0])
    monkeypatch.setattr(backbone.vae, "encode", lambda pixels, return_dict: (posterior,))
    torch.testing.assert_close(backbone.encode_images(images), latents)


def test_images_are_encoded_by_the_mode_of_the_vae(folders):
    backbone = load_backbone(config_of("sd3", folders / "sd3"), Dtypes())
    images = torch.rand(3, 3, 32, 48)
    both = backbone.encode_images(images)
    posterior = backbone.vae.encode(2 * images[1:2] - 1).latent_dist.mode()
    config = backbone.vae.config
    expected = (posterior - config.shift_factor) * config.scaling_factor
    torch.testing.assert_close(both[1:2], expected)
    assert not both.requires_grad


def klein_mu(tokens, num_steps):
    """The formula of FLUX.2-klein's pipeline with its published constants."""
    slope = (8.73809524e-05, 0.00016927)
    offset = (1.89833333, 0.45666666)
    few, many = (a * tokens + b for a, b in zip(slope, offset, strict=True))
    return many if tokens > 4300 else few + (num_steps - 10) / 190 * (many - few)


@pytest.mark.parametrize(
    ("name", "width", "mu"),  # mu: the formula of each pipeline with its published constants
    [
        ("sd3", 48, None),
        ("flux", 48, 0.5 + (1.15 - 0.5) / (4096 - 256) * (96 - 256)),
        ("qwen_image", 48, 0.5 + (0.9 - 0.5) / (8192 - 256) * (96 - 256)),
        ("zimage", 48, None),
        ("flux2", 48, klein_mu(96, 6)),
        ("flux2", 4 * 4608, klein_mu(8 * 4608, 6)),
    ],
)
def test_the_natural_shift_matches_the_scheduler(folders, name, width, mu):
    backbone = load_backbone(config_of(name, folders / name, width=width), Dtypes())
    scheduler = backbone.pipe.scheduler
    levels = {"sigmas": np.linspace(1, 1 / 6, 6).tolist()} if name != "sd3" else {}
    scheduler.set_timesteps(6, mu=mu, **levels)
    grid = sigma_grid(6, *backbone.natural_shift(6))
    torch.testing.assert_close(grid, scheduler.sigmas, atol=1e-6, rtol=0)
    shift = backbone.natural_shift(6)
    assert (shift.terminal == 0.02) == (name == "qwen_image")
    assert (shift.sigma_min is not None) == (name == "sd3")


def test_the_published_grid_of_sd3(folders):
    """The ten steps of Flow-GRPO. The lowest level is shifted twice, by the scheduler's design."""
    backbone = load_backbone(config_of("sd3", folders / "sd3"), Dtypes())
    shift = backbone.natural_shift(10)
    assert (shift.shift, shift.terminal) == (3.0, None)
    assert shift.sigma_min == pytest.approx(3e-3 / (1 + 2e-3))
    expected = [1, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.0089, 0]
    torch.testing.assert_close(sigma_grid(10, *shift), torch.tensor(expected), atol=6e-4, rtol=0)
    assert sigma_grid(1, *backbone.natural_shift(1)).tolist() == [1, 0]


def test_cached_prompts_need_no_text_encoder(folders, tmp_path, monkeypatch, caplog):
    config = config_of("flux", folders / "flux", embedding_cache=str(tmp_path / "cache"))
    first = load_backbone(config, Dtypes()).encode(PROMPTS)
    again = load_backbone(config, Dtypes())
    monkeypatch.setattr(again, "_load_pipeline", lambda _: pytest.fail("text encoders were loaded"))
    for name, value in again.encode(PROMPTS).items():
        assert torch.equal(value, first[name])

    damaged = load_backbone(config, Dtypes())
    path = damaged.cache.path(PROMPTS[1])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        for name, value in damaged.encode(PROMPTS).items():
            torch.testing.assert_close(value, first[name], atol=1e-5, rtol=1e-5)
    assert str(path) in caplog.text
    assert damaged.cache.damaged == 1

    shorter = load_backbone(config.model_copy(update={"max_prompt_tokens": 12}), Dtypes())
    assert shorter.encode(PROMPTS[:1])["embeds"].shape[1] == 12
    coarse = load_backbone(config, Dtypes(encoders=torch.bfloat16))
    assert coarse.cache.get(PROMPTS[0]) is None
    file = folders / "flux" / "text_encoder_2" / "config.json"
    file.write_text(file.read_text() + " ")  # Other text encoders: the cache is out of date.
    assert load_backbone(config, Dtypes()).cache.get(PROMPTS[0]) is None


@pytest.mark.slow
def test_ten_thousand_cached_prompts_need_no_text_encoder(folders, tmp_path, monkeypatch):
    """In batches of 24, by the call that a training step makes."""
    config = config_of("flux", folders / "schnell", embedding_cache=str(tmp_path / "cache"))
    backbone = load_backbone(config, Dtypes())
    one = {name: value[0] for name, value in backbone.encode(["a"]).items()}
    prompts = [f"prompt {i}" for i in range(10_000)]
    for prompt in prompts:
        backbone.cache.put(prompt, {"pooled": one["pooled"], "embeds": one["embeds"][:1]})
    again = load_backbone(config, Dtypes())
    monkeypatch.setattr(again, "_load_pipeline", lambda _: pytest.fail("text encoders were loaded"))
    batches = [prompts[first : first + 24] for first in range(0, len(prompts), 24)]
    assert sum(len(again.encode(batch)["pooled"]) for batch in batches) == 10_000
    assert again.cache.damaged == 0
    assert again._recent_embedding.cache_info().currsize == 512


@pytest.mark.parametrize("name", PIPELINES)
def test_dtypes_of_the_parts(folders, name):
    dtypes = Dtypes(torch.bfloat16, torch.float32, torch.bfloat16)
    backbone = load_backbone(config_of(name, folders / name), dtypes)
    assert {p.dtype for p in backbone.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in backbone.vae.parameters()} == {torch.float32}
    assert backbone.encode(PROMPTS[:1])["embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", PIPELINES)
def test_options_of_the_model(folders, name):
    options = {"vae_tiling": True, "gradient_checkpointing": True, "attention_backend": "native"}
    backbone = load_backbone(config_of(name, folders / name, **options), Dtypes())
    assert backbone.vae.use_tiling
    assert backbone.transformer.is_gradient_checkpointing
    assert backbone.bundled_prompts("train") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "model.path: model.name=sd3 needs weights"),
        ({"path": "TMP"}, "model.path=.*contains no model_index.json"),
        ({"path": "nobody/nothing"}, "model.path=nobody/nothing: "),
        ({"height": 30}, "model.height=30: model.name=sd3 needs a multiple of 4. Use 28 or 32."),
        ({"name": "sd4"}, "model.name=sd4: there is no such backbone. Did you mean 'sd3'"),
        ({"attention_backend": "magic"}, "model.attention_backend=magic: "),
        (
            {"name": "qwen_image", "max_prompt_tokens": 2000},
            "model.max_prompt_tokens=2000: the maximum of model.name=qwen_image is 1024",
        ),
    ],
)
def test_settings_that_cannot_be_used(folders, tmp_path, changes, message):
    changes = {k: str(tmp_path) if v == "TMP" else v for k, v in changes.items()}
    with pytest.raises(SettingsError, match=message):
        load_backbone(config_of(**{"name": "sd3", "path": folders / "sd3", **changes}), Dtypes())


def test_long_prompts(folders, caplog):
    long = " ".join(["cat"] * 40)
    flux = load_backbone(config_of("flux", folders / "flux"), Dtypes())
    flux.check(PROMPTS)
    with pytest.raises(
        ValueError,
        match=r"^prompt 2 has \d+ tokens. The maximum is 40 \(model.max_prompt_tokens\). Shorten",
    ):
        flux.check([PROMPTS[0], long])
    with pytest.raises(ValueError, match=r"^prompt 1 has .* 1 more prompts are too long"):
        flux.check([long, PROMPTS[0], long])
    truncating = {"long_prompts": "truncate"}
    with caplog.at_level(logging.WARNING):
        load_backbone(config_of("flux", folders / "flux", **truncating), Dtypes()).check([long])
    assert "1 of 1 prompts are truncated to 40 tokens" in caplog.text

    for folder, options in (("sd3-no-t5", {}), ("sd3", {"t5": False})):
        config = config_of("sd3", folders / folder, max_prompt_tokens=256, **options)
        clip = load_backbone(config, Dtypes())
        clip.check(PROMPTS)
        with pytest.raises(ValueError, match=r"The maximum is 77 \(the limit of CLIP\).*use T5"):
            clip.check([long])
    load_backbone(config_of("sd3", folders / "sd3", max_prompt_tokens=256), Dtypes()).check([long])
    qwen = load_backbone(config_of("qwen_image", folders / "qwen_image"), Dtypes())
    qwen.check(["x" * 30])  # The system prompt of the template does not count.


def test_sd3_without_t5(folders):
    config = config_of("sd3", folders / "sd3", t5=False)
    without = load_backbone(config, Dtypes()).encode(PROMPTS)
    assert torch.equal(
        without["embeds"],
        load_backbone(config_of("sd3", folders / "sd3-no-t5"), Dtypes()).encode(PROMPTS)["embeds"],
    )
    both = load_backbone(config_of("sd3", folders / "sd3"), Dtypes()).encode(PROMPTS)
    assert not torch.equal(both["embeds"], without["embeds"])


@pytest.mark.parametrize("prompt", ["a red cat", "a green bird and " * 20, ""])
@torch.no_grad()
def test_sd3_with_128_tokens_of_t5(folders, prompt):
    """77 tokens of CLIP and 128 of T5, as `encode_prompt(max_sequence_length=128)` of the pipeline.

    The second prompt is too long for both.
    """
    config = config_of("sd3", folders / "sd3", max_prompt_tokens=128, long_prompts="truncate")
    backbone = load_backbone(config, Dtypes())
    backbone.check([prompt])
    encoded = backbone.encode([prompt])
    pipe = PIPELINES["sd3"].from_pretrained(folders / "sd3")
    embeds, unconditional, pooled, pooled_unconditional = pipe.encode_prompt(
        prompt=prompt, prompt_2=None, prompt_3=None, max_sequence_length=128
    )
    assert encoded["embeds"].shape == (1, 77 + 128, 32)
    assert torch.equal(encoded["embeds"], embeds)
    assert torch.equal(encoded["pooled"], pooled)
    free = backbone.encode([""])
    assert torch.equal(free["embeds"], unconditional)
    assert torch.equal(free["pooled"], pooled_unconditional)


def test_moving_a_backbone_moves_its_text_encoders(folders):
    backbone = load_backbone(config_of("flux", folders / "flux"), Dtypes())
    backbone.encode(PROMPTS[:1])
    backbone.to(torch.device("meta"))
    encoder = backbone._encoding_pipe.text_encoder
    assert {p.device.type for p in [*encoder.parameters(), *backbone.vae.parameters()]} == {"meta"}
