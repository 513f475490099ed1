"""The contract of a backbone, checked when it is loaded or given from Python."""

from collections.abc import Callable
from typing import Any

from torch import nn

from flowgrain.models.base import BACKBONES, Backbone, Dtypes, ModelConfig
from flowgrain.settings import SettingsError, did_you_mean


def load_backbone(model: ModelConfig, dtypes: Dtypes) -> Backbone:
    """Return the backbone `model.name` with its weights, checked by `check_backbone`.

    Raises:
        SettingsError: the backbone does not exist, or a setting cannot be used.
        ValueError: the backbone lacks a member of the protocol, or the class method `load`.
    """
    if model.name not in BACKBONES:
        hint = did_you_mean(model.name, BACKBONES)
        raise SettingsError(f"model.name={model.name}: there is no such backbone. {hint}")
    loader = BACKBONES.get(model.name)
    if not _has_methods(loader, "load"):
        raise ValueError(
            f"backbone {model.name}: {loader!r} has no class method load(model, dtypes)."
        )
    return check_backbone(loader.load(model, dtypes))


def check_backbone(backbone: Any) -> Backbone:
    """Return `backbone`, if it has all members of the `Backbone` protocol with the right types.

    Raises:
        ValueError: a member is missing or has another type. The message names it.
    """
    for name, expected, valid in _MEMBERS:
        try:
            value = getattr(backbone, name)
        except AttributeError as error:
            raise ValueError(
                _contract(backbone, name, f"is missing ({error})", expected)
            ) from error
        if not valid(value):
            raise ValueError(_contract(backbone, name, f"is {value!r:.80}", expected))
    inside = {id(module) for module in backbone.transformer.modules()}
    if not all(id(block) in inside for block in backbone.blocks):
        raise ValueError(
            _contract(
                backbone, "blocks", "contains other modules", "a list of parts of transformer"
            )
        )
    checked: Backbone = backbone
    return checked


def _contract(backbone: Any, name: str, problem: str, expected: str) -> str:
    return (
        f"backbone {type(backbone).__name__}: member {name!r} {problem}. "
        f"Define it as {expected}. See flowgrain.models.Backbone."
    )


def _has_methods(value: Any, *names: str) -> bool:
    return all(callable(getattr(value, name, None)) for name in names)


def _is_transformer(value: Any) -> bool:
    return isinstance(value, nn.Module) and _has_methods(value, "save_pretrained")


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(size, int) for size in value)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


_MEMBERS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("transformer", "a torch.nn.Module with a method save_pretrained", _is_transformer),
    ("vae", "a torch.nn.Module or None", lambda v: v is None or isinstance(v, nn.Module)),
    ("latent_shape", "a tuple of integers", _is_shape),
    ("lora_targets", "a list of strings", lambda v: _is_list(v, str)),
    (
        "lora_format",
        "a LoRA loader mixin of diffusers, or NoLora",
        lambda v: _has_methods(v, "save_lora_weights", "lora_state_dict"),
    ),
    ("blocks", "a list of torch.nn.Module", lambda v: _is_list(v, nn.Module)),
    ("embedded_guidance", "a bool", lambda v: isinstance(v, bool)),
    *(
        (name, "a method", callable)
        for name in (
            "load_lora",
            "natural_shift",
            "to",
            "check",
            "bundled_prompts",
            "encode",
            "velocity",
            "decode",
        )
    ),
)
"""Name, required type in words, and test of every member of `Backbone`."""
