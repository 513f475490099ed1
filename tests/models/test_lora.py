"""Layers that take LoRA: their number on the published architectures, and export with diffusers."""

import pytest
import torch
import twins
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from flowgrain.config import load_config
from flowgrain.models import Dtypes, ModelConfig, load_backbone
from flowgrain.models.flux import FluxBackbone
from flowgrain.models.sd3 import SD3Backbone
from flowgrain.training.export import export_policy, load_export
from flowgrain.training.policy import Policy

FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]


def sd35_medium():
    """The architecture of stabilityai/stable-diffusion-3.5-medium."""
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def flux_dev():
    """The architecture of black-forest-labs/FLUX.1-dev."""
    return FluxTransformer2DModel(num_layers=19, num_single_layers=38, guidance_embeds=True)


def adapted(make, targets):
    """Names of the layers of an architecture that peft adapts."""
    with torch.device("meta"):
        model = inject_adapter_in_model(LoraConfig(r=1, target_modules=list(targets)), make())
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize(
    ("make", "targets", "count"),
    [
        # 24 blocks of 8 layers. The last block has no to_add_out.
        (sd35_medium, SD3Backbone.lora_targets, 24 * 8 - 1),
        (flux_dev, FluxBackbone.lora_targets, 19 * 8 + 38 * 3),
        (flux_dev, [*FluxBackbone.lora_targets, *FEED_FORWARD], 19 * (8 + 4) + 38 * 3),
    ],
)
def test_the_number_of_layers(make, targets, count):
    """191 on SD3.5-medium and 342 on FLUX.1-dev with feed-forward layers, as in Flow-GRPO."""
    names = adapted(make, targets)
    assert len(names) == count
    assert count in (191, 266, 342)
    assert not [name for name in names if "attn2" in name]


def test_the_second_attention_of_sd35_is_selected_by_name():
    """13 blocks have it. A name without "attn." also selects it."""
    assert len(adapted(sd35_medium, ["attn2.to_q"])) == 13
    bare = [name.removeprefix("attn.") for name in SD3Backbone.lora_targets]
    assert len(adapted(sd35_medium, bare)) == 191 + 13 * 4


def test_feed_forward_layers_are_exported(tmp_path):
    """The pipeline and the backbone that load the export predict the trained velocity."""
    twins.flux(tmp_path / "flux")
    model = ModelConfig(name="flux", path=str(tmp_path / "flux"), **twins.SIZE)
    backbone = load_backbone(model, Dtypes())
    settings = {"model.name": "flux", "model.path": model.path, "runtime.dtype": "float32"}
    settings |= {"lora.rank": 2, "lora.alpha": 3.0}
    settings |= {"lora.target_modules": [*FluxBackbone.lora_targets, *FEED_FORWARD]}
    config = load_config("flow_grpo", settings)
    policy = Policy.for_sampling(config, backbone, torch.device("cpu"), adapter=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    assert len(policy.parameters) == 2 * (8 + 4 + 3)  # A and B
    export_policy(policy, tmp_path / "export")

    x = torch.randn(2, *backbone.latent_shape, generator=generator)
    cond = {**backbone.encode(twins.PROMPTS[:2]), "guidance": torch.full((2,), 3.5)}

    def velocity(transformer):
        with torch.no_grad():
            return backbone.velocity(transformer, x, torch.tensor([0.9, 0.3]), cond)

    untrained = load_backbone(model, Dtypes())
    pipe = twins.PIPELINES["flux"].from_pretrained(model.path)
    trained = velocity(policy.model)
    assert (velocity(untrained.transformer) - trained).abs().max() > 1e-2
    pipe.load_lora_weights(str(tmp_path / "export" / "lora"))
    load_export(untrained, tmp_path / "export" / "lora", "lora")
    for loaded in (pipe.transformer, untrained.transformer):
        torch.testing.assert_close(velocity(loaded), trained, atol=1e-6, rtol=0)
