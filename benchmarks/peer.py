"""Our sampling beside diffusers' own pipeline on the same model, noise and steps: what every fork's rollout is built on.

    python benchmarks/peer.py [--rounds 5] [--images 64]

The bundled transformer in a StableDiffusion3Pipeline, 16 steps, latents out: once image by image as the forks sample, once in a
batch.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from flowgrain import recipe
from flowgrain.models import take
from flowgrain.distributed.process import keep_memory
from flowgrain.core.rollout import rollout
from flowgrain.core.sde import ODE
from flowgrain.training.trainer import Run
from flowgrain.core.tree import Planner


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    given = parser.parse_args()
    keep_memory()
    run = Run(recipe("g2rpo", eval_rewards=(), rewards="oracle"), "/tmp/flowgrain-peer")
    steps, count, shape = run.settings.num_steps, given.images, run.backbone.latent_shape
    prompts = [run.prompts[i % len(run.prompts)] for i in range(count)]
    cond = run.policy.encode(prompts)
    noise = torch.randn(count, *shape)
    parts = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "image_encoder")
    )
    pipe = StableDiffusion3Pipeline(
        transformer=run.backbone.transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=run.settings.shift), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    sigmas = (1 - np.arange(steps) / steps).tolist()  # ours; the pipeline shifts them itself

    def peer(size: int) -> torch.Tensor:
        found = []
        for i in range(0, count, size):
            one = slice(i, i + size)
            found.append(
                pipe(
                    prompt_embeds=cond["words"][one], pooled_prompt_embeds=cond["pooled"][one], latents=noise[one],
                    height=8 * shape[1], width=8 * shape[2], sigmas=sigmas, guidance_scale=1.0, output_type="latent",
                ).images
            )  # fmt: skip
        return torch.cat(found)

    planner = Planner(steps)
    planner.image(planner.ode(planner.root()))
    tree = planner.tree().repeat(count)

    def ours() -> torch.Tensor:
        def velocity(x, sigma, prompt):
            return run.policy.sample_velocity(x, sigma, take(cond, prompt), 1.0)

        found = rollout(tree, velocity, ODE(), run.sigmas, lambda prompt, _: noise[torch.from_numpy(prompt)], count)
        return found.at(tree.leaves)

    ratios: dict[str, list[float]] = {"one by one": [], "in a batch": []}
    difference = 0.0
    for number in range(given.rounds + 1):
        begin = time.perf_counter()
        own = ours()
        seconds = time.perf_counter() - begin
        for name, size in (("one by one", 1), ("in a batch", count)):
            begin = time.perf_counter()
            theirs = peer(size)
            if number:  # the first round warms up
                ratios[name].append((time.perf_counter() - begin) / seconds)
            difference = max(difference, float((own - theirs).abs().max()))
    medians = {name: round(statistics.median(found), 2) for name, found in ratios.items()}
    print(json.dumps({"our images/s over the pipeline's": medians, "latents differ by": difference, "rounds": given.rounds}))


if __name__ == "__main__":
    main()
