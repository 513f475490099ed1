"""Small choices, each as a ratio of two ways by turns in this process, median of several.

    python benchmarks/pieces.py [--rounds 7]

AdamW plain : fused; the decoder of a large VAE in its usual layout : channels last; attention by PyTorch's fused kernel : step by
step, on the bundled model; a matrix product of the bundled model's size in bf16 : fp32; a checkpoint : a step. And a step before
and after glibc is told to keep memory (run it without MALLOC_... variables).
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowgrain import Run, recipe
from flowgrain.models import take
from flowgrain.distributed.process import keep_memory


def ratio(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of first / second."""
    first(), second()
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        found.append((middle - begin, time.perf_counter() - middle))
    a, b = (statistics.median(column) for column in zip(*found, strict=True))
    return a, b, statistics.median(x / y for x, y in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    s = recipe("g2rpo", rewards="oracle", eval_rewards=(), prompts_per_step=2)
    run = Run(s, tempfile.mkdtemp())
    model = run.policy.transformer
    steps = []
    for _ in range(2):  # the second time with memory that stays
        run.step(1)
        steps.append(statistics.median(run.step(2)["seconds"] for _ in range(3)))
        keep_memory()
    print(f"step, memory given back : kept: {steps[0]:.2f} s : {steps[1]:.2f} s = {steps[0] / steps[1]:.2f}", flush=True)

    def tell(what: str, first: Callable[[], object], second: Callable[[], object]) -> None:
        a, b, found = ratio(first, second, rounds)
        print(f"{what}: {1e3 * a:.2f} ms : {1e3 * b:.2f} ms = {found:.2f}", flush=True)

    def adamw(fused: bool) -> Callable[[], object]:
        weights = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
        for p in weights:
            p.grad = torch.randn_like(p)
        return torch.optim.AdamW(weights, fused=fused).step

    tell("AdamW, plain : fused", adamw(False), adamw(True))

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16,
        block_out_channels=(32, 64, 128, 128), norm_num_groups=8,
    ).eval()  # fmt: skip
    last = copy.deepcopy(vae).to(memory_format=torch.channels_last)
    latents = torch.randn(2, 16, 32, 32)
    rows = s.rows_per_pass
    x, sigma = torch.randn(rows, *run.backbone.latent_shape), torch.rand(rows)
    cond = take(run.policy.encode(run.prompts[:1]), torch.zeros(rows, dtype=torch.long))

    def forward(kernel: SDPBackend) -> Callable[[], object]:
        def work() -> None:
            with sdpa_kernel(kernel):
                run.policy.sample_velocity(x, sigma, cond, 1.0)

        return work

    with torch.no_grad():
        channels_last = latents.contiguous(memory_format=torch.channels_last)
        tell("VAE decoder, usual : channels last", lambda: vae.decode(latents), lambda: last.decode(channels_last))
    tell("forward, fused attention : by steps", forward(SDPBackend.FLASH_ATTENTION), forward(SDPBackend.MATH))
    a, b = torch.randn(33 * rows, 192), torch.randn(192, 768)
    a16, b16 = a.bfloat16(), b.bfloat16()
    tell("matrix product, bf16 : fp32", lambda: a16 @ b16, lambda: a @ b)
    rounds = 3
    tell("checkpoint : step", lambda: run.save(None), lambda: run.step(1))


if __name__ == "__main__":
    main()
