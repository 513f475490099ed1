"""What a recipe will need and do, found out before it runs: `flowgrain doctor`."""

import importlib.metadata
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from flowgrain.methods.algorithms import price
from flowgrain.models import take
from flowgrain.methods.calibration import calibration_price
from flowgrain.rewards import score
from flowgrain.rewards.base import MASKED
from flowgrain.config.schema import Settings
from flowgrain.training.trainer import Run

MOST_TAIL_ERROR = 0.05
"""Relative error of quantized velocities above which they are not recommended."""

PACKAGES = ("torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its name, whether it is well, and what was found or what would mend it."""

    what: str
    well: bool
    said: str


@dataclass(frozen=True)
class Memory:
    """Bytes that a run holds, by part, without activations."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(run: Run) -> Memory:
    """What a run's weights, gradients, optimizer, copies and latents take."""
    policy, s = run.policy, run.settings
    weights = sum(p.numel() * p.element_size() for p in policy.transformer.parameters())
    trained = sum(p.numel() for p in policy.trained.values())
    tree = price(run.method, s)
    of_latent = 4 * torch.Size(run.backbone.latent_shape).numel()
    parts = {
        "transformer": weights,
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "EMA": 4 * trained if policy.ema is not None else 0,
        "reference": weights if policy.frozen is not None else 0,
        "sampling copy": sum(p.numel() * p.element_size() for p in policy.sampler.parameters())
        if policy.sampler is not policy.transformer
        else 0,
        "quantised copy": policy.quantised.size if policy.quantised is not None else 0,
        "VAE": sum(p.numel() * p.element_size() for p in run.backbone.vae.parameters()),
        "old policy": 0 if policy.old is None else 4 * trained if policy.lora else weights,
        "latents kept for the update": of_latent
        * s.prompts_per_step
        * (tree.decodes + tree.trained_edges + tree.train_forward_passes),
    }
    return Memory({name: size for name, size in parts.items() if size})


def examine(s: Settings, out: Path | None = None) -> list[Finding]:
    """Loads everything, tries one forward, one decode and every reward, and weighs what the run needs. Raises SettingsError."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    findings = [Finding("versions", True, versions)]
    try:
        run = Run(s, out)
    except torch.OutOfMemoryError as error:
        advice = "try lora_rank=32, a smaller dtype, or more GPUs"
        return [*findings, Finding("memory", False, f"the model does not even load: {str(error).splitlines()[0]}; {advice}")]
    findings.append(Finding("device", True, f"{run.device}, computing in {run.policy.dtype}"))
    findings.append(_prompts_finding(run))
    prompts = run.prompts[:1]
    rows = min(s.rows_per_pass, 64)

    def trial(what: str, work: Callable[[], str]) -> None:
        try:
            findings.append(Finding(what, True, work()))
        except Exception as error:  # whatever it is, it is what the person wants to read
            findings.append(Finding(what, False, f"{type(error).__name__}: {error}"))

    rate: list[float] = []
    x = torch.randn(rows, *run.backbone.latent_shape, device=run.device)
    sigma = torch.full((rows,), 0.5, device=run.device)

    def forward() -> str:
        cond = take(run.policy.encode(prompts), torch.zeros(rows, dtype=torch.long, device=run.device))
        for _ in range(2):  # the first one warms up
            begin = time.perf_counter()
            v = run.policy.sample_velocity(x, sigma, cond, s.guidance_scale)
            finite = bool(v.isfinite().all())  # also waits for the device
            rate[:] = [rows / (time.perf_counter() - begin)]
        if not finite:
            raise ValueError("the velocity is not finite: try dtype=float32")
        return f"{rows} rows, {rate[0]:,.0f} rows a second"

    images: list[torch.Tensor] = []

    def decode() -> str:
        images.append(run.backbone.decode(x[:1]).cpu())
        return f"an image of {images[0].shape[-1]}x{images[0].shape[-2]}"

    def tail() -> str:
        cond = take(run.policy.encode(prompts), torch.zeros(rows, dtype=torch.long, device=run.device))
        with run.policy.tail() as velocity:
            exact, error = x, 0.0
            for place in range(3):  # the third call is the first that a cache can make cheaper
                begin = time.perf_counter()
                v = velocity(x, sigma - 0.05 * place, cond, s.guidance_scale, place > 0)
                seconds = time.perf_counter() - begin
                if not v.isfinite().all():
                    raise ValueError("the velocity is not finite")
                exact = run.policy.sample_velocity(x, sigma - 0.05 * place, cond, s.guidance_scale) if place == 0 else exact
                error = float((v.float() - exact.float()).norm() / exact.float().norm()) if place == 0 else error
        if s.tail_weights != "same" and error > MOST_TAIL_ERROR:
            raise ValueError(f"quantized velocities have a relative error of {error:.1%}; leave out tail_weights={s.tail_weights}")
        return f"{rows} rows, {rows / seconds:,.0f} rows a second, relative error of the first step {error:.1%}"

    trial("forward", forward)
    if s.order_of_tails != "mixed":
        trial("cheaper tail", tail)
    trial("decode", decode)
    for name, reward in run.eval_rewards.items():

        def one(reward=reward, name=name) -> str:
            if not images:
                raise ValueError("there is no image to score: decoding failed")
            tried = run.prompts[:1] if name in run.rewards else run.eval_prompts[:1]
            found = score(reward, images[0], tried)
            if found.failed and found.reason != MASKED:
                raise ValueError(found.reason or "no score")
            return "does not apply to the first prompt" if found.failed else f"{float(found.values[0]):.3f} on an image of noise"

        trial(f"reward {name}", one)
    findings += [_memory_finding(run), _disk_finding(run), _cost_finding(run, rate[0] if rate else None)]
    return findings


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _prompts_finding(run: Run) -> Finding:
    trained, held_out = set(run.prompts), set(run.eval_prompts)
    repeats, both = len(run.prompts) - len(trained), len(trained & held_out)
    epochs = run.settings.max_steps * run.settings.prompts_per_step / len(run.prompts)
    told = [f"{len(run.prompts):,} to train on, {epochs:.2g} epochs", f"{len(run.eval_prompts):,} held out"]
    told += [f"{repeats:,} of the former are repeats"] if repeats else []
    told += [f"{both:,} of the latter are trained on too: leave them out of prompts, or the evaluation is none"] if both else []
    return Finding("prompts", not both, "; ".join(told))


def _memory_finding(run: Run) -> Finding:
    needed = memory(run)
    there = torch.cuda.mem_get_info()[1] if run.device.type == "cuda" else psutil.virtual_memory().total
    told = ", ".join(f"{name} {_gigabytes(size)}" for name, size in needed.parts.items())
    said = f"{_gigabytes(needed.total)} of {_gigabytes(there)}, without activations ({told})"
    if needed.total > 0.9 * there:
        ways = ["gradient_checkpointing=true", "smaller prompts_per_step"]
        ways = ["lora_rank=32", *ways] if not run.policy.lora else ways
        return Finding("memory", False, f"{said}; it does not fit: try {', '.join(ways)}")
    return Finding("memory", True, said)


def _disk_finding(run: Run) -> Finding:
    s = run.settings
    of_checkpoint = sum(4 * p.numel() for p in run.policy.trained.values()) * (3 + (run.policy.ema is not None))
    needed = of_checkpoint * (s.keep_checkpoints + 2)  # the best one, and the one being written
    folder = run.out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    said = f"{_gigabytes(needed)} of checkpoints, {_gigabytes(free)} free in {folder}"
    return Finding(
        "disk", needed < free, said if needed < free else f"{said}; free some, or lower keep_checkpoints={s.keep_checkpoints}"
    )


def _cost_finding(run: Run, rate: float | None) -> Finding:
    s = run.settings
    one = price(run.method, s)
    passes = one.passes * s.prompts_per_step
    guided = 2 if s.guidance_scale != 1 and not run.backbone.embedded_guidance else 1
    said = (
        f"{s.max_steps} steps of {s.prompts_per_step} prompts; a prompt takes {one.forward_passes:,} sampling passes, "
        f"{one.train_forward_passes:,} with gradient, {one.decodes:,} decodes and {one.reward_calls:,} reward calls"
    )
    if guided == 2:
        said += "; true CFG makes two rows of each pass"
    calibration = calibration_price(s).forward_passes
    if calibration:
        said += f"; {calibration:,} passes of calibration before"
    if rate:
        seconds = passes / rate
        said += f"; about {seconds:.0f} s a step and {seconds * s.max_steps / 3600:.1f} h in all, without decoding and scoring"
    return Finding("the run", True, said)
