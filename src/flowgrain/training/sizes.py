"""Parameters and FLOPs of a model, computed from its configuration files without its weights."""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowgrain.config.schema import Config
from flowgrain.models import BACKBONES, Backbone, ModelConfig
from flowgrain.models.acceleration import QuantizedCopy
from flowgrain.models.pipeline import JOINT_ATTENTION
from flowgrain.models.published import PUBLISHED, part_config
from flowgrain.models.quiet import quiet_libraries
from flowgrain.models.shapes import ShapesBackbone
from flowgrain.settings import SettingsError
from flowgrain.training.copies import names_of_blocks

_CLIP_TOKENS = 77
"""Tokens of CLIP, which come before the tokens of T5 in SD3."""


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters of a backbone.

    Attributes:
        transformer: parameters of the transformer, without adapters.
        adapter: parameters of a LoRA of rank 1.
        quantizable: parameters of the layers that sampling.tail_weights quantizes.
        vae: parameters of the VAE.
        latent: numbers in the latent of one image.
    """

    transformer: int
    adapter: int
    quantizable: int
    vae: int
    latent: int


def size_of_loaded(backbone: Backbone, lora_targets: Sequence[str] | None = None) -> ModelSize:
    """The size of a backbone that is loaded, before an adapter is added.

    Args:
        backbone: the backbone.
        lora_targets: layers that take LoRA. Default: those of the backbone.
    """
    block_names = names_of_blocks(backbone.transformer, backbone.blocks)
    latent = math.prod(backbone.latent_shape)
    targets = lora_targets or backbone.lora_targets
    return _count(backbone.transformer, block_names, targets, backbone.vae, latent)


@lru_cache(maxsize=4)
def model_size(model: ModelConfig, lora_targets: tuple[str, ...] | None = None) -> ModelSize | None:
    """The size of the model that `model` names, without loading it.

    The configuration files are read if `model.path` is a local directory. The configurations of
    FLUX.1-dev and SD3.5-medium on the Hub are built in.

    Args:
        model: settings of the model.
        lora_targets: layers that take LoRA. Default: those of the backbone.

    Returns:
        The size, or None if no configuration of the model is known.
    """
    parts = _meta_parts(model)
    if parts is None:
        return None
    transformer, vae = parts
    names = [
        f"{name}.{index}"
        for name, child in transformer.named_children()
        if isinstance(child, nn.ModuleList)
        for index in range(len(child))
    ]
    targets = lora_targets or _lora_targets(model.name)
    return _count(transformer, names, targets, vae, _latent_size(model, vae))


def size_before_loading(config: Config) -> ModelSize | None:
    """The size of the model of `config`, or None if its configuration files cannot be used.

    `load_model` then reports what is wrong with them.
    """
    quiet_libraries()
    try:
        return model_size(config.model, config.lora.target_modules)
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        return None


@lru_cache(maxsize=4)
def forward_flops(model: ModelConfig) -> float:
    """FLOPs of one row through the transformer, at the image size and prompt length of `model`.

    Raises:
        SettingsError: the inputs or the configuration of this model are not known.
    """
    parts = _meta_parts(model)
    if model.name not in _INPUTS or parts is None:
        raise SettingsError(
            f"model.name={model.name}, model.path={model.path}: the FLOPs of this model are not "
            f"known. Use flux or sd3 with a local directory, {' or '.join(PUBLISHED)}."
        )
    transformer, vae = parts
    with torch.device("meta"):
        inputs = _INPUTS[model.name](model, transformer.config, _vae_scale(vae))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(**inputs)
    return float(counter.get_total_flops())


def meta_vae(model: ModelConfig) -> tuple[Any, tuple[int, ...]] | None:
    """The VAE of `model` on the meta device, and the shape of one latent as its input.

    None without configurations.
    """
    parts = _meta_parts(model)
    if parts is None:
        return None
    vae, scale = parts[1], _vae_scale(parts[1])
    if model.name == "shapes":
        return vae, (1, *ShapesBackbone.latent_shape)
    height, width = model.height // scale, model.width // scale
    if "z_dim" in vae.config:  # Qwen-Image: one frame
        return vae, (1, vae.config["z_dim"], 1, height, width)
    return vae, (1, vae.config["latent_channels"], height, width)


def embeds_guidance(model: ModelConfig) -> bool:
    """Whether guidance is an input of the transformer (FLUX.1-dev) and costs no second row."""
    parts = _meta_parts(model)
    return parts is not None and bool(parts[0].config.get("guidance_embeds", False))


def _count(
    transformer: nn.Module,
    block_names: Sequence[str],
    lora_targets: Sequence[str],
    vae: nn.Module | None,
    latent: int,
) -> ModelSize:
    adapted = [
        module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and any(name == target or name.endswith(f".{target}") for target in lora_targets)
    ]
    return ModelSize(
        transformer=sum(p.numel() for p in transformer.parameters()),
        adapter=sum(module.in_features + module.out_features for module in adapted),
        quantizable=_quantizable(transformer, block_names),
        vae=0 if vae is None else sum(p.numel() for p in vae.parameters()),
        latent=latent,
    )


def _quantizable(transformer: nn.Module, block_names: Sequence[str]) -> int:
    """Parameters of the layers that a `QuantizedCopy` quantizes. 0 if it supports none of them."""
    try:
        copied = QuantizedCopy(_on_meta(transformer), block_names, "int8", torch.float32)
    except SettingsError:
        return 0
    weights = (copied.model.get_parameter(f"{name}.weight") for name in copied.layers)
    return sum(weight.numel() for weight in weights)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy of `module` on the meta device, which takes no memory."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(module, memo)


@lru_cache(maxsize=4)
def _meta_parts(model: ModelConfig) -> tuple[Any, Any] | None:
    """The transformer and the VAE of `model` on the meta device. None without configurations."""
    configs = [part_config(model, part) for part in ("transformer", "vae")]
    transformer, vae = (None if config is None else _build(config) for config in configs)
    return None if transformer is None or vae is None else (transformer, vae)


def _build(config: Mapping[str, Any]) -> Any:
    """A part of a pipeline on the meta device. None if diffusers has no such class."""
    part_class: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if part_class is None or not issubclass(part_class, nn.Module):
        return None
    with torch.device("meta"):
        return part_class.from_config(dict(config))


def _lora_targets(name: str) -> Sequence[str]:
    """Names of the layers of backbone `name` that take LoRA."""
    targets = vars(BACKBONES.get(name)).get("lora_targets")
    if isinstance(targets, list):
        return targets
    # FLUX.2 lists its layers one by one, when it is loaded.
    return [*JOINT_ATTENTION, "to_qkv_mlp_proj", "attn.to_out"]


def _vae_scale(vae: Any) -> int:
    """Pixels per side of a latent."""
    config = vae.config
    if "block_out_channels" in config:
        return 1 << (len(config["block_out_channels"]) - 1)
    return 1 << len(config["temperal_downsample"])  # Qwen-Image


def _latent_size(model: ModelConfig, vae: Any) -> int:
    """Numbers in the latent of one image."""
    if model.name == "shapes":
        return math.prod(ShapesBackbone.latent_shape)
    channels = (
        vae.config["latent_channels"] if "latent_channels" in vae.config else vae.config["z_dim"]
    )
    scale = _vae_scale(vae)
    return int(channels) * (model.height // scale) * (model.width // scale)


def _flux_inputs(model: ModelConfig, config: Mapping[str, Any], scale: int) -> dict[str, Tensor]:
    """Inputs of one row of FLUX.1. 2 x 2 latents are one token."""
    tokens = (model.height // (2 * scale)) * (model.width // (2 * scale))
    text_tokens = model.max_prompt_tokens
    inputs = {
        "hidden_states": torch.empty(1, tokens, config["in_channels"]),
        "encoder_hidden_states": torch.empty(1, text_tokens, config["joint_attention_dim"]),
        "pooled_projections": torch.empty(1, config["pooled_projection_dim"]),
        "timestep": torch.empty(1),
        "img_ids": torch.empty(tokens, 3),
        "txt_ids": torch.empty(text_tokens, 3),
    }
    return {**inputs, "guidance": torch.empty(1)} if config["guidance_embeds"] else inputs


def _sd3_inputs(model: ModelConfig, config: Mapping[str, Any], scale: int) -> dict[str, Tensor]:
    """Inputs of one row of SD3 and SD3.5. The tokens of CLIP come before the tokens of T5."""
    # Without T5, the pipeline appends zeros in place of its embeddings.
    text_tokens = _CLIP_TOKENS + model.max_prompt_tokens
    height, width = model.height // scale, model.width // scale
    return {
        "hidden_states": torch.empty(1, config["in_channels"], height, width),
        "encoder_hidden_states": torch.empty(1, text_tokens, config["joint_attention_dim"]),
        "pooled_projections": torch.empty(1, config["pooled_projection_dim"]),
        "timestep": torch.empty(1),
    }


_INPUTS: Mapping[str, Callable[[ModelConfig, Mapping[str, Any], int], dict[str, Tensor]]] = {
    "flux": _flux_inputs,
    "sd3": _sd3_inputs,
}
"""Inputs of one row through the transformer, by backbone."""
