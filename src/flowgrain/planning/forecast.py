"""How long a step should take on so many GPUs, and what it moves and holds: from passes, FLOPs, bytes and link speeds.

A model, not a measurement: docs/scaling.md says what it leaves out and how it did where something was measured.
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowgrain.methods.algorithms import build, price
from flowgrain.config.schema import Settings, SettingsError


@dataclass(frozen=True)
class Gpu:
    """bf16 FLOP/s without sparsity, bytes of memory, bytes/s to another GPU of the machine and to another machine, one way."""

    flops: float
    memory: float
    near: float
    far: float


GPUS = {
    "a100": Gpu(312e12, 80e9, 300e9, 25e9),
    "h100": Gpu(989e12, 80e9, 450e9, 50e9),
    "h200": Gpu(989e12, 141e9, 450e9, 50e9),
}
"""Makers' figures."""

UTILISATION = 0.5
"""Share of the card's FLOP/s that a transformer in full batches is taken to reach."""
_PER_MACHINE = 8


@dataclass(frozen=True)
class Forecast:
    """Of one GPU: seconds a step by part, bytes moved a step, bytes held by part (no activations, no VAE), FLOPs of a pass."""

    seconds: dict[str, float]
    moved: dict[str, float]
    held: dict[str, float]
    flops_of_pass: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class _Size(NamedTuple):
    """What a model's FLOPs depend on, named as in the settings."""

    model: str
    height: int
    width: int
    max_prompt_tokens: int
    t5: bool


def _flux(s: _Size) -> tuple[nn.Module, dict[str, Tensor]]:
    """FLUX.1-dev's transformer, and inputs of one row."""
    tokens, words = s.height * s.width // 256, s.max_prompt_tokens
    inputs = {
        "hidden_states": torch.empty(1, tokens, 64),
        "encoder_hidden_states": torch.empty(1, words, 4096),
        "pooled_projections": torch.empty(1, 768),
        "timestep": torch.empty(1),
        "guidance": torch.empty(1),
        "img_ids": torch.empty(tokens, 3),
        "txt_ids": torch.empty(words, 3),
    }
    return FluxTransformer2DModel(guidance_embeds=True), inputs


def _sd3(s: _Size) -> tuple[nn.Module, dict[str, Tensor]]:
    """SD3.5-medium's transformer, and inputs of one row; CLIP's 77 words stand before T5's."""
    model = SD3Transformer2DModel(
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
    inputs = {
        "hidden_states": torch.empty(1, 16, s.height // 8, s.width // 8),
        "encoder_hidden_states": torch.empty(1, 77 + s.max_prompt_tokens * s.t5, 4096),
        "pooled_projections": torch.empty(1, 2048),
        "timestep": torch.empty(1),
    }
    return model, inputs


_PUBLISHED = {"flux": _flux, "sd3": _sd3}


def flops_of_pass(s: Settings) -> tuple[float, int, int]:
    """FLOPs of one row through the published model of `s` at its size, its parameters, and those of its adapter."""
    flops, parameters, of_rank_one = _counted(_Size(*(getattr(s, name) for name in _Size._fields)))
    return flops, parameters, s.lora_rank * of_rank_one


@lru_cache
def _counted(s: _Size) -> tuple[float, int, int]:
    """FLOPs of a row, parameters, and those of an adapter of rank 1."""
    with torch.device("meta"):
        model, inputs = _PUBLISHED[s.model](s)
    parameters = sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    layers = [
        m for name, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(r"\.(to|add)_(?!qkv)\w+(\.0)?$", name)
    ]
    adapter = sum(m.in_features + m.out_features for m in layers)
    return float(counter.get_total_flops()), parameters, adapter


def forecast(s: Settings, gpus: int, name: str, utilisation: float = UTILISATION) -> Forecast:
    """What a step of `s` should take on each of `gpus` cards `name`. Raises SettingsError for a card or model it does not know."""
    if name not in GPUS:
        raise SettingsError(f"--gpu {name}: is not known; known: {', '.join(GPUS)}")
    if s.model not in _PUBLISHED:
        raise SettingsError(f"model={s.model}: its published size is not known here; {' and '.join(_PUBLISHED)} are")
    gpu, (flops, parameters, adapter) = GPUS[name], flops_of_pass(s)
    one = price(build(s), s)
    mine = -(-s.prompts_per_step // gpus)  # prompts of this GPU; those that only fill up count too
    guided = 2 if s.model == "sd3" and s.guidance_scale != 1 else 1
    rows, frozen, gradient = (guided * mine * n for n in (one.forward_passes, one.frozen_forward_passes, one.train_forward_passes))
    speed = utilisation * gpu.flops
    lora = s.lora_rank > 0
    shared = gpus > 1 and not (lora and s.rollout_weights != "sharded")
    replica = gpus > 1 and s.rollout_weights != "sharded"
    calls = math.ceil(rows / guided / s.rows_per_pass)
    updates = 1 if s.updates_per_rollout == "per_step" else int(s.updates_per_rollout)
    trained = adapter if lora else parameters
    passes = gradient / guided / (s.train_rows_per_pass or s.rows_per_pass)
    # Weights are sharded within a machine; across machines only gradients go, a machine's share each.
    parts = min(gpus, _PER_MACHINE) if shared else 1
    near, machines = (parts - 1) / parts, -(-gpus // _PER_MACHINE)
    moved = {
        "rollout": 0.0 if replica else 2 * parameters * near * calls,
        "refresh of the replica": 4.0 * parameters * near * updates if replica and not lora else 0.0,
        "weights of the update": 2 * 4.0 * parameters * near * passes,
        "gradients": 4.0 * trained * near * updates,
        "gradients between machines": 2 * 4.0 * trained / parts * (machines - 1) / machines * updates,
    }
    checkpointing = 4 if s.gradient_checkpointing else 3
    seconds = {
        "sampling": max(rows * flops / speed, moved["rollout"] / gpu.near),
        "update": max((checkpointing * gradient + frozen) * flops / speed, moved["weights of the update"] / gpu.near),
        "links": (moved["refresh of the replica"] + moved["gradients"]) / gpu.near + moved["gradients between machines"] / gpu.far,
    }
    held = {
        "weights": (2.0 if lora else 4.0) * parameters / parts,
        "gradients": 4.0 * trained,  # added up whole until the last pass of an update
        "AdamW": 8.0 * trained / parts,
        "EMA": 4.0 * trained / parts if s.ema_decay else 0.0,
        "reference": 4.0 * parameters / parts if s.kl_weight and not lora else 0.0,
        "sampling copy": 0.0 if lora else 2.0 * parameters / (1 if replica or gpus == 1 else parts),
    }
    return Forecast(seconds, {k: v for k, v in moved.items() if v}, {k: v for k, v in held.items() if v}, flops)


def told(found: Forecast, gpus: int, name: str) -> list[tuple[str, str]]:
    """A forecast in words, a line each: what, and how much."""
    memory = GPUS[name].memory
    lines: list[tuple[str, Any]] = [("a forward pass", f"{found.flops_of_pass / 1e12:.1f} TFLOP")]
    lines += [(f"seconds a step, {part}", f"{value:,.1f}") for part, value in found.seconds.items()]
    lines.append((f"seconds a step on {gpus} x {name}", f"{found.total:,.1f}, without text encoders, decoding and rewards"))
    lines += [(f"moved a step, {part}", f"{value / 1e9:,.1f} GB") for part, value in found.moved.items()]
    lines += [(f"held, {part}", f"{value / 1e9:,.1f} GB") for part, value in found.held.items()]
    held = sum(found.held.values())
    fits = "without activations" if held < 0.9 * memory else "does not fit"
    return [*lines, ("held in all", f"{held / 1e9:,.1f} of {memory / 1e9:,.0f} GB, {fits}")]
