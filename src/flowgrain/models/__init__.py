"""Backbones: how a model turns prompts into conditioning, latents into velocities, and clean latents into images."""

from flowgrain.models.base import Backbone, Conditioning, Dtypes, GuidesItself, Source, load_backbone, take

__all__ = ["Backbone", "Conditioning", "Dtypes", "GuidesItself", "Source", "load_backbone", "take"]
