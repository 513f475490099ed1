"""Configurations of the parts of a model: from its files, or of published models by Hub name.

No file of the Hub is needed.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flowgrain.models.base import ModelConfig
from flowgrain.models.shapes import WEIGHTS
from flowgrain.settings import SettingsError, one_line

_VAE_16 = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_G = {
    "architectures": ["CLIPTextModelWithProjection"],
    "model_type": "clip_text_model",
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}

PUBLISHED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "black-forest-labs/FLUX.1-dev": {
        "transformer": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        "vae": _VAE_16,
        "scheduler": {"shift": 3.0, "use_dynamic_shifting": True},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _T5_XXL,
    },
    "stabilityai/stable-diffusion-3.5-medium": {
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        "vae": _VAE_16,
        "scheduler": {"shift": 3.0},
        "text_encoder": {**_CLIP_L, "architectures": ["CLIPTextModelWithProjection"]},
        "text_encoder_2": _CLIP_G,
        "text_encoder_3": _T5_XXL,
    },
}
"""Configurations by part. Values that are not given are the defaults of the part's class."""


def part_config(
    model: ModelConfig, part: str, name: str = "config.json"
) -> Mapping[str, Any] | None:
    """The configuration of a part of the pipeline: its file, or the published configuration.

    Args:
        model: settings of the model.
        part: name of the part, such as "transformer".
        name: name of the file.

    Returns:
        None if there is neither.
    """
    folder = WEIGHTS if model.name == "shapes" and not model.path else Path(model.path or "")
    file = folder / part / name
    if folder.name and file.is_file():
        return _read(file, file.stat().st_mtime_ns)
    return PUBLISHED.get(model.path or "", {}).get(part)


def required_config(model: ModelConfig, part: str) -> Mapping[str, Any]:
    """The configuration of a part: its config.json, or the published configuration.

    Raises:
        SettingsError: there is none.
    """
    config = part_config(model, part)
    if config is not None:
        return config
    setting, folder = f"model.path={model.path}", Path(model.path or "")
    if model.path and folder.is_dir():
        missing = folder / part / "config.json"
        raise SettingsError(
            f"{setting}: {missing} is missing. Give the directory of a diffusers pipeline."
        )
    known = " or ".join(PUBLISHED)
    raise SettingsError(
        f"{setting}: the configuration of {part} is not known, and there is no such directory. "
        f"Give a local directory of a diffusers pipeline, {known}."
    )


@lru_cache(maxsize=64)
def _read(file: Path, _changed: int) -> Mapping[str, Any]:
    """The configuration in `file`.

    Raises:
        SettingsError: the file is damaged.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file, one_line(error)) from error
    if not isinstance(config, dict):
        raise _damaged(file, "it is not an object")
    return config


def _damaged(file: Path, why: str) -> SettingsError:
    folder = file.parent.parent
    return SettingsError(f"model.path={folder}: {file} is damaged ({why}). Download it again.")
