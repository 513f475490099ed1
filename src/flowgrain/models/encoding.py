"""Images to latents, with the VAEs of diffusers pipelines.

Shapes: I images, H x W pixels, C channels of a latent with h x w places.
"""

from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor


@torch.no_grad()
def modes(vae: Any, images: Tensor) -> Tensor:
    """Modes of the VAE's distributions, float32, before they are scaled for the transformer.

    Args:
        vae: the VAE.
        images: [I, 3, H, W] in 0..1.
    """
    pixels = (2 * images - 1).to(vae.dtype)
    found: Tensor = vae.encode(pixels, return_dict=False)[0].mode()
    return found.float()


def encode_grid(vae: Any, images: Tensor) -> Tensor:
    """Latents [I, C, h, w] of images [I, 3, H, W], shifted and scaled by the VAE's config."""
    config = vae.config
    return (modes(vae, images) - (config.shift_factor or 0)) * float(config.scaling_factor)


def pack(latents: Tensor) -> Tensor:
    """Tokens [I, h w / 4, 4 C] of latents [I, C, h, w]: 2 x 2 latents are one token.

    FLUX.1 and Qwen-Image have the same order.
    """
    packed: Tensor = FluxPipeline._pack_latents(latents.contiguous(), *latents.shape)
    return packed
