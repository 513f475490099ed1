"""The memory that a decoder needs for a gradient, counted without weights."""

from collections import defaultdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flowgrain.models import ModelConfig
from flowgrain.training.sizes import meta_vae


@lru_cache(maxsize=4)
def decoder_activations(model: ModelConfig) -> int:
    """Numbers that decoding one image with gradient keeps for the backward pass.

    The decoder runs on the meta device. With model.gradient_checkpointing, the outputs of its
    blocks are kept, and the activations of one block at a time.

    Returns:
        The count, or 0 if the configuration of the model is not known or cannot be used.
    """
    try:
        found = meta_vae(model)
        if found is None:
            return 0
        vae, shape = found
        parts = dict(vae.requires_grad_(False).decoder.named_children())
        blocks = [parts["mid_block"], *parts["up_blocks"]] if "mid_block" in parts else []
        kept, outputs = _saved_by_block(vae, blocks, shape)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError):
        return 0
    if not (blocks and model.gradient_checkpointing and vae._supports_gradient_checkpointing):
        return sum(kept.values())
    outside = kept.pop(None, 0)
    return outside + outputs + max(kept.values())


def _saved_by_block(
    vae: Any, blocks: list[nn.Module], shape: tuple[int, ...]
) -> tuple[dict[int | None, int], int]:
    """Numbers saved for the backward pass by number of the block, and numbers in their outputs.

    None: outside of all blocks.
    """
    current: list[int | None] = [None]
    kept: defaultdict[int | None, int] = defaultdict(int)
    outputs, alive, seen = [0], [], set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(tensor)  # its storage is not used again
            kept[current[0]] += tensor.numel()
        return tensor

    def enter(number: int) -> Any:
        return lambda *_: current.__setitem__(0, number)

    def leave(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        current[0] = None
        outputs[0] += output.numel()

    handles = [
        handle
        for number, block in enumerate(blocks)
        for handle in (
            block.register_forward_pre_hook(enter(number)),
            block.register_forward_hook(leave),
        )
    ]
    latents = torch.empty(shape, device="meta", requires_grad=True)
    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        vae.decode(latents)
    for handle in handles:
        handle.remove()
    return dict(kept), outputs[0]
