"""An accelerator without hardware: a device for fake tensors, with CUDA's autocast and attention.

Tensors on the device have a shape, a dtype and a place, but no values. A process can register the
device once, and should leave with `os._exit`.
"""

import contextlib
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakegpu"
DEVICE_COUNT = 1
_AUTOCAST = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("AutocastPrivateUse1"))
_aten: Any = torch.ops.aten

# The lists of torch's documentation, "Autocast Op Reference" for CUDA, as far as models use them.
_LOWER = (
    *("linear", "matmul", "addmm", "mm", "bmm", "baddbmm", "addbmm", "chain_matmul", "einsum"),
    *("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d.input", "prelu"),
    "scaled_dot_product_attention",
)
_FLOAT32 = (
    *("layer_norm", "group_norm", "native_layer_norm", "mse_loss", "l1_loss", "cosine_similarity"),
    *("exp", "log", "pow.Tensor_Scalar", "rsqrt", "reciprocal", "softplus", "norm.Scalar"),
    *("sum", "sum.dim_IntList", "prod", "cumsum", "softmax.int", "log_softmax.int"),
)


class _Stream:
    """A stream that does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device(NAME, 0)

    def wait_stream(self, _: Any) -> None:
        """Do nothing."""

    wait_event = wait_stream

    def synchronize(self) -> None:
        """Do nothing."""

    def record_event(self, event: Any = None) -> Any:
        """An event that has happened."""
        return event or _Event()


class _Event:
    """An event that has happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, _: Any = None) -> None:
        """Do nothing."""

    wait = record

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """True: it has happened."""
        return True


def _device_module() -> types.SimpleNamespace:
    """The functions that torch and FSDP2 call on the module of a device."""
    return types.SimpleNamespace(
        Stream=_Stream,
        Event=_Event,
        current_stream=_Stream,
        stream=lambda _: contextlib.nullcontext(),
        synchronize=lambda _=None: None,
        current_device=lambda: 0,
        set_device=lambda _: None,
        device_count=lambda: DEVICE_COUNT,
        is_available=lambda: True,
        is_initialized=lambda: True,
        manual_seed_all=lambda _: None,
        get_rng_state=lambda _=None: torch.zeros(16, dtype=torch.uint8),
        set_rng_state=lambda *_: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16, torch.float32],
    )


_Library: Any = torch.library.Library
_libraries: list[Any] = []
"""Registered operators. A library that is collected removes its operators."""


def register() -> torch.device:
    """Register the device in this process, and return it."""
    if not _libraries:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_device_module())
        _register_autocast()
        _register_attention()
    return torch.device(NAME, 0)


def _register_autocast() -> None:
    every = _Library("_", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = _Library("aten", "IMPL", "AutocastPrivateUse1")
    casts = _Casts()
    for names, dtype in ((_LOWER, None), (_FLOAT32, torch.float32)):
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(_aten, packet), overload or "default")
            aten.impl(name, casts.kernel(op, dtype))
    torch.clear_autocast_cache = casts.clear
    _libraries.extend((every, aten))


class _Casts:
    """Kernels that cast their arguments.

    As on CUDA, the cast of a parameter is kept until the outermost autocast ends.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def clear(self) -> None:
        """Release the casts of parameters."""
        self._kept.clear()

    def kernel(self, op: Callable[..., Any], dtype: torch.dtype | None) -> Callable[..., Any]:
        """`op` in `dtype`, by default in the dtype of the current autocast."""

        def run(*args: Any, **kwargs: Any) -> Any:
            to = dtype or torch.get_autocast_dtype(NAME)
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
                values = {name: self._cast(value, to) for name, value in kwargs.items()}
                return op(*(self._cast(value, to) for value in args), **values)

        return run

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._cast(item, dtype) for item in value)
        if not isinstance(value, Tensor) or value.device.type != NAME:
            return value
        if not value.is_floating_point() or value.dtype in (dtype, torch.float64):
            return value
        keeps = torch.is_grad_enabled() and value.requires_grad and value.is_leaf
        if not keeps or torch.finfo(dtype).bits >= 32 or not torch.is_autocast_cache_enabled():
            return value.to(dtype)
        source, cast = self._kept.get(id(value), (None, value))
        if source is None or source() is not value or cast.dtype != dtype:
            cast = value.to(dtype)
            self._kept[id(value)] = (weakref.ref(value), cast)
        return cast


def _register_attention() -> None:
    """Attention as CUDA runs it: flash attention, which keeps no matrix of scores."""
    # Both keys: with and without a graph.
    library = _Library("aten", "IMPL")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("scaled_dot_product_attention", _attention, key)
    _libraries.append(library)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention, or memory-efficient attention with a mask or in float32."""
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        out: Tensor = _aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
        return out
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, float("-inf"))
        bias = bias.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    found: Tensor = _aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale
    )[0]
    return found
