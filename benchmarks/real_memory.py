"""The memory of a real training step on the CPU, by phase and kind.

The instrument is the profiler of torch: it receives every allocation and release of torch's CPU
allocator, also of buffers inside of operators. What an allocation is for follows from the addresses
of parameters, gradients and other tensors. No code of the rehearsal takes part.

A GPU has its own memory, while a run on the CPU has one memory. `HostTensors` copies tensors where
a run on a GPU copies them, so that tensors of the host are known and are not counted.
"""

import gc
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._profiler import _EventType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves, tree_map_only

from flowgrain.training import Trainer
from flowgrain.training.step import train_step
from flowgrain.training.timer import StageTimer

BLOCK = 512
"""Allocations are rounded up to this many bytes, as on CUDA."""
FIRST, LATER, OPTIMIZER = "first micro-batch", "later micro-batches", "optimizer"
HOST, OTHER = "host", "activations"
BEFORE_TORCH_2_13 = ("all_gather_into_tensor", "reduce_scatter_tensor")
COLLECTIVES = ("all_gather_single", "reduce_scatter_single", "all_reduce", *BEFORE_TORCH_2_13)
"""Collectives of FSDP2 and of flowgrain. None of them is called with `async_op=True`."""
FLOAT32 = {
    *(functional.layer_norm, functional.group_norm, functional.softmax, functional.mse_loss),
    *(torch.exp, torch.log, torch.pow, torch.rsqrt, torch.sum, torch.cumsum, torch.softmax),
    *(Tensor.exp, Tensor.log, Tensor.pow, Tensor.rsqrt, Tensor.sum, Tensor.cumsum, Tensor.softmax),
}
"""Functions that autocast runs in float32 on CUDA, but not on the CPU."""


@dataclass(frozen=True)
class Measured:
    """A measured step.

    Attributes:
        peaks: bytes by kind at the peak of each phase, without tensors of the host.
        events: number of allocations and releases.
        unknown: named tensors whose memory does not come from the allocator.
    """

    peaks: dict[str, dict[str, int]]
    events: int
    unknown: int


class HostTensors(TorchFunctionMode):
    """Marks tensors that are on the host during a run on a GPU, and makes the copies of that run.

    Also makes the casts of CUDA's autocast to float32.

    Random numbers of a generator, results of `Tensor.cpu`, and results of operators on such tensors
    alone are on the host. `Tensor.to` with a device copies them.
    """

    def __init__(self, marks: "Marks") -> None:
        super().__init__()
        self.marks = marks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _in_float32, (args, kwargs))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_host = bool(tensors) and all(hasattr(t, "on_host") for t in tensors)
        if func is Tensor.cpu:
            return self._marked(args[0].clone())
        if func is Tensor.to and on_host and _names_device(args[1:], kwargs):
            return func(*args, **{**kwargs, "copy": True})
        out = func(*args, **kwargs)
        if on_host or (func is torch.randn and kwargs.get("generator") is not None):
            self._marked(out)
        return out

    def _marked(self, out: Any) -> Any:
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in made:
            tensor.on_host = True
        self.marks.tag({HOST: made})
        return out


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _names_device(args: Any, kwargs: Any) -> bool:
    return any(isinstance(a, torch.device | str) for a in (*args, kwargs.get("device")))


class Marks:
    """Marks in the profile: the current phase, and addresses of tensors of known kinds."""

    def __init__(self) -> None:
        self.phase = "start"
        self.tags: list[dict[int, tuple[str, int]]] = []

    def enter(self, phase: str) -> None:
        """Name what runs from now on."""
        self.phase = phase
        with record_function(f"phase:{phase}"):
            pass

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name what runs inside this context."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def tag(self, kinds: dict[str, Iterable[Tensor | None]]) -> None:
        """Say what the storages of tensors are for. The first kind of a storage counts."""
        found: dict[int, tuple[str, int]] = {}
        for kind, tensors in kinds.items():
            for tensor in tensors:
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                if local is not None and local.untyped_storage().nbytes():
                    storage = local.untyped_storage()
                    found.setdefault(storage.data_ptr(), (kind, storage.nbytes()))
        if found:
            self.tags.append(found)
            with record_function(f"tag:{len(self.tags) - 1}"):
                pass


@contextmanager
def patched(marks: Marks) -> Iterator[None]:
    """Stages of the step are phases, and unsharded parameters of FSDP2 are known."""
    measure = StageTimer.measure

    @contextmanager
    def marked(timer: StageTimer, stage: str) -> Iterator[None]:
        with marks.during(FIRST if stage == "update" else stage), measure(timer, stage):
            yield

    with ExitStack() as stack:
        stack.enter_context(patch.object(StageTimer, "measure", marked))
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

        allocate = FSDPParam.alloc_all_gather_outputs

        def tagged(param: Any) -> None:
            allocate(param)
            marks.tag({"unsharded parameters": param.all_gather_outputs})

        stack.enter_context(patch.object(FSDPParam, "alloc_all_gather_outputs", tagged))
        for name in filter(partial(hasattr, dist), COLLECTIVES):
            collective = on_copies(getattr(dist, name))
            stack.enter_context(patch.object(dist, name, collective))
        yield


def on_copies(collective: Any) -> Any:
    """`collective` with copies of its tensors, which count as tensors of the host.

    A thread of gloo may hold the last reference to a tensor. The profiler does not see what that
    thread releases, and the tensor would count as held.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function("gloo:copies"):
            mine = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            copies = {t: t.clone() for t in mine}
            words, options = tree_map_only(Tensor, copies.__getitem__, (args, kwargs))
            collective(*words, **options)
            for tensor, of_gloo in copies.items():
                tensor.copy_(of_gloo)

    return call


def measured_step(make_trainer: Any) -> Measured:
    """Measure the first training step of the trainer that `make_trainer` returns.

    All tensors of the trainer must be made inside of `make_trainer`.
    """
    marks = Marks()
    with recorded() as profiler, patched(marks):
        marks.enter("start")
        trainer = make_trainer()
        _watch(trainer, marks)
        gc.collect()
        with HostTensors(marks):
            train_step(1, trainer.config, trainer.collector, trainer.optimizer)
        marks.enter("end")
    return sweep(profiler, marks)


def recorded() -> profile:
    """A profiler that records every allocation and release."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)


def _watch(trainer: Trainer, marks: Marks) -> None:
    """Mark what belongs to the policy, and what the step adds."""
    policy, optimizer, collector = trainer.policy, trainer.optimizer, trainer.collector
    backward, step, collect = optimizer.backward, optimizer.step, collector.collect

    def gradients() -> list[Tensor | None]:
        found = [parameter.grad for parameter in policy.parameters.values()]
        for parameter in sharded_parameters(policy.model):
            whole = getattr(parameter, "_unsharded_param", None)
            found += [parameter.unsharded_accumulated_grad, None if whole is None else whole.grad]
        return found

    def marked_backward(loss: Tensor) -> None:
        backward(loss)
        marks.tag({"gradients": gradients()})
        marks.enter(LATER)

    def marked_step(losses: Any) -> Any:
        marks.tag({"gradients": gradients()})
        with marks.during(OPTIMIZER):
            result = step(losses)
        marks.tag({"optimizer": optimizer.tensors().values()})
        return result

    def marked_collect(number: int) -> Any:
        batch = collect(number)
        cond = [*batch.cond.values(), *policy.unconditional.values()]
        marks.tag({"latents": [batch.rollout.latents], "conditioning": cond})
        return batch

    optimizer.backward, optimizer.step = marked_backward, marked_step
    collector.collect = marked_collect
    marks.tag(_kinds(trainer))


def _kinds(trainer: Trainer) -> dict[str, Iterable[Tensor]]:
    policy, backbone = trainer.policy, trainer.backbone
    modules = {
        "weights": policy.model,
        "sampling copy": policy.sampler,
        "reference": policy.reference,
        "old policy": policy.old,
        "VAE": backbone.vae,
    }
    kinds: dict[str, Iterable[Tensor]] = {k: _tensors(m) for k, m in modules.items() if m}
    kinds["EMA"] = policy.ema.shadow_params if policy.ema is not None else []
    pipe = getattr(backbone, "_encoding_pipe", None)
    parts = pipe.components if pipe is not None else {}
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder") and part]
    kinds["text encoders"] = [t for part in encoders for t in _tensors(part)]
    return kinds


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def sharded_parameters(module: nn.Module) -> Iterator[Any]:
    """The parameters of FSDP2 in `module`."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            group = part._get_fsdp_state()._fsdp_param_group
            yield from group.fsdp_params if group is not None else ()


def sweep(profiler: profile, marks: Marks) -> Measured:
    """The peaks of the phases, from the events of `profiler` in the order of time."""
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    events = sorted(_relevant(tree), key=lambda event: event[0])
    kind: dict[int, str] = {}
    live: dict[int, tuple[int, int]] = {}  # number and bytes of the allocation at an address
    changes: list[tuple[int, int, str]] = []
    phase, numbers, unknown = "start", 0, 0
    for _, what, pointer, size in events:
        if what.startswith("phase:"):
            phase = what.removeprefix("phase:")
        elif what.startswith("tag:"):
            for address, (name, wanted) in marks.tags[int(what.removeprefix("tag:"))].items():
                number, held = live.get(address, (-1, 0))
                if held == wanted:
                    kind.setdefault(number, name)
                else:
                    unknown += name != HOST
        elif size > 0:
            live[pointer] = numbers, size
            if what == HOST:
                kind[numbers] = HOST
            changes.append((numbers, rounded(size), phase))
            numbers += 1
        elif pointer in live:
            number, held = live.pop(pointer)
            changes.append((number, -rounded(held), phase))
    return Measured(_peaks(changes, kind), len(changes), unknown)


def _relevant(tree: Any) -> Iterator[tuple[int, str, int, int]]:
    """Time, name, address and bytes of allocations and marks.

    Two buffers of kernels that a GPU does not have count as tensors of the host: gloo clones what
    it sends, and a batched matrix product in bfloat16 clones a weight once for each row.
    """
    stack = [(event, "", False) for event in tree]
    while stack:
        event, parent, of_cpu = stack.pop()
        of_cpu |= event.name.startswith(("c10d::", "gloo:"))
        of_cpu |= (parent, event.name) == ("aten::bmm", "aten::contiguous")
        stack += [(child, event.name, of_cpu) for child in event.children]
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            kind = HOST if of_cpu else ""
            yield event.start_time_ns, kind, fields.ptr, fields.alloc_size
        elif event.name.startswith(("phase:", "tag:")):
            yield event.start_time_ns, event.name, 0, 0


def rounded(size: int) -> int:
    """`size` bytes as the allocator of CUDA counts them."""
    return -(-size // BLOCK) * BLOCK


def _peaks(changes: list[tuple[int, int, str]], kind: dict[int, str]) -> dict[str, dict[str, int]]:
    counted = [change for change in changes if kind.get(change[0]) != HOST]
    total = np.cumsum([size for _, size, _ in counted])
    top: dict[str, int] = {}
    for place, (_, _, phase) in enumerate(counted):
        if phase not in top or total[place] > total[top[phase]]:
            top[phase] = place
    peaks = {}
    for phase, place in top.items():
        held: defaultdict[str, int] = defaultdict(int)
        for number, size, _ in counted[: place + 1]:
            held[kind.get(number, OTHER)] += size
        peaks[phase] = {name: size for name, size in held.items() if size}
    return peaks
