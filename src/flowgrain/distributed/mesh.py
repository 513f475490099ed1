"""More than one process: the one file that knows of them. One process is a group of one, by the same path.

Prompts are dealt to the processes, a group whole on one; what is neither gradient nor weight travels as small host objects, a few
times a step. Weights are sharded by FSDP2 and saved by torch's distributed checkpoint as safetensors.
"""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from flowgrain.core.tree import Ints

_PATIENCE = timedelta(hours=1)
"""What a process waits for another: a slow reward is no fault. That one has died torchrun notices, and ends them all."""


@dataclass(frozen=True)
class Group:
    """The processes of a run: this one's rank, their number, and the mesh on which weights are sharded, if they are several."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def deal(self, count: int) -> Ints:
        """Which of `count` things are this process's: every `size`-th, and as many as everybody's; some may be `count` or more.

        Those beyond are there so that all processes do the same work at the same time; their results are thrown away.
        """
        return np.arange(-(-count // self.size), dtype=np.int64) * self.size + self.rank

    def collect(self, mine: Any) -> list[Any]:
        """What every process holds, by rank. A small host object: it is pickled between the run's own processes."""
        if self.mesh is None:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def undeal(self, parts: Sequence[Tensor], count: int) -> Tensor:
        """The `count` things [count, ...] of which process r holds parts[r], as they were dealt."""
        return torch.stack(list(parts), 1).flatten(0, 1)[:count]

    def any(self, mine: bool) -> bool:
        """Whether it holds anywhere."""
        return any(self.collect(mine))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up the gradients of weights that every process holds whole; those of sharded ones are added up by FSDP."""
        grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
        if self.mesh is None or not grads:
            return
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))


ALONE = Group()


def join(device: torch.device) -> Group:
    """The processes that torchrun started, found by its variables; a group of one without it.

    On several machines the mesh is hybrid: sharded within a machine, replicated across them.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return ALONE
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if here < size and size % here == 0:
        mesh = init_device_mesh(device.type, (size // here, here), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return Group(dist.get_rank(), size, mesh)


def leave() -> None:
    """Ends the processes' acquaintance, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------- weights


def shard(model: nn.Module, blocks: Sequence[nn.Module], group: Group) -> None:
    """Shards `model` in place, block by block and then the rest. Gradients are added up over the processes, not averaged.

    Nothing stays gathered after a forward: the weights may change before the next one.
    """
    if group.mesh is None:
        return
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # that its output is a view: nobody here writes into it
    for module in (*blocks, model):
        fully_shard(module, mesh=group.mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def reduce_gradients_now(model: nn.Module, now: bool) -> None:
    """Whether the next backward reduces gradients over the processes, or only adds to what is here."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one process would hold it: gathered if it is sharded. All processes call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_into(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copies tensor by tensor, from sharded to whole too. All processes call it together."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source if isinstance(target, DTensor) == isinstance(source, DTensor) else whole(source))


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU of the first process; nothing elsewhere, and never more than a tensor gathered at once."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


# ---------------------------------------------------------------------- checkpoints


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], group: Group) -> None:
    """Writes `tensors`, sharded or not, as safetensors files in `folder`, each process its own share, and reads that back.

    Raises OSError if it could not be written or is not what was written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process alone
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            dcp.save(dict(tensors), storage_writer=writer, no_dist=group.mesh is None)
        except CheckpointException as error:
            raise OSError("; ".join(str(one) for one, _ in error.failures.values())) from error
    for file in sorted(folder.glob(f"shard-{group.rank + 1:05d}-*.safetensors")):
        with safe_open(file, framework="np") as found:  # with "pt" safetensors 0.8 keeps 57 bytes for each tensor ever read
            for name in found.keys():  # noqa: SIM118  it is no dict
                mine = tensors[name].to_local() if isinstance(tensors[name], DTensor) else tensors[name]
                if not torch.equal(torch.from_numpy(found.get_tensor(name)), mine.cpu()):
                    raise OSError(f"{name} in {file} is not what was written")


def read_tensors(folder: Path, tensors: Mapping[str, Tensor], group: Group) -> None:
    """Fills `tensors` in place from `folder`, however many processes wrote it. Raises OSError for one that is not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=group.mesh is None)
        except CheckpointException as error:
            raise OSError("; ".join(str(one) for one, _ in error.failures.values())) from error
