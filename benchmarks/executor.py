"""Two ratios, each against something run beside it in this process, median of several rounds.

1. executor rows/s : the bare transformer called in a loop at the same pass size (aim: at least 0.9)
2. rows needed for the same samples: our executor's samples/s : a loop as published code is written, batch 1, one forward a
   branch at the noise step, every granularity on its own (aim: at least 5)

3. latents held at once : states of the tree

python benchmarks/executor.py [--rounds 5] [--prompts 2] [--branches 12]
"""

import argparse
import itertools
import json
import statistics
import time

import torch

from flowgrain import recipe
from flowgrain.algorithms import build, plan_tree
from flowgrain.backbones import take
from flowgrain.process import keep_memory
from flowgrain.prompts import keyed_noise
from flowgrain.rollout import rollout
from flowgrain.sde import ODE, FlowSDE, Step
from flowgrain.train import Run
from flowgrain.tree import coarse_levels


def published_loop(run: Run, cond: dict, steps: int, sigmas: torch.Tensor, branches: int) -> int:
    """`branches` branches of the noise steps of one prompt, one row at a time, nothing shared. Returns the number of images."""
    s, backbone, model = run.settings, run.backbone, run.policy.transformer
    one = take(cond, torch.tensor([0]))

    def go(x: torch.Tensor, start: int, end: int, kernel) -> torch.Tensor:
        v = backbone.velocity(model, x, sigmas[[start]], one)
        law = kernel(x, v, Step.on(sigmas, torch.tensor([start]), torch.tensor([end])))
        return law.sample(torch.randn_like(x))

    images = 0
    x = torch.randn(1, *backbone.latent_shape)
    for k in range(steps):
        for _ in range(branches):
            branch = go(x, k, k + 1, FlowSDE())
            for stride in s.granularities:
                levels, y = coarse_levels(k + 1, s.num_steps, stride), branch
                for start, end in itertools.pairwise(levels):
                    y = go(y, start, end, ODE())
                images += 1
        x = go(x, k, k + 1, ODE())
    return images


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument(
        "--branches", type=int, default=1, help="of each noise step in the loop: 12 is the paper's, 1 a fair sample of it"
    )
    args = parser.parse_args()
    keep_memory()
    s = recipe("g2rpo", granularities="1,2,3", rewards="oracle", eval_rewards=())
    run = Run(s)
    cond = run.policy.encode(run.prompts[: args.prompts])
    tree = plan_tree(build(s), s).repeat(args.prompts)
    size = s.rows_per_pass

    def velocity(x, sigma, prompt):
        return run.policy.sample_velocity(x, sigma, take(cond, prompt), 1.0)

    noise = keyed_noise(run.backbone.latent_shape, 0)
    bare_x, bare_sigma = torch.randn(size, *run.backbone.latent_shape), torch.rand(size)
    bare_cond = take(cond, torch.zeros(size, dtype=torch.long))
    of_bare, of_loop = [], []
    for number in range(args.rounds + 1):
        begin = time.perf_counter()
        result = rollout(tree, velocity, FlowSDE(), run.sigmas, noise, size)
        ours = result.forward_passes / (time.perf_counter() - begin)
        images = len(tree.leaves) / (time.perf_counter() - begin)
        begin = time.perf_counter()
        calls = result.forward_passes // size
        for _ in range(calls):
            run.backbone.velocity(run.policy.transformer, bare_x, bare_sigma, bare_cond)
        bare = calls * size / (time.perf_counter() - begin)
        begin = time.perf_counter()
        loop = published_loop(run, cond, 8, run.sigmas, args.branches) / (time.perf_counter() - begin)
        if number:  # the first round warms up
            of_bare.append(ours / bare)
            of_loop.append(images / loop)
            print(f"{ours:.0f} rows/s, bare {bare:.0f}; {images:.1f} samples/s, published loop {loop:.1f}", flush=True)
    print(
        json.dumps(
            {
                "rows_of_bare_transformer": statistics.median(of_bare),
                "samples_of_published_loop": statistics.median(of_loop),
                "latents_held": len(result.latents),
                "states": len(tree),
                "megabytes_held": result.latents.nbytes / 1e6,
                "rounds": args.rounds,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
