"""Trains the base flow model of the shapes world by flow matching, and stops early on purpose.

python scripts/train_base.py [--minutes 12] [--stop-at 0.45] [--out src/flowgrain/shapes/weights]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

from flowgrain.models.shapes import WEIGHTS, ShapesBackbone, WordTable, build_transformer
from flowgrain.core.sde import sigma_grid
from flowgrain.shapes.grammar import parse, prompts, tokenize
from flowgrain.shapes.oracle import judge
from flowgrain.shapes.render import render


@torch.no_grad()
def oracle_score(model: ShapesBackbone, transformer: torch.nn.Module, count: int = 256, steps: int = 16) -> float:
    """Mean oracle score of `count` validation prompts sampled with `steps` ODE steps."""
    chosen = list(prompts("validation"))[:count]
    cond, sigmas = model.encode(chosen), sigma_grid(steps)
    x = torch.randn(len(chosen), *model.latent_shape, generator=torch.Generator().manual_seed(1))
    for i in range(steps):
        x = x + (sigmas[i + 1] - sigmas[i]) * model.velocity(transformer, x, sigmas[i].expand(len(x)), cond)
    return float(judge(model.decode(x).numpy(), chosen)[0].mean())


def encode_scenes(vae: AutoencoderTiny, number: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [number, 6] of training prompts and the latents [number, 4, 8, 8] of a scene for each."""
    chosen = [prompts("train")[i] for i in rng.integers(len(prompts("train")), size=number)]
    latents = []
    for i in range(0, number, 512):
        images = torch.from_numpy(render([parse(p) for p in chosen[i : i + 512]], rng))
        with torch.no_grad():
            z = vae.encode(images.to(memory_format=torch.channels_last) * 2 - 1).latents
        latents.append((z - vae.config["shift_factor"]) * vae.config["scaling_factor"])
    return torch.tensor([tokenize(p) for p in chosen]), torch.cat(latents).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--stop-at", type=float, default=0.44, help="stop once the validation oracle score reaches this")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--scenes", type=int, default=30000)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    vae = AutoencoderTiny.from_pretrained(args.out / "vae")
    transformer, words = build_transformer(), WordTable()
    model = ShapesBackbone(transformer, words, vae)
    begin = time.time()
    tokens, latents = encode_scenes(vae, args.scenes, rng)
    print(f"encoded {args.scenes} scenes in {time.time() - begin:.0f}s, std {latents.std():.3f}", flush=True)
    words.requires_grad_(True)
    parameters = [*transformer.parameters(), *words.parameters()]
    print(f"{sum(p.numel() for p in parameters) / 1e6:.2f}M parameters")
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=200)
    ema = torch.optim.swa_utils.AveragedModel(
        torch.nn.ModuleList([transformer, words]), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    begin = time.time()
    for step in range(1, args.steps + 1):
        pick = torch.from_numpy(rng.integers(len(tokens), size=args.batch))
        batch_tokens, x0 = tokens[pick], latents[pick]
        batch_tokens = torch.where(torch.rand(len(pick), 1) < 0.1, 0, batch_tokens)  # some rows unconditional, for guidance
        embedded = words(batch_tokens)
        sigma = torch.sigmoid(torch.randn(len(pick)) + 0.6)
        noise = torch.randn_like(x0)
        s = sigma[:, None, None, None]
        v = model.velocity(transformer, (1 - s) * x0 + s * noise, sigma, {"words": embedded, "pooled": embedded.mean(1)})
        loss = (v - (noise - x0)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(torch.nn.ModuleList([transformer, words]))
        if step % 200 == 0:
            averaged, averaged_words = ema.module
            average = ShapesBackbone(averaged, averaged_words, vae)
            score = oracle_score(average, averaged)
            print(f"{step} loss {loss.item():.4f} oracle {score:.3f} {time.time() - begin:.0f}s", flush=True)
            if step % 400 == 0 or score >= args.stop_at:
                average.save(args.out)
            if score >= args.stop_at:
                break


if __name__ == "__main__":
    main()
