"""A mode in which tensors on the accelerator are fake, and tensors on the CPU are real."""

import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from flowgrain.distributed.fake_ranks import group_of, spans_machines
from flowgrain.distributed.sharding import is_sharded_type
from flowgrain.planning.rehearsal.accelerator import NAME
from flowgrain.planning.rehearsal.counts import Counts, difference, of_phase
from flowgrain.planning.rehearsal.ledger import Ledger

_PACKAGE = Path(__file__).parents[2]
_aten: Any = torch.ops.aten
_SMALL = 65_536
"""Largest number of values of a tensor that has real values on the host."""
_KNOWN = "_rehearsal_values"
"""Attribute of a tensor on the device that was copied from the host."""
_EQUAL_SIZES = {"allreduce_": 2, "all_to_all_single": 1}
"""Collectives whose results are as large as their inputs. They receive this multiple of them."""
_COLLECTIVES = (
    *("_allgather_base_", "_reduce_scatter_base_"),  # of FSDP2 and of flowgrain
    "all_gather_into_tensor",  # of a DTensor
    *_EQUAL_SIZES,
)


class _FakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A mode that copies of its tensors share."""

    def __deepcopy__(self, _: Any) -> "_FakeMode":
        return self


@dataclass(frozen=True)
class _Call:
    """A call of a model: its result and its cost."""

    shape: torch.Size
    dtype: torch.dtype
    phase: str
    cost: Counts
    held: list[tuple[int, int]]


class RehearsalMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators on fake tensors, and counts what a device would do.

    Attributes:
        ledger: memory of the device.
        flops: FLOPs by phase.
        moved: bytes that this rank receives over links, by phase and collective.
        copied: bytes between device and host, by direction.
        syncs: how often the host waited for the device, by place in the code.
        rows: rows through the model and the decoder.
        largest: rows of the largest call of the model or the decoder, by phase.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = Ledger()
        self.flops: defaultdict[str, float] = defaultdict(float)
        self.moved: defaultdict[str, float] = defaultdict(float)
        self.copied: defaultdict[str, float] = defaultdict(float)
        self.syncs: defaultdict[str, float] = defaultdict(float)
        self.rows: defaultdict[str, float] = defaultdict(float)
        self.largest: defaultdict[str, int] = defaultdict(int)
        self._calls: dict[Hashable, _Call] = {}
        self._fake = _FakeMode()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(is_sharded_type(t) for t in types):
            return NotImplemented
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # DTensor computes the shape of a result
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        fake = any(isinstance(t, FakeTensor) for t in tensors)
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == NAME
        if not fake and not to_device:
            return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return self._value(args[0]).item()
        if func is _aten._to_copy.default:
            self._count_copy(args[0], target)
            if not fake:  # to the device
                return self._on_device(args[0], kwargs)
            if target is not None and not to_device and hasattr(args[0], _KNOWN):
                return func(getattr(args[0], _KNOWN), **kwargs)
        if not all(isinstance(t, FakeTensor) for t in tensors):
            args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
        with self._fake:
            out = _of_unknown_shape(func, args, self._count_sync)
            out = func(*args, **kwargs) if out is None else out
        _mark_finite(func, args, kwargs, out)
        if self._record(func, args, kwargs, out):
            return out
        return tree_map_only(FakeTensor, _with_values, out)

    def once(self, key: Hashable, call: Callable[[], Tensor]) -> Tensor:
        """The result of `call`. A call with a known key is counted, but not repeated."""
        known = self._calls.get(key)
        if known is None:
            position, before = self.ledger.position, self.counted()
            out = call()
            cost = difference(self.counted(), before)
            held = self.ledger.highest(position)
            self._calls[key] = _Call(out.shape, out.dtype, self.ledger.phase, cost, held)
            return out
        phase = self.ledger.phase
        self.add(phase, of_phase(known.cost, known.phase, phase))
        self.ledger.repeat(known.held)
        return torch.empty(known.shape, dtype=known.dtype, device=torch.device(NAME, 0))

    def add_rows(self, kind: str, count: int) -> None:
        """Count a call of the model or the decoder with `count` rows."""
        self.rows[kind] += count
        phase = self.ledger.phase
        self.largest[phase] = max(self.largest[phase], count)

    def counted(self) -> Counts:
        """What was counted so far: FLOPs in total, all else by name."""
        found = {("flops", ""): sum(self.flops.values())}
        for kind in ("moved", "copied", "syncs", "rows"):
            found |= {(kind, name): value for name, value in getattr(self, kind).items()}
        return found

    def add(self, phase: str, counts: Counts) -> None:
        """Add `counts` of `phase`, which did not run."""
        for (kind, name), value in counts.items():
            getattr(self, kind)[name or phase] += value

    def forget(self) -> None:
        """Count from now on. The memory that is held stays known."""
        for counts in (self.flops, self.moved, self.copied, self.syncs, self.rows):
            counts.clear()

    @contextmanager
    def running(self) -> Iterator[None]:
        """This mode, with methods of torch replaced that cannot handle fake tensors."""
        resize = torch.UntypedStorage.resize_

        def recorded_resize(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            self.ledger.resized(storage)

        def tolist(tensor: Tensor) -> Any:
            return self._value(tensor).tolist()  # all values in one wait

        with (
            patch.object(torch.UntypedStorage, "resize_", recorded_resize),
            patch.object(FakeTensor, "tolist", tolist),
            patch.object(nn.Module, "_apply", _apply),
            self,
        ):
            # torch.tensor(values, device) makes a tensor on the CPU, and then a copy on the device.
            torch._C._set_only_lift_cpu_tensors(True)
            try:
                yield
            finally:
                torch._C._set_only_lift_cpu_tensors(False)

    def _on_device(self, tensor: Tensor, kwargs: Any) -> Tensor:
        """A copy of a tensor of the host on the device. Small ones are read back unchanged."""
        with self._fake:
            shape, dtype = tensor.shape, kwargs.get("dtype") or tensor.dtype
            out = torch.empty(shape, dtype=dtype, device=kwargs["device"])
        if tensor.numel() <= _SMALL:
            setattr(out, _KNOWN, tensor.detach().to(dtype, copy=True))
        self.ledger.add(out)
        return out

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor)

    def _value(self, tensor: Tensor) -> Tensor:
        """Values in place of those that a device would return."""
        if tensor.device.type == NAME:
            self._count_sync()
        known: Tensor | None = getattr(tensor, _KNOWN, None)
        return _plausible(tensor) if known is None else known

    def _count_copy(self, tensor: Tensor, target: Any) -> None:
        if target is None:
            return
        source, to = tensor.device.type, torch.device(target).type
        if source == to:
            return
        self.copied["to host" if to == "cpu" else "to device"] += tensor.nbytes
        if to == "cpu":
            self._count_sync()

    def _count_sync(self) -> None:
        frame = sys._getframe(1)
        own = Path(__file__).parent
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_PACKAGE) and not path.is_relative_to(own):
                self.syncs[f"{path.relative_to(_PACKAGE)}:{frame.f_lineno}"] += 1
                return
            frame = frame.f_back  # type: ignore[assignment]
        self.syncs["elsewhere"] += 1

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """Count an operator. Returns whether all results are on the device."""
        all_on_device = True
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                on_device = tensor.device.type == NAME
                all_on_device &= on_device
                if on_device:
                    self.ledger.add(tensor)
        counted = flop_registry.get(func._overloadpacket)
        phase = self.ledger.phase
        if counted is not None:
            self.flops[phase] += counted(*args, **kwargs, out_val=out)
        elif func.namespace in ("c10d", "_c10d_functional"):
            self._record_collective(func, args, out)
        return all_on_device

    def _record_collective(self, func: Any, args: Any, out: Any) -> None:
        """Bytes that this rank receives, in a ring."""
        name = func._overloadpacket.__name__
        if name not in _COLLECTIVES:
            return
        group = group_of(args)
        sizes = [t.nbytes for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
        received = float(max(sizes) - min(sizes))  # of an all-gather or a reduce-scatter
        if name in _EQUAL_SIZES:
            received = _EQUAL_SIZES[name] * max(sizes) * (1 - 1 / group.size())
        place = "between machines" if spans_machines(group) else "in a machine"
        self.moved[f"{self.ledger.phase}: {name.strip('_')} {place}"] += received


def _of_unknown_shape(func: Any, args: Any, wait: Callable[[], None]) -> Tensor | None:
    """The result of an operator whose shape depends on values, if every value is selected.

    None for other operators. The host waits for the shape: `wait` is called.
    """
    if func is _aten.nonzero.default:
        wait()
        numbers: Tensor = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        return numbers
    if func is _aten.masked_select.default:
        wait()
        shape = torch.broadcast_shapes(*(t.shape for t in args))  # type: ignore[no-untyped-call]
        selected: Tensor = args[0].new_empty(shape.numel())
        return selected
    if func is not _aten.index.Tensor or not any(map(_is_mask, args[1])):
        return None
    wait()
    places: list[Tensor | None] = []
    for index in args[1]:
        if index is not None and _is_mask(index):
            places += [index.new_empty(index.numel(), dtype=torch.int64)] * index.dim()
        else:
            places.append(index)
    found: Tensor = func(args[0], places)
    return found


def _mark_finite(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Give the answers to "is any value NaN or infinite?" their value: False."""
    if not isinstance(out, Tensor) or out.is_floating_point():
        return
    if func in (_aten.isnan.default, _aten.isinf.default):
        setattr(out, _KNOWN, torch.zeros((), dtype=torch.bool).expand(out.shape))
        return
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if tensors and all(_is_known_mask(t) for t in tensors):
        args, kwargs = tree_map_only(Tensor, lambda t: getattr(t, _KNOWN), (args, kwargs))
        setattr(out, _KNOWN, func(*args, **kwargs))


def _is_known_mask(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool and hasattr(tensor, _KNOWN)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _plausible(tensor: Tensor) -> Tensor:
    """True, 1 or 0.5 everywhere, in the shape of `tensor`."""
    value = 1 if not tensor.is_floating_point() else 0.5
    return torch.full(tensor.shape, value, dtype=tensor.dtype)


def _with_values(tensor: FakeTensor) -> Tensor:
    """A real tensor in place of a small fake tensor on the host, so that code can depend on it."""
    return (
        _plausible(tensor) if tensor.device.type == "cpu" and tensor.numel() <= _SMALL else tensor
    )


def _apply(
    module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """`Module._apply` without swapping, which fake tensors do not support."""
    if recurse:
        for child in module.children():
            child._apply(change)  # type: ignore[no-untyped-call]
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = change(parameter)
            if changed is not parameter:
                module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module
