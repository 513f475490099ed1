"""How well cheap candidates rank the exact samples of a group, by method and number of steps.

The model before training, 36 candidates, 12 exact samples, T = 8. Nothing is trained. Prints a
table in Markdown as it goes.

    python benchmarks/explore.py --steps 3 --rounds 4
"""

import argparse
import math
import tempfile

import numpy as np
import torch

from flowgrain import Trainer, load_config
from flowgrain.planning.plan import candidates_cost, prompt_cost

METHODS = {
    "diffusionnft": ("diffusionnft", {}),
    "g2rpo": ("g2rpo", {}),
    "dancegrpo": ("dancegrpo", {}),
    "mixgrpo, window of 2": ("mixgrpo", {"method.window_size": 2}),
    "flow_grpo": ("flow_grpo", {}),
    "flow_grpo, eta=0.2": ("flow_grpo", {"method.eta": 0.2}),
    "flow_grpo, noise at step 0": ("flow_grpo", {"method.sde_steps": [0]}),
    "flow_grpo, noise at step 4": ("flow_grpo", {"method.sde_steps": [4]}),
}
SHARED = {
    "sampling.num_steps": 8,
    "sampling.explore.candidates": 36,
    "method.group_size": 12,
    "method.kl_weight": 0.0,
    "training.prompts_per_step": 4,
    "evaluation.every": 0,
    "evaluation.rewards": [],
    "rewards": ["towers"],
    "runtime.threads": 1,
}


def main() -> None:
    """Print one line per method and number of steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", default="2,3,4,8", help="ODE steps of a candidate.")
    parser.add_argument("--rounds", type=int, default=3, help="Training steps that are sampled.")
    options = parser.parse_args()
    print(
        "| Method | Steps | Spearman | Best above the median | Passes of candidates : of samples |"
    )
    print("| --- | --- | --- | --- | --- |", flush=True)
    for label, (method, own) in METHODS.items():
        for steps in map(int, options.steps.split(",")):
            changes = {**SHARED, **own, "sampling.explore.num_steps": steps}
            config = load_config(method, changes)
            torch.manual_seed(0)
            with tempfile.TemporaryDirectory() as folder:
                collector = Trainer(config, folder).collector
                found = [collector.collect(n).metrics for n in range(1, options.rounds + 1)]
            spearman, above = (
                np.array([metrics[f"explore/{name}"] for metrics in found])
                for name in ("spearman", "best_above_median")
            )
            more = candidates_cost(config, config.tree()).forward_passes
            ratio = more / (prompt_cost(config).forward_passes - more)
            error = spearman.std(ddof=1) / math.sqrt(len(spearman))
            print(
                f"| {label} | {steps} | {spearman.mean():.2f} ± {error:.2f} | {above.mean():.2f} "
                f"| {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
