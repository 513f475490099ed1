"""Cheaper velocities for the tails of a rollout: features kept from step to step (diffusers), and quantised weights (torchao).

Only rewards feel them. What a stochastic step is drawn from, and so every log-probability, stays the policy's own.
"""

import contextlib
import copy
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from flowgrain.config.schema import Settings, SettingsError

_WORK = r"(attn2?|attention|ff|ff_context|feed_forward|img_mlp|txt_mlp|proj_mlp|proj_out)"
"""A block's attention and feed-forward parts, as diffusers' transformers name them."""
_FIRST_BLOCK = ("FluxTransformer2DModel", "QwenImageTransformer2DModel")
"""Transformers whose first and last blocks return what the first-block cache subtracts; of SD3, FLUX.2 and Z-Image they do not."""
_FLOAT8_SINCE = (8, 9)
"""Compute capability of the first GPUs that multiply float8."""


def check(s: Settings, model: nn.Module, device: torch.device, sharded: bool) -> None:
    """Raises SettingsError for cheaper tails that cannot be had of `model` here. sharded: whether what samples is."""
    for name, usual in (("tail_cache", "none"), ("tail_weights", "same")):
        if sharded and getattr(s, name) != usual:
            way = "use lora_rank" if s.method == "diffusionnft" else "set rollout_weights=replica"  # it samples from its slow copy
            raise SettingsError(
                f"{name}={getattr(s, name)}: needs whole weights in each process, and here they are sharded; {way}, or leave it out"
            )
    name = type(model).__name__.removeprefix("FSDP")
    if s.tail_cache.startswith("first_block") and name not in _FIRST_BLOCK:
        raise SettingsError(f"tail_cache={s.tail_cache}: diffusers' cache does not fit the blocks of {name}; use taylorseer:3")
    if s.tail_weights == "same":
        return
    if importlib.util.find_spec("torchao") is None:
        raise SettingsError(f"tail_weights={s.tail_weights}: torchao is not installed; pip install 'flowgrain[quantize]'")
    if s.tail_weights == "float8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < _FLOAT8_SINCE):
        raise SettingsError(f"tail_weights=float8: needs a GPU of compute capability 8.9 or more, not {device}; use int8")


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
            cache_identifiers=[rf"(.*blocks|layers)\.\d+\.{_WORK}"],
            skip_predict_identifiers=[
                rf"{re.escape(name)}\.(attn|proj_mlp)"
                for name, block in model.named_modules()
                if "proj_out" in dict(block.named_children())
            ],
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


@lru_cache
def int8_saturates() -> bool:
    """Whether int8 matrix products saturate on this CPU.

    Kernels without VNNI add pairs of products in 16 bits, which overflow for values near 127. Measured instead of read from the
    CPU's flags, because an environment variable can limit the kernels. Values in -64..63 are exact on all CPUs.
    """
    a, b = torch.full((8, 64), 127, dtype=torch.int8), torch.full((64, 8), 127, dtype=torch.int8)
    return not torch.equal(torch._int_mm(a, b), a.int() @ b.int())


class Quantised:
    """A copy of a model whose blocks' attention and feed-forward layers are quantised; a LoRA's own layers stay as they are.

    It lies where `model` lies until it is sent `to` its device, where one layer at a time is whole.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], kind: str, dtype: torch.dtype) -> None:
        self.kind, self.dtype, self.stale = kind, dtype, False
        self.layers = {
            f"{block}.{name}"
            for block in blocks
            for name, module in model.get_submodule(block).named_modules()
            if isinstance(module, nn.Linear) and re.match(rf"{_WORK}(\.|$)", name) and not re.search(r"\blora_", name)
        }
        self.model = copy.deepcopy(model).requires_grad_(False).to(dtype)

    def to(self, device: torch.device) -> "Quantised":
        """Quantises, on `device`."""
        self._quantise(self.model, lambda _, name: name in self.layers, device)
        return self

    @property
    def size(self) -> int:
        """Bytes of the copy: a byte a quantised weight, without its scales."""
        quantised = {f"{name}.weight" for name in self.layers}
        return sum(p.numel() * (1 if name in quantised else p.element_size()) for name, p in self.model.named_parameters())

    @torch.no_grad()
    def take(self, trained: Mapping[str, Tensor]) -> None:
        """Takes the policy's trained weights, whole, as they are now."""
        for name, value in trained.items():
            place, _, leaf = name.rpartition(".")
            if place in self.layers and leaf == "weight":
                layer = self.model.get_submodule(place)
                layer.weight = nn.Parameter(value.detach().to(self.dtype, copy=True), requires_grad=False)
                self._quantise(layer, lambda *_: True, value.device)
            else:
                self.model.get_parameter(name).copy_(value.detach())
        self.stale = False

    def _quantise(self, module: nn.Module, which: Callable[[nn.Module, str], bool], device: torch.device) -> None:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )

        if self.kind == "int8":
            config: Any = Int8DynamicActivationInt8WeightConfig(reduce_range=device.type == "cpu" and int8_saturates())
        else:
            config = Float8DynamicActivationFloat8WeightConfig()
        quantize_(module, config, filter_fn=which, device=device)
