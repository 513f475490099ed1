"""Train the base model of the shapes world by flow matching, and stop at a moderate score.

python scripts/train_base.py [--stop-at 0.44] [--out src/flowgrain/shapes/weights]
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from flowgrain.core.sde import sigma_grid
from flowgrain.models.shapes import WEIGHTS, ShapesBackbone, WordTable, build_transformer
from flowgrain.shapes.grammar import parse, prompts, tokenize
from flowgrain.shapes.oracle import judge
from flowgrain.shapes.render import render


@torch.no_grad()
def oracle_score(
    model: ShapesBackbone, transformer: nn.Module, count: int = 256, steps: int = 16
) -> float:
    """Mean oracle score of `count` validation prompts, sampled with `steps` ODE steps."""
    chosen = list(prompts("validation"))[:count]
    cond, sigmas = model.encode(chosen), sigma_grid(steps)
    x = torch.randn(len(chosen), *model.latent_shape, generator=torch.Generator().manual_seed(1))
    for i in range(steps):
        v = model.velocity(transformer, x, sigmas[i].expand(len(x)), cond)
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    return float(judge(model.decode(x).numpy(), chosen)[0].mean())


def encode_scenes(
    vae: AutoencoderTiny, count: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens [count, 6] of training prompts, and latents [count, 4, 8, 8] of a scene of each."""
    chosen = [prompts("train")[i] for i in rng.integers(len(prompts("train")), size=count)]
    latents = []
    for i in range(0, count, 512):
        images = torch.from_numpy(render([parse(p) for p in chosen[i : i + 512]], rng))
        with torch.no_grad():
            z = vae.encode(images.to(memory_format=torch.channels_last) * 2 - 1).latents
        latents.append((z - vae.config["shift_factor"]) * vae.config["scaling_factor"])
    return torch.tensor([tokenize(p) for p in chosen]), torch.cat(latents).contiguous()


def flow_matching_loss(
    model: ShapesBackbone, transformer: nn.Module, words: WordTable, tokens: Tensor, x0: Tensor
) -> Tensor:
    """Squared error of the velocity at random noise levels. A tenth of the rows has no prompt."""
    tokens = torch.where(torch.rand(len(x0), 1) < 0.1, 0, tokens)
    embedded = words(tokens)
    sigma = torch.sigmoid(torch.randn(len(x0)) + 0.6)
    noise = torch.randn_like(x0)
    s = sigma[:, None, None, None]
    cond = {"words": embedded, "pooled": embedded.mean(1)}
    v = model.velocity(transformer, (1 - s) * x0 + s * noise, sigma, cond)
    return (v - (noise - x0)).square().mean()


def train(args: argparse.Namespace, rng: np.random.Generator, vae: Any) -> None:
    """Train until the validation score reaches `args.stop_at`, and save the EMA weights."""
    transformer, words = build_transformer(), WordTable()
    model = ShapesBackbone(transformer, words, vae)
    begin = time.time()
    tokens, latents = encode_scenes(vae, args.scenes, rng)
    print(
        f"{args.scenes} scenes in {time.time() - begin:.0f}s, std {latents.std():.3f}", flush=True
    )
    words.requires_grad_(True)
    both = nn.ModuleList([transformer, words])
    parameters = [*transformer.parameters(), *words.parameters()]
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f}M parameters")
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=200)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    ema = torch.optim.swa_utils.AveragedModel(both, multi_avg_fn=average)
    begin = time.time()
    for step in range(1, args.steps + 1):
        chosen = torch.from_numpy(rng.integers(len(tokens), size=args.batch))
        loss = flow_matching_loss(model, transformer, words, tokens[chosen], latents[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(both)
        if step % 200 == 0:
            averaged = ShapesBackbone(*ema.module, vae)
            score = oracle_score(averaged, averaged.transformer)
            seconds = time.time() - begin
            print(f"{step} loss {loss:.4f} oracle {score:.3f} {seconds:.0f}s", flush=True)
            if step % 400 == 0 or score >= args.stop_at:
                averaged.save(args.out)
            if score >= args.stop_at:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument(
        "--stop-at",
        type=float,
        default=0.44,
        help="stop at this oracle score of validation prompts",
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--scenes", type=int, default=30000, help="training scenes")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    train(args, np.random.default_rng(0), AutoencoderTiny.from_pretrained(args.out / "vae"))


if __name__ == "__main__":
    main()
