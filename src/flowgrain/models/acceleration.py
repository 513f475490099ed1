"""Approximate velocities for the tails of a rollout: cached features and quantized weights.

Approximate tails only affect rewards. Stochastic steps, and therefore log-probabilities, always use
the exact policy. Feature caches come from diffusers, quantization from torchao.
"""

import contextlib
import copy
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from flowgrain.settings import SettingsError

_LAYERS = r"(attn2?|attention|ff|ff_context|feed_forward|img_mlp|txt_mlp|proj_mlp|proj_out)"
"""Names of the attention and feed-forward layers of a block in the transformers of diffusers."""
_CACHED_LAYERS = rf"(.*blocks|layers)\.\d+\.{_LAYERS}"
"""Full names of the layers whose outputs TaylorSeer predicts."""
_FIRST_BLOCK_MODELS = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")
"""Transformers that the first-block cache of diffusers supports.

It subtracts the output of the first block from that of the last. In SD3, FLUX.2 and Z-Image these
outputs do not have the same form.
"""
_FLOAT8_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with float8 matrix products."""


def check_tails(
    *,
    tail_cache: str,
    tail_weights: str,
    model: nn.Module,
    device: torch.device,
    sharded: bool,
) -> None:
    """Check that the settings of approximate tails work with this model and device.

    Args:
        tail_cache: value of sampling.tail_cache, such as taylorseer:3.
        tail_weights: value of sampling.tail_weights, such as int8.
        model: transformer.
        device: device on which it samples.
        sharded: whether the weights that sample are sharded over several processes.

    Raises:
        SettingsError: a setting cannot be used.
    """
    cached, quantized = tail_cache != "none", tail_weights != "same"
    if sharded and (cached or quantized):
        setting = f"tail_cache={tail_cache}" if cached else f"tail_weights={tail_weights}"
        raise SettingsError(
            f"sampling.{setting}: needs unsharded weights in every process, but the weights "
            "are sharded. Set runtime.rollout_weights=replica, or remove this setting."
        )
    name = type(model).__name__.removeprefix("FSDP")
    if tail_cache.startswith("first_block") and name not in _FIRST_BLOCK_MODELS:
        raise SettingsError(
            f"sampling.tail_cache={tail_cache}: the first-block cache of diffusers does not "
            f"support {name}. Use taylorseer:3."
        )
    if tail_cache.startswith("taylorseer") and not _has_cached_layers(model):
        raise SettingsError(
            f"sampling.tail_cache={tail_cache}: {name} has no attention or feed-forward layers "
            "with the names that diffusers uses. Use none."
        )
    if not quantized:
        return
    if importlib.util.find_spec("torchao") is None:
        raise SettingsError(
            f"sampling.tail_weights={tail_weights}: torchao is not installed. "
            "Run pip install 'flowgrain[quantize]'."
        )
    if tail_weights == "float8" and not _supports_float8(device):
        raise SettingsError(
            "sampling.tail_weights=float8: needs a GPU of compute capability 8.9 or higher, "
            f"not {device}. Use int8."
        )


def _has_cached_layers(model: nn.Module) -> bool:
    return any(re.fullmatch(_CACHED_LAYERS, name) for name, _ in model.named_modules())


def _supports_float8(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= _FLOAT8_CAPABILITY


CacheStep = Callable[[bool], AbstractContextManager[None]]
"""Context of a model call. The argument says whether the call continues the previous call: the same
rows, one step later."""


@contextlib.contextmanager
def feature_cache(model: nn.Module, setting: str) -> Iterator[CacheStep]:
    """Cache features of `model` between calls, inside this context.

    Args:
        model: transformer of diffusers. Its hooks are removed at the end.
        setting: value of sampling.tail_cache.

    Yields:
        A function `step`. Call the model inside `with step(continues):`. With `continues=False` the
        cache is cleared first.

    Example:
        >>> with feature_cache(model, "taylorseer:3") as step:
        ...     for number, sigma in enumerate(sigmas):
        ...         with step(number > 0):
        ...             x = x + dt * model(x, sigma)
    """
    if setting == "none":
        yield _no_cache
        return
    from diffusers.hooks.hooks import HookRegistry
    from diffusers.models.cache_utils import CacheMixin

    # Called without an instance, because SD3's transformer does not inherit from CacheMixin.
    cache_context: Callable[..., AbstractContextManager[None]] = CacheMixin.cache_context

    registry = HookRegistry.check_if_exists_or_initialize(model)

    def step(continues: bool) -> AbstractContextManager[None]:
        if not continues:
            registry.reset_stateful_hooks(recurse=True)
        return cache_context(model, "tail")

    hooks = _add_hooks(model, setting)
    registry.invalidate_child_registries_cache()
    try:
        yield step
    finally:
        for hook in hooks:
            registry.remove_hook(hook, recurse=True)
        registry.invalidate_child_registries_cache()


def _no_cache(continues: bool) -> AbstractContextManager[None]:  # noqa: ARG001
    return contextlib.nullcontext()


def _add_hooks(model: nn.Module, setting: str) -> tuple[str, ...]:
    """Add the hooks of the cache `setting` to the layers of `model`. Returns the hooks' names."""
    from diffusers.hooks import first_block_cache, taylorseer_cache

    kind, _, number = setting.partition(":")
    if kind == "first_block":
        threshold = first_block_cache.FirstBlockCacheConfig(threshold=float(number))
        first_block_cache.apply_first_block_cache(model, threshold)
        return first_block_cache._FBC_LEADER_BLOCK_HOOK, first_block_cache._FBC_BLOCK_HOOK
    # Single blocks of FLUX.1: the output layer is predicted, so the layers before it are skipped.
    skipped = [
        rf"{re.escape(name)}\.(attn|proj_mlp)"
        for name, block in model.named_modules()
        if "proj_out" in dict(block.named_children())
    ]
    config = taylorseer_cache.TaylorSeerCacheConfig(
        cache_interval=int(number),
        disable_cache_before_step=2,  # Linear extrapolation needs two exact steps.
        max_order=1,
        taylor_factors_dtype=next(model.parameters()).dtype,
        cache_identifiers=[_CACHED_LAYERS],
        skip_predict_identifiers=skipped,
    )
    taylorseer_cache.apply_taylorseer_cache(model, config)
    return (taylorseer_cache._TAYLORSEER_CACHE_HOOK,)


@cache
def int8_saturates() -> bool:
    """Return whether int8 matrix products saturate on this CPU.

    Kernels without VNNI add pairs of products in 16 bits, which overflow for values near 127. This
    is measured instead of read from the CPU flags, because environment variables can restrict the
    kernels. Values in -64..63 are exact on all CPUs.
    """
    a = torch.full((8, 64), 127, dtype=torch.int8)
    b = torch.full((64, 8), 127, dtype=torch.int8)
    return not torch.equal(torch._int_mm(a, b), a.int() @ b.int())


class QuantizedCopy:
    """A copy of a transformer with quantized attention and feed-forward layers.

    Weights and activations of these layers are quantized. LoRA layers keep their dtype.

    Attributes:
        model: the copy.
        layers: names of the quantized layers.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], kind: str, dtype: torch.dtype
    ) -> None:
        """Copy `model` on its device. The copy is quantized by `to`.

        Args:
            model: transformer.
            blocks: names of its repeated blocks.
            kind: "int8" or "float8".
            dtype: dtype of the layers that are not quantized.

        Raises:
            SettingsError: the blocks contain no layers to quantize.
        """
        self.kind, self.dtype = kind, dtype
        self.layers = {
            f"{block}.{name}"
            for block in blocks
            for name, module in model.get_submodule(block).named_modules()
            if isinstance(module, nn.Linear) and _is_quantizable(name)
        }
        if not self.layers:
            raise SettingsError(
                f"sampling.tail_weights={kind}: the blocks of {type(model).__name__} have no "
                "attention or feed-forward layers with the names that diffusers uses. Use same."
            )
        self.model = copy.deepcopy(model).requires_grad_(False).to(dtype)

    def to(self, device: torch.device) -> Self:
        """Move the copy to `device` and quantize it, one layer at a time."""
        self._quantize(self.model, lambda _, name: name in self.layers, device)
        return self

    @property
    def size(self) -> int:
        """Size of the copy in bytes, without the scales of quantized weights."""
        quantized = {f"{name}.weight" for name in self.layers}
        return sum(
            p.numel() * (1 if name in quantized else p.element_size())
            for name, p in self.model.named_parameters()
        )

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Replace the named parameters by new values. The values are unsharded tensors."""
        for name, value in parameters.items():
            layer_name, _, leaf = name.rpartition(".")
            if layer_name in self.layers and leaf == "weight":
                layer = self.model.get_submodule(layer_name)
                weight = value.detach().to(self.dtype, copy=True)
                layer.weight = nn.Parameter(weight, requires_grad=False)
                self._quantize(layer, lambda *_: True, value.device)
            else:
                self.model.get_parameter(name).copy_(value.detach())

    def _quantize(
        self, module: nn.Module, selected: Callable[[nn.Module, str], bool], device: torch.device
    ) -> None:
        """Quantize the selected linear layers of `module` in place, and move it to `device`."""
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )

        config: Any = Float8DynamicActivationFloat8WeightConfig()
        if self.kind == "int8":
            reduce_range = device.type == "cpu" and int8_saturates()
            config = Int8DynamicActivationInt8WeightConfig(reduce_range=reduce_range)
        quantize_(module, config, filter_fn=selected, device=device)


def _is_quantizable(name: str) -> bool:
    """Whether a linear layer of a block is an attention or feed-forward layer, and not a LoRA."""
    return bool(re.match(rf"{_LAYERS}(\.|$)", name)) and not re.search(r"\blora_", name)
