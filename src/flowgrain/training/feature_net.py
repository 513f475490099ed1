"""The network whose features the monitors compare."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowgrain.config.watch import WatchConfig
from flowgrain.models import Backbone
from flowgrain.monitors.features import FeatureNet, Features
from flowgrain.rewards.options import OptionError
from flowgrain.settings import SettingsError

_TOGETHER = 32
"""Images in one call of a CLIP model."""


@dataclass(frozen=True)
class NamedNet:
    """A feature network and its name, which identifies its weights. "" and None: no network."""

    name: str
    net: FeatureNet | None


_NONE = NamedNet("", None)


def load_net(watch: WatchConfig, backbone: Backbone, device: torch.device) -> NamedNet:
    """The network that `watch` names. Nothing is downloaded unless watch.clip is set.

    Raises:
        SettingsError: the model in watch.clip cannot be loaded.
    """
    if watch.action == "off" or watch.features == "none":
        return _NONE
    if watch.clip is not None:
        return NamedNet(watch.clip, _clip(watch.clip, device))
    from flowgrain.models.shapes import ShapesBackbone  # needs diffusers
    from flowgrain.shapes.features import features

    # A backbone from Python may be another model, whatever model.name is.
    if watch.features == "shapes" or isinstance(backbone, ShapesBackbone):
        return NamedNet("shapes", lambda images: features(images).astype(np.float32))
    return _NONE


def _clip(path: str, device: torch.device) -> FeatureNet:
    from flowgrain.rewards.clip import ClipReward  # needs transformers

    try:
        model = ClipReward(path, str(device))
    except OptionError as error:
        raise SettingsError(f"watch.clip={path}: {str(error).partition(': ')[2]}") from error

    @torch.no_grad()
    def embed(images: Tensor) -> Features:
        parts = [model.image_embeds(part).cpu() for part in torch.split(images, _TOGETHER)]
        values: Features = torch.cat(parts).float().numpy()
        return values

    return embed
