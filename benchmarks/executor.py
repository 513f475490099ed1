"""Two ratios, each against something run beside it in this process, median of several rounds.

1. executor rows/s : the bare transformer called in a loop at the same pass size (aim: at least 0.9)
2. rows needed for the same samples: our executor's samples/s : a loop as published code is written, batch 1, one forward a
   branch at the noise step, every granularity on its own (aim: at least 5)

3. latents held at once : states of the tree

python benchmarks/executor.py [--rounds 5] [--prompts 2] [--branches 12]
"""

import argparse
import json
import statistics
import time

import torch
from published import Published

from flowgrain import recipe
from flowgrain.methods.algorithms import build, plan_tree
from flowgrain.models import take
from flowgrain.distributed.process import keep_memory
from flowgrain.data import keyed_noise
from flowgrain.core.rollout import rollout
from flowgrain.core.sde import FlowSDE
from flowgrain.training.trainer import Run


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

    loop_of = Published(run, branches=args.branches)
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
        loop = sum(len(one) for step in loop_of.sample() for one in step.finished) / (time.perf_counter() - begin)
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
