"""Backbones: encode prompts, predict velocities, decode latents into images."""

from flowgrain.core.sde import Shift
from flowgrain.models.base import (
    BACKBONES,
    Backbone,
    Conditioning,
    CustomGuidance,
    Dtypes,
    EmptyBackbone,
    ImageEncoder,
    LoraFormat,
    ModelConfig,
    NoLora,
    register_backbone,
    take,
)
from flowgrain.models.contract import (
    check_backbone,
    check_results,
    check_training,
    load_backbone,
)

__all__ = [
    "BACKBONES",
    "Backbone",
    "Conditioning",
    "CustomGuidance",
    "Dtypes",
    "EmptyBackbone",
    "ImageEncoder",
    "LoraFormat",
    "ModelConfig",
    "NoLora",
    "Shift",
    "check_backbone",
    "check_results",
    "check_training",
    "load_backbone",
    "register_backbone",
    "take",
]
