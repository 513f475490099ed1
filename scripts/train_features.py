"""Trains the net whose features measure image quality and diversity: it counts the things of every kind in a scene.

python scripts/train_features.py [--steps 1500] [--out src/flowgrain/shapes/weights]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from flowgrain.shapes.features import WEIGHTS, FeatureNet, diversity, features, frechet, true_features
from flowgrain.shapes.grammar import COLOURS, SHAPES, Scene, prompts
from flowgrain.shapes.render import render


def scenes(rng: np.random.Generator, count: int) -> tuple[list[Scene], torch.Tensor]:
    """Scenes of 0 to 4 things at random, and how many of every kind they hold, [count, kinds]."""
    drawn, counts = [], torch.zeros(count, len(COLOURS) * len(SHAPES))
    for i in range(count):
        things = [(int(rng.integers(len(COLOURS))), int(rng.integers(len(SHAPES)))) for _ in range(rng.integers(1, 5))]
        if rng.random() < 0.3:
            things = things[:1] * len(things)
        for colour, shape in things:
            counts[i, colour * len(SHAPES) + shape] += 1
        drawn.append(Scene(tuple(things)))
    return drawn, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng, net = np.random.default_rng(2), FeatureNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps, pct_start=0.1)
    begin = time.time()
    for step in range(1, args.steps + 1):
        drawn, counts = scenes(rng, 128)
        images = torch.from_numpy(render(drawn, rng))
        images = (images + 0.05 * torch.rand(128, 1, 1, 1) * torch.randn_like(images)).clamp(0, 1)  # generated images are not clean
        found = net.counts(net(images))
        loss = (found - counts).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == args.steps:
            right = (found.round() == counts).all(1).float().mean()
            print(f"{step} loss {loss.item():.3f} scenes counted right {right:.3f} {time.time() - begin:.0f}s", flush=True)
    save_file(net.state_dict(), args.out / "features.safetensors")
    held = list(prompts("held-out"))
    a, b = (true_features(held, seed) for seed in (0, 1))
    noisy = features(torch.rand(len(held), 3, 32, 32))
    print(f"frechet of two sets of true renderings {frechet(a, b):.4f}, of noise {frechet(a, noisy):.2f}")
    both = np.stack([a, b], 1).reshape(-1, a.shape[1])
    print(f"diversity of true renderings {diversity(both, 2):.3f}")


if __name__ == "__main__":
    main()
