"""A published model at its full size with random weights: rows/s, utilisation, seconds and memory by stage, the published loop.

    python benchmarks/full_size.py flux_g2rpo_lora rows_per_pass=8 [key=value ...] [--rounds 1]      on a GPU with the memory
    python benchmarks/full_size.py flux_g2rpo_lora --layers 1 height=64 width=64 ...                 a cut-down one, anywhere

Utilisation is the model's FLOPs a second over the card's own rate of matrix products in the same dtype, measured here. The
published loop takes one branch of every noise step; its seconds are scaled by passes to a whole prompt.
"""

import argparse
import json
import time
import zlib
from dataclasses import fields
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from iteration import STAGES, peaks, published_step
from published import Published
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowgrain import Run, recipe
from flowgrain.methods.algorithms import build, price
from flowgrain.models import Source, take
from flowgrain.models.flux import FluxBackbone
from flowgrain.models.sd3 import SD3Backbone
from flowgrain.training.policy import compute_device, load_dtypes
from flowgrain.config.schema import Settings
from flowgrain.planning.forecast import _PUBLISHED, _Size

FAMILIES = {"flux": (FluxBackbone, 0.3611, 0.1159), "sd3": (SD3Backbone, 1.5305, 0.0609)}


def random_model(s: Settings, layers: int | None, width: int) -> Any:
    """The backbone of `s` with random weights, and embeddings drawn by prompt; `layers`: so many of each kind of block."""
    family, scale, shift = FAMILIES[s.model]
    device, dtypes = compute_device(s.device), load_dtypes(s)
    with torch.device("meta"):
        transformer, inputs = _PUBLISHED[s.model](_Size(*(getattr(s, name) for name in _Size._fields)))
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        if layers and hasattr(transformer, kind):
            setattr(transformer, kind, getattr(transformer, kind)[-layers:])
    transformer = transformer.to_empty(device=device).to(dtypes.transformer)
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        tensor.data.normal_(std=0.02)
    torch.manual_seed(0)
    channels = tuple(width * n for n in (1, 2, 4, 4))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=channels,
        layers_per_block=2, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=scale,
        shift_factor=shift,
    ).to(device, dtypes.vae)  # fmt: skip

    class Random(family):
        def _load(self, **_: Any) -> Any:
            parts = dict.fromkeys(self.encoders)
            return self.pipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)

        def check(self, prompts: Any) -> None:
            pass

        def _embedding(self, prompt: str) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            names = {"embeds": "encoder_hidden_states", "pooled": "pooled_projections"}
            return {name: torch.randn(inputs[key].shape[1:], generator=generator) for name, key in names.items()}

    named = {field.name: getattr(s, field.name) for field in fields(Source) if field.name not in ("dtypes", "embedding_cache")}
    return Random(Source(**{**named, "weights": "random"}, dtypes=dtypes))


def brightness(images: Tensor, prompts: list[str]) -> Tensor:  # noqa: ARG001
    """A reward that costs nothing."""
    return images.mean((1, 2, 3))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)

    def seconds(repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / repeats

    seconds(10)
    return 2 * n**3 / seconds(50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vae-width", type=int, default=128)
    given = parser.parse_intermixed_args()
    usual = {"prompts_per_step": "1", "rewards": "brightness", "eval_rewards": "brightness", "eval_every": "0"}
    s = recipe(given.recipe, **{**usual, **dict(word.split("=", 1) for word in given.settings)})
    s = s.model_copy(update={"embedding_cache": None, "weights": "random"})
    backbone = random_model(s, given.layers, given.vae_width)
    texts = [f"prompt {i}" for i in range(s.prompts_per_step)]
    run = Run(s, "/tmp/flowgrain-full", backbone=backbone, prompts=texts, eval_prompts=texts, rewards={"brightness": brightness})
    x = torch.randn(1, *backbone.latent_shape, device=run.device)
    one = take(run.policy.encode(texts[:1]), torch.zeros(1, dtype=torch.long, device=run.device))
    with FlopCounterMode(display=False) as counter:
        run.policy.sample_velocity(x, run.sigmas[:1], one, s.guidance_scale)
    flops, rate = counter.get_total_flops(), matrix_rate(run.device, run.policy.dtype)
    print(f"{flops / 1e12:.3g} TFLOP a row, matrix products at {rate / 1e12:.3g} TFLOP/s", flush=True)
    megabytes = peaks(run)  # two steps, which also warm up
    print(json.dumps({"megabytes beyond what a stage found": megabytes}), flush=True)
    for number in range(given.rounds):
        metrics = run.step(3 + number)
        rows = metrics["forward_passes"] / metrics["seconds/sample"]
        told = {stage: round(metrics[f"seconds/{stage}"], 2) for stage in STAGES}
        print(f"{rows:.2f} rows/s, utilisation {rows * flops / rate:.2f}, seconds {told}", flush=True)
    if s.method == "g2rpo":
        loop = Published(run, branches=1)
        spent = published_step(loop)
        noisy = s.num_steps // 2
        tails = build(s).published_passes - s.num_steps - s.group_size * noisy
        taken = s.num_steps + noisy + tails // s.group_size
        whole = (
            spent["sample"] * build(s).published_passes / taken
            + s.group_size * (spent["decode"] + spent["score"])
            + spent["update"]
        )
        ours = sum(told.values()) / s.prompts_per_step
        print(
            f"the published loop: {taken / spent['sample']:.2f} rows/s, {whole:.1f} s a prompt; here {ours:.1f}: {whole / ours:.2f}"
        )
    print(json.dumps({"torch": torch.__version__, "passes": price(build(s), s).forward_passes, "settings": given.settings}))
    if run.device.type == "cuda":
        print(f"{torch.cuda.get_device_name()}, at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
