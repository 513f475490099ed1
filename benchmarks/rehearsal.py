"""Compare rehearsals with the memory of real training steps on the CPU, by phase and kind.

    python benchmarks/rehearsal.py [CASE ...] [--json FILE] [--list]
    python benchmarks/rehearsal.py --depth sd3-lora-1 flux-full-8
    python benchmarks/rehearsal.py --published

The first command runs a step of every case for real, see `real_memory`, and prints both peaks. With
--json, every finished case is added to FILE, and cases that it contains are not run again. --depth
compares lines through shallow models with rehearsals of all blocks, which takes minutes. --published
compares numbers of parameters and FLOPs with published numbers.
"""

import argparse
import copy
import json
import math
import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from real_memory import Measured, measured_step
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowgrain.config import Config, load_config
from flowgrain.data import Prompt
from flowgrain.models import Backbone, Dtypes, ModelConfig, load_backbone
from flowgrain.models.published import PUBLISHED
from flowgrain.planning.gpus import gpu_named
from flowgrain.planning.rehearsal.model import build_backbone, part_config
from flowgrain.planning.rehearse import Rehearser, prepared
from flowgrain.training import Trainer
from flowgrain.training.load import load_dtypes

SD3, FLUX = "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev"
GPU = gpu_named("h100")
SMALL = 0.01
"""Kinds below this share of the peak are not compared."""

COMMON: Mapping[str, Any] = {
    "training.prompts_per_step": 2,
    "evaluation.every": 0,
    "evaluation.rewards": [],
    "watch.features": "none",
    "runtime.device": "cpu",
    "runtime.threads": 1,
    "runtime.dtype": "float32",
    "model.encoder_dtype": "float32",
    "model.embedding_cache": None,
}
BUNDLED: Mapping[str, Any] = {
    "rewards": ["oracle"],
    "method.group_size": 4,
    "sampling.num_steps": 4,
    "sampling.batch_size": 8,
    "training.micro_batch_size": 8,
}
MIDDLE: Mapping[str, Any] = {
    "rewards": [{"name": "clip", "model": "none"}],
    "training.prompts_per_step": 1,
    "method.group_size": 2,
    "sampling.num_steps": 1,
    "sampling.batch_size": 2,
    "training.micro_batch_size": 1,
    "model.max_prompt_tokens": 16,
    "model.height": 128,
    "model.width": 128,
    "model.gradient_checkpointing": False,
}
SD3_CASE = {**MIDDLE, "model.name": "sd3", "model.t5": False, "sampling.guidance_scale": 4.5}
FLUX_CASE = {**MIDDLE, "model.name": "flux", "sampling.guidance_scale": 3.5}


@dataclass(frozen=True)
class Case:
    """A training step to measure.

    Attributes:
        method: recipe.
        settings: changes.
        blocks: configuration of the blocks in place of the published one. Empty: bundled model.
        gpus: number of ranks.
    """

    method: str
    settings: Mapping[str, Any]
    blocks: Mapping[str, Any] = field(default_factory=dict)
    gpus: int = 1


_FULL = {"lora.rank": 0}
_LORA = {"lora.rank": 8}
_BF16 = {"runtime.dtype": "bfloat16"}
_TWO = {"num_layers": 2, "dual_attention_layers": (0,)}
_FOUR = {"num_layers": 4, "dual_attention_layers": (0, 1)}
_FLUX = {"num_layers": 1, "num_single_layers": 2}
_CHECKPOINTED = {"model.gradient_checkpointing": True}
_PAIRS = {"training.micro_batch_size": 2}
CASES = {
    "flow_grpo full": Case("flow_grpo", {**BUNDLED, **_FULL}),
    "flow_grpo LoRA, CFG, KL, EMA": Case(
        "flow_grpo",
        {
            **BUNDLED,
            **_LORA,
            "sampling.guidance_scale": 4.0,
            "method.kl_weight": 0.01,
            "training.ema_decay": 0.9,
        },
    ),
    "g2rpo full, KL, EMA": Case(
        "g2rpo", {**BUNDLED, **_FULL, "method.kl_weight": 0.01, "training.ema_decay": 0.9}
    ),
    "g2rpo full bf16": Case("g2rpo", {**BUNDLED, **_FULL, **_BF16}),
    "diffusionnft full": Case("diffusionnft", {**BUNDLED, **_FULL}),
    "diffusionnft LoRA bf16": Case("diffusionnft", {**BUNDLED, **_LORA, **_BF16}),
    "densegrpo full": Case("densegrpo", {**BUNDLED, **_FULL}),
    "g2rpo full, 2 ranks, sharded": Case(
        "g2rpo", {**BUNDLED, **_FULL, "runtime.rollout_weights": "sharded"}, gpus=2
    ),
    "SD3.5 2 blocks LoRA": Case("flow_grpo", {**SD3_CASE, **_LORA}, _TWO),
    "SD3.5 2 blocks LoRA, checkpointing, micro-batch 2": Case(
        "flow_grpo", {**SD3_CASE, **_LORA, **_CHECKPOINTED, **_PAIRS}, _TWO
    ),
    "SD3.5 2 blocks full, checkpointing": Case(
        "flow_grpo", {**SD3_CASE, **_FULL, **_CHECKPOINTED}, _TWO
    ),
    "FLUX 1 + 2 blocks LoRA": Case("flow_grpo", {**FLUX_CASE, **_LORA}, _FLUX),
    "FLUX 1 + 2 blocks LoRA, checkpointing, micro-batch 2": Case(
        "flow_grpo", {**FLUX_CASE, **_LORA, **_CHECKPOINTED, **_PAIRS}, _FLUX
    ),
    "SD3.5 4 blocks LoRA, 256 px": Case(
        "flow_grpo", {**SD3_CASE, **_LORA, "model.height": 256, "model.width": 256}, _FOUR
    ),
    "SD3.5 2 blocks full, 2 ranks, sharded": Case(
        "flow_grpo",
        {
            **SD3_CASE,
            **_FULL,
            "runtime.rollout_weights": "sharded",
            "training.prompts_per_step": 2,
            "training.ema_decay": 0.0,
        },
        _TWO,
        gpus=2,
    ),
    "SD3.5 2 blocks LoRA bf16": Case("flow_grpo", {**SD3_CASE, **_LORA, **_BF16}, _TWO),
}


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # noqa: ARG001
    """A reward without a model."""
    return images.mean((1, 2, 3))


def pipeline_folder(name: str, blocks: Mapping[str, Any], folder: Path) -> Path:
    """Configuration files of a published model with few blocks and small text encoders."""
    parts = copy.deepcopy({k: dict(v) for k, v in PUBLISHED[name].items()})
    parts["transformer"] |= blocks
    for part, config in parts.items():
        if part.startswith("text_encoder"):
            config |= {"vocab_size": 128}
            t5 = config["model_type"] == "t5"
            config |= {"num_layers": 1, "d_ff": 64} if t5 else {"num_hidden_layers": 1}
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part).mkdir()
        (folder / part / file).write_text(json.dumps(config), encoding="utf-8")
    return folder


def case_config(case: Case, folder: Path) -> Config:
    """The settings of a case, as they are rehearsed."""
    changes = {**COMMON, **case.settings}
    if case.blocks:
        name = SD3 if changes["model.name"] == "sd3" else FLUX
        changes["model.path"] = str(pipeline_folder(name, case.blocks, folder))
    return prepared(load_config(case.method, changes), case.gpus, GPU)


def trainer_of(config: Config, loaded: Backbone | None) -> Trainer:
    """The trainer of `config`. A loaded backbone is copied, so that all its tensors are new."""
    if loaded is not None:
        backbone: Any = copy.deepcopy(loaded)
        prompts = backbone.bundled_prompts("train")[:8]
    else:
        transformer = part_config(config.model, "transformer")
        device = torch.device("cpu")
        backbone = build_backbone(config.model, load_dtypes(config), transformer, device)
        backbone.check = lambda texts: None
        prompts = ["a prompt"] * config.training.prompts_per_step
    torch.manual_seed(0)
    return Trainer(
        config,
        tempfile.mkdtemp(),
        backbone=backbone,
        rewards={reward.name: brightness for reward in config.rewards},
        prompts=prompts,
        eval_prompts=prompts,
    )


def run_step(config: Config) -> Measured:
    """Measure the first step of `config` in this process."""
    torch.set_num_threads(1)
    bundled = config.model.name == "shapes"
    loaded = load_backbone(config.model, load_dtypes(config)) if bundled else None
    return measured_step(partial(trainer_of, config, loaded))


def _rank(rank: int, case: Case, folder: str, port: int, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.gpus)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(case.gpus), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    files = Path(folder) / str(rank)
    files.mkdir()
    found = run_step(case_config(case, files))
    if rank == 0:
        results.put(found)


def real(case: Case, config: Config) -> Measured:
    """Measure a case, on several ranks in as many processes."""
    if case.gpus == 1:
        return run_step(config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (case, folder, port, results), nprocs=case.gpus)
    found: Measured = results.get()
    return found


def compare(case: Case, process: Rehearser) -> dict[str, Any]:
    """Bytes of the rehearsal and of the real step, by phase and kind."""
    with tempfile.TemporaryDirectory() as folder:
        config = case_config(case, Path(folder))
        forecast = process.rehearse(config, case.gpus, GPU, depth="full")
        measured = real(case, config)
    phases = {}
    for phase, peak in forecast.phases.items():
        of_real = measured.peaks.get(phase, {})
        kinds = dict.fromkeys([*peak.kinds, *of_real])
        phases[phase] = {k: [peak.kinds.get(k, 0.0), float(of_real.get(k, 0))] for k in kinds}
    return {"phases": phases, "events": measured.events, "unknown": measured.unknown}


def difference(pair: Sequence[float]) -> float:
    """Relative difference of a rehearsed number from a measured number."""
    rehearsed, measured = pair
    return rehearsed / measured - 1 if measured else math.inf


def totals(kinds: Mapping[str, Sequence[float]]) -> list[float]:
    """Rehearsed and measured bytes of all kinds."""
    return [sum(pair[i] for pair in kinds.values()) for i in (0, 1)]


def large_kinds(kinds: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The kinds that are at least `SMALL` of the peak."""
    limit = SMALL * max(totals(kinds))
    return {name: pair for name, pair in kinds.items() if max(pair) >= limit}


def megabytes(pair: Sequence[float]) -> str:
    return " / ".join(f"{value / 1e6:,.1f}" for value in pair)


def table(results: Mapping[str, Any]) -> str:
    """The totals of all phases, and the kind with the largest difference, as Markdown."""
    lines = [
        "| case | phase | total, MB: rehearsed / measured | difference | activations, MB | "
        "largest difference of another kind |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for phase, kinds in result["phases"].items():
            total = totals(kinds)
            named = {k: v for k, v in large_kinds(kinds).items() if k != "activations"}
            worst = max(named, key=lambda k: abs(difference(named[k])), default=None)
            other = f"{worst} {difference(named[worst]):+.1%}" if worst else "-"
            activations = megabytes(kinds.get("activations", (0.0, 0.0)))
            cells = (name, phase, megabytes(total), f"{difference(total):+.1%}", activations, other)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


DEPTH = {
    "sd3-lora-1": ("sd3/flow_grpo", {"data.prompts": "x", "model.path": SD3}, 1),
    "flux-full-8": ("flux/g2rpo", {"data.prompts": "x", "model.path": FLUX}, 8),
}


def compare_depth(names: Sequence[str], process: Rehearser) -> None:
    """Print peaks by phase from lines and at full depth."""
    print("| run | phase | from lines, GB | full depth, GB | difference |\n|---|---|---|---|---|")
    for name in names:
        source, changes, gpus = DEPTH[name]
        config = load_config(source, changes)
        lines, full = (process.rehearse(config, gpus, GPU, depth) for depth in ("lines", "full"))
        for phase, peak in full.phases.items():
            pair = lines.phases[phase].total, peak.total
            numbers = f"{pair[0] / 1e9:.3f} | {pair[1] / 1e9:.3f} | {difference(pair):+.2%}"
            print(f"| {name} | {phase} | {numbers} |")
        flops = [sum(r.measured.flops.values()) for r in (lines, full)]
        numbers = f"{flops[0] / 1e15:.4f} | {flops[1] / 1e15:.4f} | {difference(flops):+.2%}"
        print(f"| {name} | PFLOP | {numbers} |")
        print(f"| {name} | seconds | {lines.seconds:.0f} | {full.seconds:.0f} | |", flush=True)


PARAMETERS = (
    (FLUX, "transformer", 11.9e9, "checkpoint; the model card says 12 B"),
    (FLUX, "vae", 83.8e6, "checkpoint"),
    (FLUX, "text_encoder", 123.1e6, "CLIP ViT-L/14, text model"),
    (FLUX, "text_encoder_2", 4.762e9, "T5 v1.1 XXL, encoder"),
    (SD3, "transformer", 2.24e9, "checkpoint; the model card says 2.5 B"),
    (SD3, "text_encoder_2", 694.7e6, "OpenCLIP ViT-bigG/14, text model"),
)
"""Model, part, published number of parameters, source."""
FLUX_FLOPS = 3726.87e12 / 50
"""FLOPs of a forward pass of FLUX.1-dev at 1024 x 1024. Source: the total of 50 steps in
bench/README.md of github.com/vipshop/cache-dit, counted with calflops.
"""


def compare_published() -> None:
    """Print numbers of parameters and FLOPs that rehearsals use, and published ones."""
    print("| model | part | here | published | difference | source |\n|---|---|---|---|---|---|")
    meta, kinds = torch.device("meta"), Dtypes(*[torch.bfloat16] * 3)
    for name, part, published, source in PARAMETERS:
        model = ModelConfig(name="flux" if name == FLUX else "sd3", path=name)
        backbone: Any = build_backbone(model, kinds, part_config(model, "transformer"), meta)
        count = sum(p.numel() for p in backbone.pipe.components[part].parameters())
        numbers = f"{count / 1e6:,.1f} M | {published / 1e6:,.1f} M"
        print(f"| {name} | {part} | {numbers} | {difference((count, published)):+.1%} | {source} |")
    model = ModelConfig(name="flux", path=FLUX, height=1024, width=1024, max_prompt_tokens=512)
    backbone = build_backbone(model, kinds, part_config(model, "transformer"), meta)
    shapes = {"embeds": (1, 512, 4096), "pooled": (1, 768), "guidance": (1,)}
    cond = {key: torch.empty(shape, device=meta) for key, shape in shapes.items()}
    x = torch.empty(1, *backbone.latent_shape, device=meta, dtype=torch.bfloat16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.velocity(backbone.transformer, x, torch.ones(1, device=meta), cond)
    pair = counter.get_total_flops(), FLUX_FLOPS
    numbers = f"{pair[0] / 1e12:.2f} TFLOP | {pair[1] / 1e12:.2f} TFLOP"
    print(f"| {FLUX} | forward pass, 1024 px | {numbers} | {difference(pair):+.1%} | cache-dit |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="names of cases. Default: all")
    parser.add_argument("--json", type=Path, help="file of the results")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--depth", nargs="+", choices=DEPTH, help="compare with full depth")
    parser.add_argument("--published", action="store_true", help="compare with published numbers")
    args = parser.parse_args()
    if args.list:
        print("\n".join(CASES))
        return
    if args.published:
        compare_published()
        return
    with Rehearser() as process:
        if args.depth:
            compare_depth(args.depth, process)
            return
        done = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
        for name in args.cases or CASES:
            if name not in done:
                done[name] = compare(CASES[name], process)
                print(table({name: done[name]}), flush=True)
                if args.json:
                    args.json.write_text(json.dumps(done, indent=1))
    print(table(done))


if __name__ == "__main__":
    main()
