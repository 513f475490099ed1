"""Compare alternatives for small parts. Both run in turn in one process. Prints medians.

python benchmarks/pieces.py [--rounds 7]

AdamW                   plain : fused
VAE decoder             default memory layout : channels last
attention               PyTorch's fused kernel : step by step, on the bundled model
matrix product          bfloat16 : float32, at the size of the bundled model
checkpoint              writing a checkpoint : a training step
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowgrain.config import load_config
from flowgrain.models import take
from flowgrain.training import Trainer

Work = Callable[[], object]


def compare(title: str, first: Work, second: Work, rounds: int) -> None:
    """Print the median milliseconds of both, and the median of first / second."""
    first(), second()  # a warm-up
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        times.append((middle - begin, time.perf_counter() - middle))
    a, b = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(x / y for x, y in times)
    print(f"{title}: {a:.2f} ms : {b:.2f} ms = {ratio:.2f}", flush=True)


def adamw_step(model: nn.Module, fused: bool) -> Work:
    """An AdamW step on copies of the parameters of `model`."""
    parameters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW(parameters, fused=fused).step


def decoders() -> tuple[Work, Work]:
    """Decoding by a VAE in the default memory layout, and with channels last."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        block_out_channels=(32, 64, 128, 128),
        norm_num_groups=8,
    ).eval()
    last_vae = copy.deepcopy(vae).to(memory_format=torch.channels_last)
    latents = torch.randn(2, 16, 32, 32)
    last = latents.contiguous(memory_format=torch.channels_last)
    return torch.no_grad()(lambda: vae.decode(latents)), torch.no_grad()(
        lambda: last_vae.decode(last)
    )


def forward(trainer: Trainer, kernel: SDPBackend) -> Work:
    """A forward pass of a full batch with an attention kernel."""
    rows = trainer.config.sampling.batch_size
    x, sigma = torch.randn(rows, *trainer.backbone.latent_shape), torch.rand(rows)
    texts = [prompt.text for prompt in trainer.prompts[:1]]
    cond = take(trainer.policy.encode(texts), torch.zeros(rows, dtype=torch.long))

    def work() -> None:
        with sdpa_kernel(kernel):
            trainer.policy.sample_velocity(x, sigma, cond, 1.0)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    settings = {"training.prompts_per_step": 2, "rewards": ["oracle"], "evaluation.rewards": []}
    trainer = Trainer(load_config("g2rpo", settings), tempfile.mkdtemp())
    model, rows = trainer.policy.model, trainer.config.sampling.batch_size
    compare("AdamW, plain : fused", adamw_step(model, False), adamw_step(model, True), rounds)
    compare("VAE decoder, default : channels last", *decoders(), rounds)
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    fused, by_steps = (forward(trainer, kernel) for kernel in kernels)
    compare("attention, fused : step by step", fused, by_steps, rounds)
    a, b = torch.randn(33 * rows, 192), torch.randn(192, 768)
    a16, b16 = a.bfloat16(), b.bfloat16()
    compare("matrix product, bfloat16 : float32", lambda: a16 @ b16, lambda: a @ b, rounds)
    compare("checkpoint : step", lambda: trainer.save(None), lambda: trainer.step(1), 3)


if __name__ == "__main__":
    main()
