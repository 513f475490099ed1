"""Checkpoints and configurations of open_clip as models of transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import AutoConfig, CLIPConfig, CLIPModel
from transformers.utils.hub import cached_file

from flowgrain.rewards.checkpoints import load_state, loading, read_checkpoint
from flowgrain.rewards.options import OptionError
from flowgrain.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Mode, Preprocess

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE_BLOCKS = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_PROJECTIONS = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an open_clip ViT, renamed for `transformers.CLIPModel`.

    Raises:
        ValueError: a key does not belong to an open_clip ViT.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        tower, _, rest = key.partition("transformer.resblocks.")
        if key in _OUTSIDE_BLOCKS:
            renamed[_OUTSIDE_BLOCKS[key]] = value
        elif key in _PROJECTIONS:
            renamed[_PROJECTIONS[key]] = value.T.contiguous()
        elif rest and tower in ("", "visual."):
            number, _, parameter = rest.partition(".")
            layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            renamed |= {f"{layer}.{name}": part for name, part in _block(parameter, value).items()}
        elif key != "attn_mask":
            raise ValueError(f"{key} is not a key of an open_clip ViT")
    return renamed


def _block(parameter: str, value: Tensor) -> dict[str, Tensor]:
    """A parameter of a transformer block with the names of transformers."""
    if parameter.startswith("attn.in_proj_"):
        kind = parameter.removeprefix("attn.in_proj_")
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"self_attn.{letter}_proj.{kind}": part for letter, part in parts}
    module, _, kind = parameter.rpartition(".")
    if module not in _BLOCK:
        raise ValueError(f"{parameter} is not a parameter of a block of an open_clip ViT")
    return {f"{_BLOCK[module]}.{kind}": value}


def open_clip_config(path: str) -> dict[str, Any] | None:
    """The content of open_clip_config.json in a directory or Hugging Face repository.

    None if there is no such file.

    Raises:
        OptionError: the file is not JSON.
    """
    file = _file(path, "open_clip_config.json")
    if file is None:
        return None
    with loading(path):
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _file(path: str, name: str) -> Path | None:
    """A file of a directory or Hugging Face repository, None if it does not exist."""
    with loading(path):
        file = cached_file(
            path,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return None if file is None else Path(file)


_RESIZE_MODES: dict[str, Mode] = {"shortest": "torchvision", "squash": "squash"}


def open_clip_preprocess(config: Mapping[str, Any], size: int) -> Preprocess:
    """The preprocessing that an open_clip_config.json describes.

    Args:
        config: content of the file. Missing entries have the defaults of open_clip.
        size: side of the model's input in pixels.

    Raises:
        ValueError: an entry has a value that is not supported.
    """
    defaults = {
        "mean": OPENAI_MEAN,
        "std": OPENAI_STD,
        "resize_mode": "shortest",
        "interpolation": "bicubic",
    }
    entries = defaults | config.get("preprocess_cfg", {})
    supported = {"resize_mode": [*_RESIZE_MODES], "interpolation": ["bilinear", "bicubic"]}
    for entry, values in supported.items():
        if entries[entry] not in values:
            raise ValueError(
                f"open_clip_config.json: {entry}={entries[entry]} is not supported. "
                f"Supported values: {', '.join(values)}"
            )
    return Preprocess(
        size,
        _RESIZE_MODES[entries["resize_mode"]],
        resample=entries["interpolation"],
        mean=tuple(entries["mean"]),
        std=tuple(entries["std"]),
    )


_VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


def clip_config(model: Mapping[str, Any]) -> CLIPConfig:
    """The configuration of transformers for the `model_cfg` of an open_clip_config.json.

    Raises:
        ValueError: an entry is missing, or it does not belong to a ViT of CLIP.
    """
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    unknown = sorted({*vision} - _VISION | {*text} - _TEXT)
    if unknown:
        raise ValueError(f"open_clip_config.json: {unknown[0]} is not supported")
    try:
        both = {"hidden_act": _activation(model), "projection_dim": model["embed_dim"]}
        return CLIPConfig(
            projection_dim=model["embed_dim"],
            vision_config={
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "num_attention_heads": vision["width"] // vision.get("head_width", 64),
                **_tower(vision),
                **both,
            },
            text_config={
                "vocab_size": text["vocab_size"],
                "max_position_embeddings": text["context_length"],
                "num_attention_heads": text["heads"],
                "eos_token_id": 2,  # transformers then pools at the largest token id, as open_clip
                **_tower(text),
                **both,
            },
        )
    except KeyError as error:
        raise ValueError(f"open_clip_config.json: {error.args[0]} is missing") from error


def _tower(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": config["width"],
        "intermediate_size": int(config["width"] * config.get("mlp_ratio", 4)),
        "num_hidden_layers": config["layers"],
    }


def _activation(model: Mapping[str, Any]) -> str:
    return "quick_gelu" if model.get("quick_gelu") else "gelu"


def _read_config(path: str) -> CLIPConfig | None:
    """The configuration of the CLIP model in `path`. None if it is another model.

    open_clip_config.json is used if there is no config.json. If both exist, the activation is that
    of open_clip_config.json, because the parameters come from open_clip.
    """
    described = open_clip_config(path)
    if described and _file(path, "config.json") is None:
        try:
            return clip_config(described.get("model_cfg", {}))
        except ValueError as error:
            raise OptionError(f"path={path}: {error}.") from error
    with loading(path):
        config = AutoConfig.from_pretrained(path)
    if not isinstance(config, CLIPConfig):
        return None
    if described:
        towers = cast("Any", config)  # for the type checker, they may be mappings
        activation = _activation(described.get("model_cfg", {}))
        towers.vision_config.hidden_act = towers.text_config.hidden_act = activation
    return config


def load_open_clip(path: str, checkpoint: str, allow_pickle: bool) -> CLIPModel:
    """A CLIP model with the parameters of a checkpoint.

    Args:
        path: directory or Hugging Face repository with the configuration of the CLIP model:
            config.json or open_clip_config.json.
        checkpoint: path of a file, or ORG/REPO/FILE on the Hugging Face Hub, with the names of
            open_clip or of transformers.
        allow_pickle: also read files other than .safetensors.

    Raises:
        OptionError: the configuration or the checkpoint cannot be read, or they do not match.
    """
    config = _read_config(path)
    if config is None:
        raise OptionError(f"path={path}: not a CLIP model. {checkpoint} needs a CLIP model.")
    state = read_checkpoint(checkpoint, allow_pickle)
    if any("resblocks" in key for key in state):
        try:
            state = from_open_clip(state)
        except ValueError as error:
            raise OptionError(f"checkpoint={checkpoint}: {error}.") from error
    model = CLIPModel(config)
    load_state(model, state, checkpoint, path)
    return model
