"""Sharded parameters with FSDP2."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flowgrain.distributed.world import World


def shard(model: nn.Module, blocks: Sequence[nn.Module], world: World) -> None:
    """Shard `model` in place: each of its `blocks`, then all other parameters.

    Gradients are summed over ranks, not averaged. Parameters are resharded after every forward
    pass, because they may change before the next forward pass. Does nothing in a single process.
    """
    if world.mesh is None:
        return
    # FSDP warns that the output of a wrapped module is a view. The code does not write to it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for module in (*blocks, model):
        fully_shard(module, mesh=world.mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Set whether the next backward pass of `model` sums gradients over ranks.

    Otherwise it only accumulates the gradients of this rank.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def full_tensor(tensor: Tensor) -> Tensor:
    """The unsharded tensor. All ranks must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_into(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy `sources` into `targets`, tensor by tensor.

    A sharded tensor can also be copied into an unsharded tensor. All ranks must call it together.
    """
    for target, source in zip(targets, sources, strict=True):
        same_layout = isinstance(target, DTensor) == isinstance(source, DTensor)
        target.copy_(source if same_layout else full_tensor(source))


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded state dict on the CPU of rank 0. Empty on other ranks.

    Ranks gather one tensor at a time.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]


def class_name(model: nn.Module) -> str:
    """Name of the model's class without the prefix that FSDP2 adds when it shards a model."""
    return type(model).__name__.removeprefix("FSDP")


def is_sharded_type(kind: type) -> bool:
    """Whether tensors of the class `kind` are divided over the ranks of a mesh."""
    return issubclass(kind, DTensor)


def fsdp_parameters(model: nn.Module) -> Iterator[Any]:
    """The parameters that FSDP2 manages in `model`, with their gathered tensors and gradients."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            yield from group.fsdp_params if group is not None else ()


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is divided over the ranks of a mesh."""
    return isinstance(tensor, DTensor)


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """First row of this rank's part of a tensor that is sharded by rows, and the row after it.

    Raises:
        TypeError: the tensor is not sharded.
    """
    if not isinstance(tensor, DTensor):
        raise TypeError(f"a tensor of the shape {tuple(tensor.shape)} is not sharded")
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return offset[0], offset[0] + shape[0]


def with_local_tensor(tensor: Tensor, local: Tensor) -> Tensor:
    """A tensor that is sharded like `tensor`, with `local` as this rank's part.

    Raises:
        TypeError: the tensor is not sharded.
    """
    if not isinstance(tensor, DTensor):
        raise TypeError(f"a tensor of the shape {tuple(tensor.shape)} is not sharded")
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
