"""The forecast's one assumption, measured here: which share of the machine's matrix rate the transformer reaches in full batches.
And what the forecast then says of a step, beside the step.

    python benchmarks/forecast.py [--device cuda]

Matrix products, forward passes and steps by turns in one process, three times; medians.
"""

import argparse
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from flowgrain import Run, recipe
from flowgrain.methods.algorithms import build, price
from flowgrain.distributed.process import keep_memory


def seconds(work, device: torch.device, repeats: int) -> float:
    work()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


@torch.no_grad()
def main() -> None:
    keep_memory()
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=128)
    given = parser.parse_args()
    device = torch.device(given.device)
    s = recipe("g2rpo", rewards="oracle", eval_rewards=(), prompts_per_step=2, rows_per_pass=given.rows, device=given.device)
    run = Run(s, "/tmp/flowgrain-forecast")
    backbone, cost = run.backbone, price(build(s), s)
    x = torch.randn(given.rows, *backbone.latent_shape, device=device)
    sigma = torch.full((given.rows,), 0.5, device=device)
    cond = {name: value.expand(given.rows, *value.shape[1:]) for name, value in backbone.encode(["two red circles"]).items()}
    with FlopCounterMode(display=False) as counter:
        backbone.velocity(backbone.transformer, x, sigma, cond)
    flops = counter.get_total_flops()
    a, b = torch.randn(2048, 2048, device=device), torch.randn(2048, 2048, device=device)
    shares, steps = [], []
    for number in range(1, 4):
        matrix = 2 * 2048**3 / seconds(lambda: a @ b, device, 5)
        passes = flops / seconds(lambda: backbone.velocity(backbone.transformer, x, sigma, cond), device, 5)
        shares.append((passes / matrix, matrix, passes))
        with torch.enable_grad():
            metrics = run.step(number)
        forecast = [
            s.prompts_per_step * n * flops / given.rows / passes for n in (cost.forward_passes, 3 * cost.train_forward_passes)
        ]
        steps.append((metrics["seconds/sample"] / forecast[0], metrics["seconds/update"] / forecast[1]))
    share, matrix, passes = (statistics.median(column) for column in zip(*shares, strict=True))
    sampling, update = (statistics.median(column) for column in zip(*steps, strict=True))
    print(
        f"{flops / given.rows / 1e6:.1f} MFLOP a row, {matrix / 1e9:.0f} GFLOP/s in products, {passes / 1e9:.0f} here: {share:.2f}"
    )
    print(f"a step of G2RPO, measured over forecast at that rate: sampling {sampling:.2f}, update {update:.2f}")


if __name__ == "__main__":
    main()
