"""Measure the assumption of the forecast, and compare the forecast of a step with the step.

    python benchmarks/forecast.py [--device cuda] [--rows 128]

The assumption: in full batches the transformer reaches a fixed share of the device's rate of matrix
products. Matrix products, forward passes and steps are measured in turn, three times. Medians are
printed.
"""

import argparse
import statistics
import tempfile
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from flowgrain.config import load_config
from flowgrain.planning.plan import prompt_cost
from flowgrain.training import Trainer


def seconds_per_call(work, device: torch.device, repeats: int) -> float:
    """Mean time of `work`, after one call as a warm-up."""
    work()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=128)
    args = parser.parse_args()
    rows, device = args.rows, torch.device(args.device)
    settings = {"training.prompts_per_step": 2, "sampling.batch_size": rows}
    settings |= {"rewards": ["oracle"], "evaluation.rewards": [], "runtime.device": args.device}
    trainer = Trainer(load_config("g2rpo", settings), tempfile.mkdtemp())
    backbone, cost = trainer.backbone, prompt_cost(trainer.config)
    x = torch.randn(rows, *backbone.latent_shape, device=device)
    sigma = torch.full((rows,), 0.5, device=device)
    encoded = trainer.policy.encode(["two red circles"])
    cond = {name: value.expand(rows, *value.shape[1:]) for name, value in encoded.items()}

    @torch.no_grad()
    def forward():
        return backbone.velocity(backbone.transformer, x, sigma, cond)

    with FlopCounterMode(display=False) as counter:
        forward()
    flops = counter.get_total_flops()
    a, b = torch.randn(2048, 2048, device=device), torch.randn(2048, 2048, device=device)
    shares, stages = [], []
    for number in range(1, 4):
        matrix = 2 * 2048**3 / seconds_per_call(lambda: a @ b, device, 5)
        model = flops / seconds_per_call(forward, device, 5)
        shares.append((model / matrix, matrix, model))
        metrics = trainer.step(number)
        per_pass = 2 * flops / rows / model  # two prompts
        sampling = per_pass * cost.forward_passes
        update = per_pass * 3 * cost.train_forward_passes
        stages.append((metrics["seconds/sample"] / sampling, metrics["seconds/update"] / update))
    share, matrix, model = (statistics.median(column) for column in zip(*shares, strict=True))
    sampling, update = (statistics.median(column) for column in zip(*stages, strict=True))
    print(f"{flops / rows / 1e6:.1f} MFLOP per row")
    print(
        f"GFLOP/s: matrix products {matrix / 1e9:.0f}, model {model / 1e9:.0f}, share {share:.2f}"
    )
    print(f"G2RPO step, measured : forecast: sampling {sampling:.2f}, update {update:.2f}")


if __name__ == "__main__":
    main()
