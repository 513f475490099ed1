"""Train the network whose features measure image quality and diversity. It counts objects.

python scripts/train_features.py [--steps 1500] [--out src/flowgrain/shapes/weights]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowgrain.shapes.features import (
    WEIGHTS,
    FeatureNet,
    diversity,
    features,
    frechet,
    true_features,
)
from flowgrain.shapes.grammar import COLORS, SHAPES, Scene, prompts
from flowgrain.shapes.render import render


def random_scenes(rng: np.random.Generator, count: int) -> tuple[list[Scene], Tensor]:
    """Scenes of 1 to 4 random objects, and how many of every kind they contain [count, kinds].

    In three of ten scenes all objects are equal.
    """
    scenes, counts = [], torch.zeros(count, len(COLORS) * len(SHAPES))
    for i in range(count):
        objects = [
            (int(rng.integers(len(COLORS))), int(rng.integers(len(SHAPES))))
            for _ in range(rng.integers(1, 5))
        ]
        if rng.random() < 0.3:
            objects = objects[:1] * len(objects)
        for color, shape in objects:
            counts[i, color * len(SHAPES) + shape] += 1
        scenes.append(Scene(tuple(objects)))
    return scenes, counts


def train(steps: int, out: Path) -> None:
    """Train to predict the counts, with the squared error."""
    rng, net = np.random.default_rng(2), FeatureNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    begin = time.time()
    for step in range(1, steps + 1):
        scenes, counts = random_scenes(rng, 128)
        images = torch.from_numpy(render(scenes, rng))
        noise = 0.05 * torch.rand(128, 1, 1, 1) * torch.randn_like(images)
        images = (images + noise).clamp(0, 1)  # generated images are noisy too
        predicted = net.counts(net(images))
        loss = (predicted - counts).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            correct = (predicted.round() == counts).all(1).float().mean()
            seconds = time.time() - begin
            print(f"{step} loss {loss:.3f} correct {correct:.3f} {seconds:.0f}s", flush=True)
    save_file(net.state_dict(), out / "features.safetensors")


def print_quality(folder: Path) -> None:
    """Print the distances and the diversity of true renderings and of noise."""
    texts = list(prompts("held-out"))
    first, second = (true_features(texts, seed) for seed in (0, 1))
    noise = features(torch.rand(len(texts), 3, 32, 32), folder)
    print(f"frechet: two sets of true renderings {frechet(first, second):.4f}, ", end="")
    print(f"true renderings and noise {frechet(first, noise):.2f}")
    pairs = np.stack([first, second], 1).reshape(-1, first.shape[1])
    print(f"diversity of true renderings {diversity(pairs, 2):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    train(args.steps, args.out)
    print_quality(args.out)


if __name__ == "__main__":
    main()
