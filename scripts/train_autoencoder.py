"""Trains the autoencoder of the shapes world: 32x32 images to 8x8 latents of 4 channels and back.

python scripts/train_autoencoder.py [--steps 6000] [--out src/flowgrain/shapes/weights/vae]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from flowgrain.shapes.grammar import COLOURS, SHAPES, Scene, parse, prompts
from flowgrain.shapes.oracle import judge
from flowgrain.shapes.render import MAX_OBJECTS, render


def random_scenes(n: int, rng: np.random.Generator) -> list[Scene]:
    """n scenes of 0 to MAX_OBJECTS objects, so that the code space is not tied to the grammar."""

    def thing() -> tuple[int, int]:
        return int(rng.integers(len(COLOURS))), int(rng.integers(len(SHAPES)))

    return [Scene(tuple(thing() for _ in range(rng.integers(0, MAX_OBJECTS)))) for _ in range(n)]


def build() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(24, 24, 24),
        decoder_block_out_channels=(24, 24, 24),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=4,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--out", type=Path, default=Path("src/flowgrain/shapes/weights/vae"))
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    vae = build().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=200)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps - 200, eta_min=2e-5)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], [200])
    held_out = list(prompts("held-out"))
    true = torch.from_numpy(render([parse(p) for p in held_out], np.random.default_rng(1)))
    begin = time.time()
    for step in range(1, args.steps + 1):
        x = torch.from_numpy(render(random_scenes(32, rng), rng)).to(memory_format=torch.channels_last)
        z = vae.encoder(x * 2 - 1)  # EncoderTiny expects -1..1
        z = z + 0.1 * torch.randn_like(z)  # a little noise keeps the latent space smooth for the flow model
        y = vae.decoder(z) / 2 + 0.5
        loss = F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 1e-4 * z.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            with torch.no_grad():
                z = vae.encoder(true * 2 - 1)
                y = (vae.decoder(z) / 2 + 0.5).clamp(0, 1)
            score = judge(y.numpy(), held_out)[0].mean()
            print(
                f"{step} loss {loss.item():.5f} mse {F.mse_loss(y, true).item():.5f} oracle {score:.3f} "
                f"latent mean {z.mean().item():.3f} std {z.std().item():.3f} {time.time() - begin:.0f}s",
                flush=True,
            )
            vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
            vae.save_pretrained(args.out)


if __name__ == "__main__":
    main()
