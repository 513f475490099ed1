"""Context parallelism: the ranks of a context group divide the tokens of every row.

The hooks and the attention come from diffusers (Ulysses: every rank has a part of the tokens, and
in the attention a part of the heads; Jacobs et al. 2023, arXiv:2309.14509).
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowgrain.distributed.world import World

_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
"""Normalizations of queries and keys in the attention of diffusers."""


def split_tokens(models: Iterable[nn.Module], world: World, device: torch.device) -> None:
    """Divide the tokens of every forward pass of `models` among the ranks of a context group.

    All ranks of a group must call a model together, with the same inputs. They get the same
    outputs. In the backward pass, the gradient of a parameter is that of the tokens of this rank.
    The sum over the ranks is the whole gradient. The hooks of a model refer to it, so it must not
    be copied afterwards. Does nothing without context parallelism.

    Args:
        models: transformers of diffusers with a plan of their sequence dimensions.
        world: ranks.
        device: compute device.
    """
    if world.context_mesh is None:
        return
    from diffusers import ContextParallelConfig, ParallelConfig  # takes seconds to import
    from diffusers.hooks.context_parallel import apply_context_parallel

    # The hooks of diffusers use a function that torch is about to rename.
    warnings.filterwarnings("ignore", message=".*all_gather_tensor. is deprecated")
    mesh = world.context_mesh["ring", "ulysses"]
    config: Any = ContextParallelConfig(  # type: ignore[no-untyped-call]
        ulysses_degree=world.context, mesh=mesh
    )
    parallel: Any = ParallelConfig(context_parallel_config=config)  # type: ignore[no-untyped-call]
    parallel.setup(world.rank, world.size, device, mesh=mesh)
    # Not model.enable_parallelism: it divides by the number of accelerators, 0 on a CPU.
    for model in models:
        plan: Any = model._cp_plan
        for module in model.modules():
            processor = getattr(module, "processor", None)
            if not hasattr(processor, "_parallel_config"):
                continue
            processor._parallel_config = parallel  # type: ignore[union-attr]
            for norm in (getattr(module, name, None) for name in _NORMS):
                if norm is not None:
                    norm.register_forward_hook(_in_autocast_dtype)
        apply_context_parallel(model, config, plan)


def _in_autocast_dtype(_: nn.Module, __: object, output: Tensor) -> Tensor:
    """The output of a normalization in the dtype of autocast, if it is enabled.

    Queries and keys can be float32 while values are bfloat16. The fused attention casts them under
    autocast, but diffusers repeats it in the backward pass, without autocast.
    """
    device = output.device.type
    if not torch.is_autocast_enabled(device):
        return output
    return output.to(torch.get_autocast_dtype(device))


def sum_input_gradient(x: Tensor, world: World) -> Tensor:
    """`x`, an input of a model whose tokens are divided.

    In the backward pass, the gradients of the ranks of a context group are summed. Otherwise the
    gradient of `x` would be that of the tokens of this rank.
    """
    if world.context_mesh is None or not x.requires_grad:
        return x
    result: Tensor = _SumGradient.apply(  # type: ignore[no-untyped-call]
        x, world.context_mesh.get_group("ulysses")
    )
    return result


class _SumGradient(torch.autograd.Function):
    """Identity. The backward pass sums the gradient over a group of ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
