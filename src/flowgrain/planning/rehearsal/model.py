"""A backbone without weights, built from configuration files on the device of a rehearsal."""

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from flowgrain.models import BACKBONES, Backbone, Dtypes, ModelConfig
from flowgrain.models.loading import apply_options
from flowgrain.models.pipeline import PipelineBackbone
from flowgrain.models.published import part_config, required_config
from flowgrain.models.shapes import ShapesBackbone, WordTable
from flowgrain.settings import SettingsError

_Scheduler: Any = FlowMatchEulerDiscreteScheduler
_ENCODER_LIMIT = 77
"""Tokens that CLIP reads."""


def build_backbone(
    model: ModelConfig, dtypes: Dtypes, transformer: Mapping[str, Any], device: torch.device
) -> Backbone:
    """The backbone of `model` with fake weights.

    Args:
        model: settings of the model.
        dtypes: dtypes of its parts.
        transformer: configuration of the transformer, which may have fewer blocks.
        device: device of all parts.

    Raises:
        SettingsError: this backbone cannot be built without weights.
    """
    backbone_class: Any = BACKBONES.get(model.name)
    with torch.device(device):
        network = _diffusers_part(model, "transformer", transformer).to(dtypes.transformer)
        vae = _diffusers_part(model, "vae", required_config(model, "vae")).to(dtypes.vae)
        if backbone_class is ShapesBackbone:
            return ShapesBackbone(network, WordTable(), vae)
        if not issubclass(backbone_class, PipelineBackbone):
            raise SettingsError(
                f"model.name={model.name}: only backbones that are built on diffusers pipelines "
                "can be rehearsed. Measure one step on the target machine instead."
            )
        parts = {name: _encoder(model, name, dtypes.encoders) for name in backbone_class.encoders}
    scheduler = _Scheduler(**_scheduler_config(model))
    pipe = backbone_class.pipeline(
        scheduler=scheduler, transformer=network, vae=vae, **parts, **_extra(backbone_class)
    )
    return _assembled(backbone_class, model, dtypes, pipe, device)


def _scheduler_config(model: ModelConfig) -> dict[str, Any]:
    config = part_config(model, "scheduler", "scheduler_config.json") or {}
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _diffusers_part(model: ModelConfig, part: str, config: Mapping[str, Any]) -> Any:
    name = str(config.get("_class_name"))
    part_class: Any = getattr(diffusers, name, None)
    if part_class is None:
        raise SettingsError(
            f"model.path={model.path}: diffusers has no class {name}, which {part}/config.json "
            "names. Correct the file, or install another version of diffusers."
        )
    return part_class.from_config(dict(config))


def _encoder(model: ModelConfig, name: str, dtype: torch.dtype) -> Any:
    """A text encoder or a tokenizer. None if the pipeline has none."""
    if name.startswith("tokenizer"):
        return _Tokenizer(model, name)
    if name == "text_encoder_3" and not model.t5:
        return None
    config = required_config(model, name)
    encoder_class: Any = getattr(transformers, config["architectures"][0])
    loaded = encoder_class.config_class.from_dict(dict(config))
    encoder: nn.Module = encoder_class(loaded).to(dtype)
    return encoder.eval().requires_grad_(False)


def _extra(backbone_class: Any) -> dict[str, Any]:
    """Optional parts of the pipeline that no prompt needs."""
    optional = backbone_class.pipeline._optional_components
    names = ("image_encoder", "feature_extractor")
    return {name: None for name in names if name in optional}


class _Tokenizer:
    """Token numbers of the right shape. Which tokens they are has no effect on shapes."""

    def __init__(self, model: ModelConfig, name: str) -> None:
        self.model_max_length = _ENCODER_LIMIT
        self._long = not (name in ("tokenizer", "tokenizer_2") and model.name == "sd3")
        self._limit = model.max_prompt_tokens
        self.added_tokens_encoder: dict[str, int] = {}

    def __call__(self, text: Any, max_length: int | None = None, **_: Any) -> Any:
        count = 1 if isinstance(text, str) else len(text)
        length = max_length or (self._limit if self._long else _ENCODER_LIMIT)
        ids = torch.ones(count, length, dtype=torch.long)
        return transformers.BatchEncoding(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        )

    def tokenize(self, _: str) -> list[str]:
        """An empty list."""
        return []

    def batch_decode(self, *_: Any, **__: Any) -> list[str]:
        """No text."""
        return [""]

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        """No text."""
        return ""


def _assembled(
    backbone_class: Any, model: ModelConfig, dtypes: Dtypes, pipe: Any, device: torch.device
) -> Backbone:
    """The backbone around `pipe`, as `PipelineBackbone.__init__` makes it after loading."""
    backbone = backbone_class.__new__(backbone_class)
    backbone.config, backbone.dtypes, backbone.pipe = model, dtypes, pipe
    backbone.transformer = pipe.transformer
    backbone.vae = pipe.vae.requires_grad_(False).eval()
    apply_options(model, backbone.transformer, backbone.vae)
    backbone.weights, backbone.device = None, device
    backbone.init_encoding(None)
    backbone._encoding_pipe = pipe
    found: Backbone = backbone
    return found
