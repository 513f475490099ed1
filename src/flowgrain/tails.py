"""Cheaper velocities for the tails of a rollout: features kept from step to step (diffusers), and quantised weights (torchao).

Only rewards feel them. What a stochastic step is drawn from, and so every log-probability, stays the policy's own.
"""

import contextlib
import copy
import importlib.util
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from flowgrain.parallel import whole
from flowgrain.settings import Settings, SettingsError

_CACHED = (r"(.*blocks|layers)\.\d+\.(attn2?|attention|ff|ff_context|feed_forward|img_mlp|txt_mlp|proj_mlp|proj_out)",)
"""What TaylorSeer extrapolates in a block: its attention and feed-forward parts, as diffusers' transformers name them."""
_FIRST_BLOCK = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")
"""Transformers whose first and last blocks return what the first-block cache subtracts; of SD3, FLUX.2 and Z-Image they do not."""
_FLOAT8_SINCE = (8, 9)
"""Compute capability of the first GPUs that multiply float8."""


def check(s: Settings, model: nn.Module, device: torch.device, sharded: bool) -> None:
    """Raises SettingsError for cheaper tails that cannot be had of `model` here. sharded: whether what samples is."""
    for name, usual in (("tail_cache", "none"), ("tail_weights", "same")):
        if sharded and getattr(s, name) != usual:
            raise SettingsError(f"{name}={getattr(s, name)}: needs the weights whole; set rollout_weights=replica, or leave it out")
    name = type(model).__name__.removeprefix("FSDP")
    if s.tail_cache.startswith("first_block") and name not in _FIRST_BLOCK:
        raise SettingsError(f"tail_cache={s.tail_cache}: diffusers' cache does not fit the blocks of {name}; use taylorseer:3")
    if s.tail_weights == "same":
        return
    if importlib.util.find_spec("torchao") is None:
        raise SettingsError(f"tail_weights={s.tail_weights}: torchao is not installed; pip install 'flowgrain[quantize]'")
    if s.tail_weights == "float8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < _FLOAT8_SINCE):
        raise SettingsError(f"tail_weights=float8: needs a GPU of compute capability 8.9 or more, not {device}; int8 runs anywhere")


@contextlib.contextmanager
def caching(model: nn.Module, setting: str) -> Iterator[Callable[[bool], AbstractContextManager[None]]]:
    """Inside, calls of `model` within a(follows) keep features as setting `tail_cache` says; those kept count where it follows."""
    kind, _, number = setting.partition(":")
    if kind == "none":
        yield lambda follows: contextlib.nullcontext()  # noqa: ARG005
        return
    from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
    from diffusers.models.cache_utils import CacheMixin

    if kind == "first_block":
        config: Any = FirstBlockCacheConfig(threshold=float(number))
    else:
        # Two whole steps first: a line is drawn through two points.
        config = TaylorSeerCacheConfig(
            cache_interval=int(number),
            disable_cache_before_step=2,
            max_order=1,
            taylor_factors_dtype=next(model.parameters()).dtype,
            cache_identifiers=_CACHED,
        )
    if not isinstance(model, CacheMixin):  # SD3's transformer lacks it, though the caches know its blocks
        model.__class__ = type(type(model).__name__, (type(model), CacheMixin), {})
    model.enable_cache(config)

    def around(follows: bool) -> AbstractContextManager[None]:
        if not follows:
            model._reset_stateful_cache()
        return model.cache_context("tail")

    try:
        yield around
    finally:
        model.disable_cache()


class Quantised:
    """A copy of a model whose blocks' linear layers are quantised; a LoRA's own layers stay as they are."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], kind: str, dtype: torch.dtype) -> None:
        self.kind, self.dtype = kind, dtype
        self.layers = {
            f"{block}.{name}"
            for block in blocks
            for name, module in model.get_submodule(block).named_modules()
            if isinstance(module, nn.Linear) and not re.search(r"\blora_", name)
        }
        self.model = copy.deepcopy(model).requires_grad_(False).to(dtype)
        self._quantise(self.layers)

    @property
    def size(self) -> int:
        """Bytes of the copy: a byte a quantised weight, without its scales."""
        quantised = {f"{name}.weight" for name in self.layers}
        return sum(p.numel() * (1 if name in quantised else p.element_size()) for name, p in self.model.named_parameters())

    @torch.no_grad()
    def take(self, trained: Mapping[str, Tensor]) -> None:
        """Takes the policy's trained weights, as they are now."""
        again = set()
        for name, value in trained.items():
            layer, _, leaf = name.rpartition(".")
            if layer in self.layers and leaf == "weight":
                weight = nn.Parameter(whole(value.detach()).to(self.dtype, copy=True), requires_grad=False)
                self.model.get_submodule(layer).weight = weight
                again.add(layer)
            else:
                self.model.get_parameter(name).copy_(whole(value.detach()))
        self._quantise(again)

    def _quantise(self, layers: Collection[str]) -> None:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )

        config = Int8DynamicActivationInt8WeightConfig() if self.kind == "int8" else Float8DynamicActivationFloat8WeightConfig()
        quantize_(self.model, config, filter_fn=lambda _, name: name in layers)
