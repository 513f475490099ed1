"""Compare sampling with diffusers' own pipeline on the same model, noise and steps.

    python benchmarks/peer.py [--rounds 5] [--images 64]

The bundled transformer runs in a StableDiffusion3Pipeline with 16 steps and latents as output, once
image by image, as published training code samples, and once in a single batch.
"""

import argparse
import json
import statistics
import tempfile
import time

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from flowgrain.config import load_config
from flowgrain.core.rollout import rollout
from flowgrain.core.sde import ODE
from flowgrain.core.tree import Planner
from flowgrain.models import Conditioning, take
from flowgrain.training import Trainer

ABSENT = (
    *("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    *("text_encoder_3", "tokenizer_3", "image_encoder"),
)


class Peer:
    """The bundled model in diffusers' pipeline."""

    def __init__(self, trainer: Trainer) -> None:
        shift = trainer.config.sampling.shift
        self.pipe = StableDiffusion3Pipeline(
            transformer=trainer.backbone.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            **dict.fromkeys(ABSENT),
        )
        self.pipe.set_progress_bar_config(disable=True)
        steps = trainer.config.sampling.num_steps
        self.sigmas = (1 - np.arange(steps) / steps).tolist()  # the pipeline shifts them itself

    def sample(self, cond: Conditioning, noise: Tensor, size: int) -> Tensor:
        """Latents from initial latents `noise`, `size` images per call."""
        height, width = 8 * noise.shape[2], 8 * noise.shape[3]
        parts = [
            self.pipe(
                prompt_embeds=cond["words"][i : i + size],
                pooled_prompt_embeds=cond["pooled"][i : i + size],
                latents=noise[i : i + size],
                height=height,
                width=width,
                sigmas=self.sigmas,
                guidance_scale=1.0,
                output_type="latent",
            ).images
            for i in range(0, len(noise), size)
        ]
        return torch.cat(parts)


def sample(trainer: Trainer, cond: Conditioning, noise: Tensor) -> Tensor:
    """Latents from initial latents `noise`, by flowgrain's rollout in one batch."""
    planner = Planner(trainer.config.sampling.num_steps)
    planner.image(planner.ode(planner.root()))
    tree = planner.tree().repeat(len(noise))

    def velocity(x, sigma, prompt):
        return trainer.policy.sample_velocity(x, sigma, take(cond, prompt), 1.0)

    def initial(prompt, _draw):
        return noise[torch.from_numpy(prompt)]

    result = rollout(tree, velocity, ODE(), trainer.sigmas, initial, len(noise))
    return result.at(tree.leaves)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args()
    settings = {"rewards": ["oracle"], "evaluation.rewards": []}
    trainer = Trainer(load_config("g2rpo", settings), tempfile.mkdtemp())
    prompts = [trainer.prompts[i % len(trainer.prompts)] for i in range(args.images)]
    cond = trainer.policy.encode([prompt.text for prompt in prompts])
    noise = torch.randn(args.images, *trainer.backbone.latent_shape)
    peer, sizes = Peer(trainer), {"one by one": 1, "in a batch": args.images}
    ratios: dict[str, list[float]] = {name: [] for name in sizes}
    difference = 0.0
    for number in range(args.rounds + 1):
        begin = time.perf_counter()
        own = sample(trainer, cond, noise)
        seconds = time.perf_counter() - begin
        for name, size in sizes.items():
            begin = time.perf_counter()
            latents = peer.sample(cond, noise, size)
            if number:  # the first round is a warm-up
                ratios[name].append((time.perf_counter() - begin) / seconds)
            difference = max(difference, float((own - latents).abs().max()))
    medians = {name: round(statistics.median(values), 2) for name, values in ratios.items()}
    report = {"images/s, flowgrain : pipeline": medians, "largest difference": difference}
    print(json.dumps({**report, "rounds": args.rounds}))


if __name__ == "__main__":
    main()
