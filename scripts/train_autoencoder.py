"""Train the autoencoder of the shapes world: images of 32x32 pixels to latents [4, 8, 8] and back.

python scripts/train_autoencoder.py [--steps 6000] [--out src/flowgrain/shapes/weights/vae]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from flowgrain.models.shapes import WEIGHTS
from flowgrain.shapes.grammar import COLORS, SHAPES, Scene, parse, prompts
from flowgrain.shapes.oracle import judge
from flowgrain.shapes.render import MAX_OBJECTS, render

WARMUP_STEPS = 200


def random_scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes of 0 to MAX_OBJECTS - 1 random objects. They are more general than the grammar."""

    def random_object() -> tuple[int, int]:
        return int(rng.integers(len(COLORS))), int(rng.integers(len(SHAPES)))

    sizes = (rng.integers(0, MAX_OBJECTS) for _ in range(count))
    return [Scene(tuple(random_object() for _ in range(size))) for size in sizes]


def build_autoencoder() -> AutoencoderTiny:
    """The autoencoder with random weights."""
    return AutoencoderTiny(
        encoder_block_out_channels=(24, 24, 24),
        decoder_block_out_channels=(24, 24, 24),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=4,
    )


def warmup_and_decay(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A linear warm-up, then a cosine decay to 2e-5."""
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=WARMUP_STEPS)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, steps - WARMUP_STEPS, eta_min=2e-5
    )
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [WARMUP_STEPS])


def reconstruction_loss(vae: AutoencoderTiny, x: Tensor) -> Tensor:
    """Squared and absolute error of images x [I, 3, 32, 32] in 0..1, and a penalty on latents.

    Noise on the latents makes the latent space smooth for the flow model.
    """
    z = vae.encoder(x * 2 - 1)  # EncoderTiny expects -1..1
    z = z + 0.1 * torch.randn_like(z)
    y = vae.decoder(z) / 2 + 0.5
    return F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 1e-4 * z.square().mean()


@torch.no_grad()
def evaluate(vae: AutoencoderTiny, images: Tensor, texts: list[str]) -> tuple[str, Tensor]:
    """Reconstruction of held-out `images`: a line to print, and the latents."""
    z = vae.encoder(images * 2 - 1)
    y = (vae.decoder(z) / 2 + 0.5).clamp(0, 1)
    error, score = F.mse_loss(y, images).item(), judge(y.numpy(), texts)[0].mean()
    line = f"mse {error:.5f} oracle {score:.3f} latent mean {z.mean():.3f} std {z.std():.3f}"
    return line, z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--out", type=Path, default=WEIGHTS / "vae")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    vae = build_autoencoder().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = warmup_and_decay(optimizer, args.steps)
    held_out = list(prompts("held-out"))
    images = torch.from_numpy(render([parse(p) for p in held_out], np.random.default_rng(1)))
    begin = time.time()
    for step in range(1, args.steps + 1):
        x = torch.from_numpy(render(random_scenes(32, rng), rng))
        loss = reconstruction_loss(vae, x.to(memory_format=torch.channels_last))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == args.steps:
            line, z = evaluate(vae, images, held_out)
            print(f"{step} loss {loss:.5f} {line} {time.time() - begin:.0f}s", flush=True)
            vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
            vae.save_pretrained(args.out)


if __name__ == "__main__":
    main()
