"""Sizes of models from configuration files, compared with counts by hand and loaded models."""

import pytest
import twins
from toy import Toy

from flowgrain import SettingsError
from flowgrain.config import load_config
from flowgrain.models import Dtypes, ModelConfig, load_backbone
from flowgrain.training.sizes import (
    embeds_guidance,
    forward_flops,
    model_size,
    size_of_loaded,
)

FLUX = ModelConfig(
    name="flux",
    path="black-forest-labs/FLUX.1-dev",
    height=720,
    width=720,
    max_prompt_tokens=512,
)


@pytest.mark.slow
def test_published_flux():
    """12 d^2 weights per stream and block, two FLOPs per weight and token, and attention."""
    width, image, words = 3072, 45 * 45, 512
    double, single = 19 * 12 * width**2, 38 * 12 * width**2
    linear = 2 * (double * (image + words) + single * (image + words))
    by_hand = linear + 4 * 57 * width * (image + words) ** 2
    assert forward_flops(FLUX) == pytest.approx(by_hand, rel=0.02)
    size = model_size(FLUX)
    assert size.transformer == 11_901_408_320
    assert 32 * size.adapter == 52_297_728  # peft's number at rank 32
    targets = load_config("flux/flow_grpo").lora.target_modules
    assert 64 * model_size(FLUX, targets).adapter == 179_306_496  # peft's number at rank 64
    assert size.vae == 83_819_683
    assert size.latent == image * 64
    assert 0.6 < size.quantizable / size.transformer < 0.9
    assert embeds_guidance(FLUX)


def test_published_sd3():
    config = load_config("flow_grpo", {"model.name": "sd3"}).model
    size = model_size(config)
    assert 2.2e9 < size.transformer < 2.6e9
    assert size.latent == 16 * 64 * 64
    assert not embeds_guidance(config)
    assert 32 * size.adapter == 18_776_064  # peft's number at rank 32
    # The pipeline appends zeros in place of the embeddings of T5.
    without_t5 = config.model_copy(update={"t5": False})
    assert forward_flops(without_t5) == forward_flops(config)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sd3", lambda folder: twins.sd3(folder, with_t5=False)),
        ("flux", twins.flux),
        ("flux2", twins.flux2),
        ("qwen_image", twins.qwen_image),
        ("zimage", twins.zimage),
    ],
)
def test_configuration_files_agree_with_the_loaded_model(name, make, tmp_path):
    make(tmp_path)
    config = ModelConfig(name=name, path=str(tmp_path), height=16, width=16)
    backbone = load_backbone(config, Dtypes())
    expected = size_of_loaded(backbone)
    assert model_size(config) == expected
    assert expected.transformer == sum(p.numel() for p in backbone.transformer.parameters())


def test_the_bundled_model():
    config = ModelConfig()
    assert model_size(config) == size_of_loaded(load_backbone(config, Dtypes()))


def test_a_backbone_without_configuration_files():
    size = size_of_loaded(Toy())
    assert (size.transformer, size.adapter, size.vae, size.latent) == (8 * 16 + 16 * 6, 0, 0, 6)


def test_unknown_models(tmp_path):
    assert model_size(FLUX.model_copy(update={"path": "somebody/else"})) is None
    assert model_size(FLUX.model_copy(update={"path": str(tmp_path)})) is None
    with pytest.raises(SettingsError, match=r"model\.path=somebody/else: the FLOPs"):
        forward_flops(FLUX.model_copy(update={"path": "somebody/else"}))
    with pytest.raises(SettingsError, match="Use flux or sd3"):
        forward_flops(ModelConfig())


def test_flops_of_a_local_directory(tmp_path):
    twins.flux(tmp_path)
    small = ModelConfig(name="flux", path=str(tmp_path), height=16, width=16, max_prompt_tokens=16)
    large = small.model_copy(update={"height": 32, "width": 32})
    assert 0 < forward_flops(small) < forward_flops(large)
