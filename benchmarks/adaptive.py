"""How many groups have a spread, and what they cost, with and without adaptive groups.

The model before training, a reward of 0 or 1 (whether the image shows everything that the prompt
names), 12 samples per group, T = 8. Nothing is trained. Prints a table in Markdown as it goes.

    python benchmarks/adaptive.py --rounds 4
"""

import argparse
import math
import tempfile

import numpy as np
import torch

from flowgrain import Trainer, load_config
from flowgrain.rewards.shapes import Oracle

METHODS = ("diffusionnft", "flow_grpo")
PROBES = (0, 4, 6, 8)
SHARED = {
    "sampling.num_steps": 8,
    "method.group_size": 12,
    "method.kl_weight": 0.0,
    "training.prompts_per_step": 12,
    "evaluation.every": 0,
    "evaluation.rewards": [],
    "rewards": ["solved"],
    "runtime.threads": 1,
    "watch.action": "off",
}


def main() -> None:
    """Print one line per method and size of the probe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="Training steps that are sampled.")
    options = parser.parse_args()
    oracle = Oracle()

    def solved(images, prompts):
        return torch.from_numpy((oracle(images, prompts) > 0.99).astype(np.float32))

    print("| Method | Probe | Groups with spread | Passes : plain | With spread per pass : plain |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for method in METHODS:
        plain = (math.nan, math.nan)
        for probe in PROBES:
            config = load_config(method, {**SHARED, "training.adaptive_groups.probe": probe})
            with tempfile.TemporaryDirectory() as folder:
                collector = Trainer(config, folder, rewards={"solved": solved}).collector
                batches = [collector.collect(n) for n in range(1, options.rounds + 1)]
            values = torch.cat([batch.scores["solved"].values.reshape(-1, 12) for batch in batches])
            share = float((values.std(1) > 0).float().mean())
            passes = sum(batch.rollout.forward_passes for batch in batches)
            if not probe:
                plain = (share, passes)
            gain = share / plain[0] / (passes / plain[1])
            print(
                f"| {method} | {probe or 'off'} | {share:.2f} of {len(values)} | "
                f"{passes / plain[1]:.2f} | {gain:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
