"""Backbones: encode prompts, predict velocities, decode latents into images."""

from flowgrain.models.base import (
    BACKBONES,
    Backbone,
    Conditioning,
    CustomGuidance,
    Dtypes,
    LoraFormat,
    ModelConfig,
    NoLora,
    check_backbone,
    load_backbone,
    register_backbone,
    take,
)

__all__ = [
    "BACKBONES",
    "Backbone",
    "Conditioning",
    "CustomGuidance",
    "Dtypes",
    "LoraFormat",
    "ModelConfig",
    "NoLora",
    "check_backbone",
    "load_backbone",
    "register_backbone",
    "take",
]
