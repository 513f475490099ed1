"""The contract of a backbone, checked when it is loaded or given from Python."""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowgrain.models.base import BACKBONES, Backbone, Conditioning, Dtypes, ModelConfig
from flowgrain.settings import SettingsError, did_you_mean, one_line


def load_backbone(model: ModelConfig, dtypes: Dtypes, *, empty: bool = False) -> Backbone:
    """Return the backbone `model.name`, checked by `check_backbone`.

    Args:
        model: settings of the model.
        dtypes: dtypes of its parts.
        empty: leave the transformer without weights, if the backbone is an `EmptyBackbone`.

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
    if empty and _loads_empty(loader):
        return check_backbone(loader.load_empty(model, dtypes))  # type: ignore[attr-defined]
    return check_backbone(loader.load(model, dtypes))


def _loads_empty(loader: Any) -> bool:
    """Whether `loader.load_empty` replaces `loader.load`. A subclass may override only `load`."""
    for base in getattr(loader, "__mro__", ()):
        if "load" in vars(base) or "load_empty" in vars(base):
            return "load_empty" in vars(base)
    return False


def check_backbone(backbone: Any) -> Backbone:
    """Return `backbone`, if it has all members of the `Backbone` protocol with the right types.

    `check_training` and `check_results` check what depends on the settings and on the device.

    Raises:
        ValueError: a member is missing, raises an error or has another type. The message names it.
    """
    for name, expected, valid in _MEMBERS:
        try:
            value = getattr(backbone, name)
        except AttributeError as error:
            own = error.obj is backbone and error.name == name
            problem = "is missing" if own else f"is missing ({error})"
            raise ValueError(_contract(backbone, name, problem, expected)) from error
        except (Exception, SystemExit) as error:  # a property of another package
            raise ValueError(_contract(backbone, name, _raises(error), expected)) from error
        if not valid(value):
            raise ValueError(_contract(backbone, name, f"is {_shown(value)}", expected))
    inside = {id(module) for module in backbone.transformer.modules()}
    if not all(id(block) in inside for block in backbone.blocks):
        raise ValueError(
            _contract(
                backbone, "blocks", "contains other modules", "a list of parts of transformer"
            )
        )
    _result(backbone, "natural_shift", "a Shift of positive numbers", _is_shift, 10)
    _result(backbone, "bundled_prompts", "a list of strings", lambda v: _is_list(v, str), "train")
    checked: Backbone = backbone
    return checked


def check_training(backbone: Backbone, *, lora: bool, sharded: bool) -> None:
    """Check the methods of the transformer that training and export need.

    Args:
        backbone: the backbone.
        lora: whether a LoRA is trained. If not, all parameters are.
        sharded: whether there are several ranks.

    Raises:
        ValueError: the transformer lacks a method. The message names it.
    """
    if lora and not backbone.lora_targets:
        return  # `add_adapter` of the policy says that the backbone does not support LoRA
    needed = ["save_pretrained"]
    if lora:
        needed = ["add_adapter", "disable_adapters", "enable_adapters"]
    elif sharded:
        needed = ["to_json_string"]
    missing = [name for name in needed if not _has_methods(backbone.transformer, name)]
    if missing:
        use = "lora.rank" if lora else "the export"
        expected = f"a torch.nn.Module with a method {missing[0]}, which {use} needs"
        hint = " Derive it from diffusers.ModelMixin" + (" and PeftAdapterMixin" if lora else "")
        problem = f"has no method {missing[0]}"
        raise ValueError(_contract(backbone, "transformer", problem, f"{expected}.{hint}"))


@torch.no_grad()
def check_results(
    backbone: Backbone,
    device: torch.device,
    velocity: Callable[[Tensor, Tensor, Conditioning], Tensor],
) -> None:
    """Check the types and shapes of what `encode`, `velocity` and `decode` return.

    Backbones of this package are not checked, because the call costs a forward pass.

    Args:
        backbone: the backbone, on `device`.
        device: compute device.
        velocity: velocity of latents [B, *L] at noise levels [B] with a conditioning.

    Raises:
        ValueError: a method raises an error or returns something else. The message names it.
    """
    if type(backbone).__module__.startswith("flowgrain."):
        return
    what = "a mapping of names to tensors with one row per prompt"
    cond = _result(backbone, "encode", what, lambda v: _is_conditioning(v, 2), ["", ""])
    shape = (2, *backbone.latent_shape)
    x, sigma = torch.zeros(shape, device=device), torch.full((2,), 0.5, device=device)
    moved = {name: value.to(device) for name, value in cond.items()}
    what = f"a tensor in the shape of the latents, here {list(shape)}"
    _valid(backbone, "velocity", what, _has_shape(shape), lambda: velocity(x, sigma, moved))
    what = "float32 images [B, 3, H, W]"
    _result(backbone, "decode", what, _are_images, x[:1])


def _result(
    backbone: Any, name: str, expected: str, valid: Callable[[Any], bool], *arguments: Any
) -> Any:
    """What the method `name` returns, checked by `valid`."""
    return _valid(backbone, name, expected, valid, lambda: getattr(backbone, name)(*arguments))


def _valid(
    backbone: Any,
    name: str,
    expected: str,
    valid: Callable[[Any], bool],
    call: Callable[[], Any],
) -> Any:
    expected = f"a method that returns {expected}"
    try:
        value = call()
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:  # code of another package
        raise ValueError(_contract(backbone, name, _raises(error), expected)) from error
    if not valid(value):
        raise ValueError(_contract(backbone, name, f"returns {_shown(value)}", expected))
    return value


def _raises(error: BaseException) -> str:
    return f"raises {type(error).__name__}: {one_line(error, 200)}"


def _shown(value: Any) -> str:
    """A value in a few words: the dtype and the shape of tensors."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_shown(entry)}" for key, entry in value.items()) + "}"
    return one_line(repr(value), 80)


def _contract(backbone: Any, name: str, problem: str, expected: str) -> str:
    module = sys.modules.get(type(backbone).__module__)
    file = getattr(module, "__file__", None)
    place = f" ({file})" if file and not type(backbone).__module__.startswith("flowgrain.") else ""
    return (
        f"backbone {type(backbone).__name__}{place}: member {name!r} {problem}. "
        f"Define it as {expected}. See flowgrain.models.Backbone."
    )


def _has_methods(value: Any, *names: str) -> bool:
    return all(callable(getattr(value, name, None)) for name in names)


def _is_transformer(value: Any) -> bool:
    return isinstance(value, nn.Module) and _has_methods(value, "save_pretrained")


def _is_shape(value: Any) -> bool:
    """Whether it is a tuple of positive integers. torch.Size is one."""
    sizes = isinstance(value, tuple) and all(type(size) is int and size > 0 for size in value)
    return sizes and len(value) > 0


def _is_shift(value: Any) -> bool:
    if not isinstance(value, tuple) or not 1 <= len(value) <= 3 or value[0] is None:
        return False
    given = [number for number in value if number is not None]
    numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in given)
    return numbers and all(math.isfinite(n) and n >= 0 for n in given) and value[0] > 0


def _is_conditioning(value: Any, rows: int) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(v, Tensor) and v.ndim and len(v) == rows for v in value.values())
    )


def _has_shape(shape: tuple[int, ...]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Tensor) and tuple(value.shape) == shape and value.is_floating_point()
    )


def _are_images(value: Any) -> bool:
    is_image = isinstance(value, Tensor) and value.ndim == 4 and tuple(value.shape[:2]) == (1, 3)
    return is_image and value.dtype == torch.float32 and value.numel() > 0


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


_MEMBERS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("transformer", "a torch.nn.Module with a method save_pretrained", _is_transformer),
    ("vae", "a torch.nn.Module or None", lambda v: v is None or isinstance(v, nn.Module)),
    ("latent_shape", "a tuple of positive integers", _is_shape),
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
