"""Decoding of latents into images, and the monitors of the images.

Shapes: I images, *L latent, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrain.monitors import pixels
from flowgrain.training.policy import Policy
from flowgrain.training.signals import check_stop


@dataclass(frozen=True)
class Decoded:
    """Images and their monitors, on the CPU.

    Attributes:
        images: [I, 3, H, W] in 0..1.
        monitors: [I] by monitor. Empty if nothing was measured.
    """

    images: Tensor
    monitors: dict[str, Tensor]

    @staticmethod
    def concatenate(parts: "Sequence[Decoded]") -> "Decoded":
        """The images and monitors of consecutive parts."""
        names = parts[0].monitors
        return Decoded(
            torch.cat([part.images for part in parts]),
            {name: torch.cat([part.monitors[name] for part in parts]) for name in names},
        )


@torch.no_grad()
def decode(policy: Policy, latents: Tensor, batch_size: int, measured: bool = False) -> Decoded:
    """Decode clean latents [I, *L], `batch_size` or sampling.decode_batch_size at a time.

    The monitors are measured on the policy's device, before the images are copied to the CPU.
    """
    parts = []
    for part in torch.split(latents, policy.decode_batch_size or batch_size):
        check_stop(policy.world)
        images = policy.backbone.decode(part)
        monitors = {}
        if measured:
            norm = part.float().flatten(1).square().mean(1).sqrt()
            monitors = {**pixels.measure(images), "latent_norm": norm}
        # A single transfer from the device.
        values = torch.stack(list(monitors.values())).cpu().unbind() if monitors else ()
        parts.append(Decoded(images.cpu(), dict(zip(monitors, values, strict=True))))
    return Decoded.concatenate(parts)
