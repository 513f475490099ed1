"""Training steps on the CPU whose memory is measured, and rehearsed."""

import copy
import json
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

from flowgrain.config import Config, load_config
from flowgrain.data import Prompt
from flowgrain.models import Backbone, load_backbone
from flowgrain.models.published import PUBLISHED, required_config
from flowgrain.planning.gpus import gpu_named
from flowgrain.planning.rehearsal.model import build_backbone
from flowgrain.planning.rehearse import Rehearser, prepared
from flowgrain.training import Trainer
from flowgrain.training.load import load_dtypes

SD3, FLUX = "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev"
GPU = gpu_named("h100")
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
    "sampling.num_steps": 2,
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


_FULL = {"lora.rank": 0, "optimizer.learning_rate": 1e-5}
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
    "FLUX 1 + 2 blocks LoRA, 2 ranks, context parallelism": Case(
        "flow_grpo", {**FLUX_CASE, **_LORA, "runtime.context_parallel": 2}, _FLUX, gpus=2
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


def _accept(_texts: Sequence[str]) -> None:
    """Accept every prompt: there is no tokenizer."""


def trainer_of(config: Config, loaded: Backbone | None) -> Trainer:
    """The trainer of `config`. A loaded backbone is copied, so that all its tensors are new."""
    if loaded is not None:
        backbone: Any = copy.deepcopy(loaded)
        prompts = backbone.bundled_prompts("train")[:8]
    else:
        transformer = required_config(config.model, "transformer")
        device = torch.device("cpu")
        backbone = build_backbone(config.model, load_dtypes(config), transformer, device)
        backbone.check = _accept
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
