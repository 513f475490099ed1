"""Measure the rollout against the bare transformer, and against sampling row by row.

    python benchmarks/executor.py [--rounds 5] [--prompts 2] [--branches 1]

Prints medians over rounds, each measured in this process one after the other:

    rows_of_bare_transformer     rows per second of the rollout : of the transformer in a loop with
                                 batches of the same size. Aim: at least 0.9.
    samples_of_published_loop    images per second of the rollout : of the loop of published code,
                                 which computes one row at a time. Aim: at least 5.
    latents_held, states         latents that the rollout holds at once, and rows of the tree
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from published import PublishedLoop

from flowgrain.config import load_config
from flowgrain.core.rollout import rollout
from flowgrain.core.sde import FlowSDE
from flowgrain.data import keyed_noise
from flowgrain.models import take
from flowgrain.training import Trainer

SETTINGS = {"method.granularities": [1, 2, 3], "rewards": ["oracle"], "evaluation.rewards": []}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument(
        "--branches",
        type=int,
        default=1,
        help="branches of every stochastic step in the loop. 12: as in the paper, but slow",
    )
    args = parser.parse_args()
    trainer = Trainer(load_config("g2rpo", SETTINGS), tempfile.mkdtemp())
    policy, backbone = trainer.policy, trainer.backbone
    cond = policy.encode([prompt.text for prompt in trainer.prompts[: args.prompts]])
    tree = trainer.config.tree().repeat(args.prompts)
    size = trainer.config.sampling.batch_size

    def velocity(x, sigma, prompt):
        return policy.sample_velocity(x, sigma, take(cond, prompt), 1.0)

    loop = PublishedLoop(trainer, branches=args.branches)
    noise = keyed_noise(backbone.latent_shape, 0)
    x, sigma = torch.randn(size, *backbone.latent_shape), torch.rand(size)
    row_cond = take(cond, torch.zeros(size, dtype=torch.long))
    row_ratios, image_ratios = [], []
    for number in range(args.rounds + 1):
        begin = time.perf_counter()
        result = rollout(tree, velocity, FlowSDE(), trainer.sigmas, noise, size)
        seconds = time.perf_counter() - begin
        rows, images = result.forward_passes / seconds, len(tree.leaves) / seconds
        begin = time.perf_counter()
        calls = result.forward_passes // size
        for _ in range(calls):
            backbone.velocity(policy.model, x, sigma, row_cond)
        bare_rows = calls * size / (time.perf_counter() - begin)
        begin = time.perf_counter()
        finished = sum(len(branch) for fan in loop.sample() for branch in fan.finished)
        loop_images = finished / (time.perf_counter() - begin)
        if number:  # the first round is a warm-up
            row_ratios.append(rows / bare_rows)
            image_ratios.append(images / loop_images)
            print(
                f"{rows:.0f} rows/s, bare transformer {bare_rows:.0f}; "
                f"{images:.1f} images/s, published loop {loop_images:.1f}",
                flush=True,
            )
    report = {
        "rows_of_bare_transformer": statistics.median(row_ratios),
        "samples_of_published_loop": statistics.median(image_ratios),
        "latents_held": len(result.latents),
        "states": len(tree),
        "megabytes_held": result.latents.nbytes / 1e6,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
