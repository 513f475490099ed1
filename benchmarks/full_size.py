"""Measure a training step of a published model at full size, with random weights.

    python benchmarks/full_size.py flux/g2rpo --preset one-gpu sampling.batch_size=8 [--rounds 1]
    python benchmarks/full_size.py flux/g2rpo --layers 1 --vae-width 8 model.height=64 ...

The first command needs a GPU with enough memory. The second one is cut down and runs anywhere.

Prints rows per second, utilization, and seconds and memory of every stage. Utilization is the
FLOP/s of the model, divided by the FLOP/s of a large matrix product in the same dtype on the same
device. For G2RPO it also measures the loop of published code with one branch per stochastic step,
and scales it to all branches.
"""

import argparse
import json
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from iteration import STAGES, published_step, stage_memory
from published import PublishedLoop
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowgrain.config import Config, load_config
from flowgrain.data import Prompt
from flowgrain.methods.g2rpo import G2RPO
from flowgrain.models import BACKBONES, take
from flowgrain.planning.plan import prompt_cost
from flowgrain.training import Trainer
from flowgrain.training.load import compute_device, load_dtypes

SETTINGS = [
    "training.prompts_per_step=1",
    "evaluation.every=0",
    "evaluation.rewards=[]",
    "model.path=random",
    "model.embedding_cache=null",
]
VAE_SCALE = {"flux": (0.3611, 0.1159), "sd3": (1.5305, 0.0609)}
"""Scale and shift of latents, by model."""


def published_transformer(name: str) -> nn.Module:
    """The transformer of FLUX.1-dev or SD3.5-medium on the meta device.

    Raises:
        ValueError: another model.
    """
    with torch.device("meta"):
        if name == "flux":
            return FluxTransformer2DModel(guidance_embeds=True)
        if name == "sd3":
            return SD3Transformer2DModel(
                sample_size=128,
                num_layers=24,
                num_attention_heads=24,
                joint_attention_dim=4096,
                caption_projection_dim=1536,
                pooled_projection_dim=2048,
                pos_embed_max_size=384,
                dual_attention_layers=tuple(range(13)),
                qk_norm="rms_norm",
            )
    raise ValueError(f"model.name={name}: only flux and sd3 can be measured. Use one of them.")


def random_transformer(config: Config, layers: int | None) -> nn.Module:
    """The transformer with random weights. `layers`: number of blocks of each kind to keep."""
    transformer = published_transformer(config.model.name)
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        blocks = getattr(transformer, kind, None)
        if layers and blocks is not None:
            setattr(transformer, kind, blocks[-layers:])
    device, dtypes = compute_device(config.runtime.device), load_dtypes(config)
    transformer = transformer.to_empty(device=device).to(dtypes.transformer)
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        tensor.data.normal_(std=0.02)
    return transformer


def random_vae(config: Config, width: int) -> nn.Module:
    """A VAE of the architecture of both models with random weights. The published width is 128."""
    scale, shift = VAE_SCALE[config.model.name]
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(width * n for n in (1, 2, 4, 4)),
        norm_num_groups=min(32, width),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scale,
        shift_factor=shift,
    )
    return vae.to(compute_device(config.runtime.device), load_dtypes(config).vae)


def random_backbone(config: Config, layers: int | None, vae_width: int) -> Any:
    """The backbone of `config` with random weights, and random embeddings for every prompt."""
    torch.manual_seed(0)
    transformer, vae = random_transformer(config, layers), random_vae(config, vae_width)
    sizes = transformer.config
    pooled = sizes["pooled_projection_dim"]
    tokens = config.model.max_prompt_tokens
    if config.model.name == "sd3":
        tokens = 77 + tokens * config.model.t5  # the tokens of CLIP come before the tokens of T5

    class RandomBackbone(BACKBONES.get(config.model.name)):
        _absent_parts = ()

        def _load_pipeline(self, _parts: Mapping[str, Any]) -> Any:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
            absent = dict.fromkeys(self.encoders)
            return self.pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **absent)

        def check(self, texts: Sequence[str]) -> None:
            """Accept every text, because there is no tokenizer."""

        def _embedding(self, text: str) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
            embeds = torch.randn(tokens, sizes["joint_attention_dim"], generator=generator)
            return {"embeds": embeds, "pooled": torch.randn(pooled, generator=generator)}

    return RandomBackbone(config.model, load_dtypes(config))


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # noqa: ARG001
    """A reward without cost."""
    return images.mean((1, 2, 3))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def seconds(repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / repeats

    seconds(10)  # a warm-up
    return 2 * n**3 / seconds(50)


def row_flops(trainer: Trainer) -> int:
    """FLOPs of one row through the model."""
    shape, guidance = trainer.backbone.latent_shape, trainer.config.sampling.guidance_scale
    x = torch.randn(1, *shape, device=trainer.device)
    first = torch.zeros(1, dtype=torch.long, device=trainer.device)
    cond = take(trainer.policy.encode([trainer.prompts[0].text]), first)
    with FlopCounterMode(display=False) as counter:
        trainer.policy.sample_velocity(x, trainer.sigmas[:1], cond, guidance)
    return counter.get_total_flops()


def measure_published_loop(trainer: Trainer, seconds_per_prompt: float) -> None:
    """Print the seconds per prompt of the loop of published code, and the ratio to flowgrain."""
    num_steps, group_size = trainer.config.sampling.num_steps, trainer.method.group_size
    spent = published_step(PublishedLoop(trainer, branches=1))
    noise_steps = num_steps // 2
    all_passes = trainer.method.published_passes(num_steps)
    tails = all_passes - num_steps - group_size * noise_steps
    passes = num_steps + noise_steps + tails // group_size
    images = group_size * (spent["decode"] + spent["score"])
    total = spent["sample"] * all_passes / passes + images + spent["update"]
    print(
        f"published loop: {passes / spent['sample']:.2f} rows/s, {total:.1f} s per prompt; "
        f"flowgrain {seconds_per_prompt:.1f} s; ratio {total / seconds_per_prompt:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="recipe of flux or sd3")
    parser.add_argument("settings", nargs="*", help="section.key=VALUE")
    parser.add_argument("--preset")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, help="blocks of each kind. Default: all")
    parser.add_argument("--vae-width", type=int, default=128)
    args = parser.parse_intermixed_args()
    config = load_config(args.source, [*SETTINGS, *args.settings], preset=args.preset)
    prompts = [f"prompt {i}" for i in range(config.training.prompts_per_step)]
    trainer = Trainer(
        config,
        tempfile.mkdtemp(),
        backbone=random_backbone(config, args.layers, args.vae_width),
        prompts=prompts,
        eval_prompts=prompts,
        rewards={"brightness": brightness},
    )
    flops, rate = row_flops(trainer), matrix_rate(trainer.device, trainer.policy.dtype)
    print(
        f"{flops / 1e12:.3g} TFLOP per row, matrix products {rate / 1e12:.3g} TFLOP/s", flush=True
    )
    memory = stage_memory(trainer)  # two steps, which are also the warm-up
    print(json.dumps({"additional megabytes": memory}), flush=True)
    for number in range(args.rounds):
        metrics = trainer.step(3 + number)
        rows = metrics["forward_passes"] / metrics["seconds/sample"]
        seconds = {stage: round(metrics[f"seconds/{stage}"], 2) for stage in STAGES}
        print(f"{rows:.2f} rows/s, utilization {rows * flops / rate:.2f}, {seconds}", flush=True)
    if isinstance(trainer.method, G2RPO):
        measure_published_loop(trainer, sum(seconds.values()) / len(prompts))
    passes = prompt_cost(config).forward_passes
    print(json.dumps({"torch": torch.__version__, "passes": passes, "settings": args.settings}))
    if trainer.device.type == "cuda":
        gigabytes = torch.cuda.max_memory_allocated() / 2**30
        print(f"{torch.cuda.get_device_name()}, at most {gigabytes:.1f} GiB")


if __name__ == "__main__":
    main()
