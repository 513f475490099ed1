"""Checks of a configuration before a long run: `flowgrain doctor`.

Memory and disk are checked first, then the prompts, the model and every reward.
"""

import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flowgrain.config.rollout import without_workers
from flowgrain.config.schema import Config
from flowgrain.data import Prompt, read_prompts
from flowgrain.methods.calibration import calibration_cost
from flowgrain.models import Backbone
from flowgrain.planning.findings import Attempt, Finding, attempt
from flowgrain.planning.first_step import available_memory, check_first_step
from flowgrain.planning.plan import prompt_cost
from flowgrain.planning.trials import (
    Trial,
    decode_noise,
    describe_conditioning,
    describe_image,
    describe_rate,
    encode_first,
    forward_rate,
    score_noise,
    tail_quality,
)
from flowgrain.rewards import build_reward
from flowgrain.training import Trainer
from flowgrain.training.context import check_context
from flowgrain.training.disk import largest_setting, run_bytes
from flowgrain.training.fit import existing_parent, in_bytes
from flowgrain.training.load import (
    check_prompt_files,
    compute_device,
    compute_dtype,
    load_model,
    load_prompts,
)
from flowgrain.training.memory import memory
from flowgrain.training.rollouts.checks import check_workers
from flowgrain.training.sizes import ModelSize, model_size, size_of_loaded
from flowgrain.units import duration

_PACKAGES = ("torch", "diffusers", "transformers", "peft")


def examine(config: Config, out: Path | None = None, gpus: int = 1) -> list[Finding]:
    """Check everything that `config` needs. Nothing is trained or written.

    Memory is checked before the weights are loaded, if the size of the model is known without
    loading it, and a large model's first step is rehearsed. If the memory is too small, or the step
    fails, the checks that need the model are skipped. All other checks are made, whatever the
    results of the checks before them.

    Args:
        config: configuration of the run.
        out: directory of the run. Default: runs/NAME.
        gpus: number of processes of the run, of which each needs the memory.
    """
    out = out or Path("runs") / config.name
    on_device = attempt(
        "device",
        partial(compute_device, config.runtime.device),
        lambda found: check_device(config, found).message,
    )
    findings = [check_versions(), on_device.finding, *check_groups(config, gpus)]
    if on_device.result is None:  # the rest is checked on the CPU
        runtime = config.runtime.model_copy(update={"device": "cpu"})
        config = config.model_copy(update={"runtime": runtime})
    device = on_device.result or torch.device("cpu")
    asked, config = config, _of_one_process(config)
    cost = check_cost(config, rows_per_row=None, rate=None)
    measured = attempt("model", partial(_measure, config), lambda _: "")
    if measured.result is None:
        return [*findings, measured.finding, *check_separately(config, None), cost]
    size, backbone = measured.result
    enough = check_memory(asked, size, device, loaded=backbone is not None, gpus=gpus)
    findings += [enough, check_disk(config, size, out)]
    if enough.ok and backbone is None:
        findings += check_first_step(asked, size, device, gpus)
    if not all(finding.ok for finding in findings if finding.name in ("memory", "first step")):
        return [*findings, *check_files(config, None), cost]
    loading = attempt("start", partial(_trainer, config, out, backbone), lambda _: "")
    if loading.result is not None:
        findings += check_context_parallel(asked, loading.result.backbone)
        return [*findings, *check_parts(loading.result)]
    parts = check_separately(config, backbone)
    if all(part.ok for part in parts):  # the parts do not fit together
        parts.append(loading.finding)
    return [*findings, *parts, cost]


def _of_one_process(config: Config) -> Config:
    """`config` without context parallelism, because the doctor runs in one process."""
    runtime = config.runtime.model_copy(update={"context_parallel": 1})
    return config.model_copy(update={"runtime": runtime})


def check_groups(config: Config, gpus: int) -> list[Finding]:
    """Whether context groups divide `gpus` processes. Empty if they do."""
    degree = config.runtime.context_parallel
    if gpus % degree == 0:
        return []
    text = f"runtime.context_parallel={degree}: --gpus {gpus} is not a multiple of {degree}."
    return [Finding("processes", False, f"{text} Give the number of processes of the run.")]


def check_context_parallel(config: Config, backbone: Backbone) -> list[Finding]:
    """Whether the model can divide its tokens. Nothing, if the run does not divide them."""
    degree = config.runtime.context_parallel
    if degree == 1:
        return []
    text = f"{degree} ranks divide the tokens of a row"
    check = partial(check_context, config, backbone)
    return [attempt("context parallelism", check, lambda _: text).finding]


def _measure(config: Config) -> tuple[ModelSize, Backbone | None]:
    """The size of the model, and the model if it was loaded to measure its size."""
    size = model_size(config.model, config.lora.target_modules)
    if size is not None:
        return size, None
    backbone = load_model(config)
    return size_of_loaded(backbone, config.lora.target_modules), backbone


def check_separately(config: Config, backbone: Backbone | None) -> list[Finding]:
    """Check the model, the prompts and every reward one by one, if the run cannot start.

    Args:
        config: configuration of the run.
        backbone: the model, if it is loaded.
    """
    findings = []
    if backbone is None:
        model = attempt("model", partial(load_model, config), lambda found: type(found).__name__)
        if not model.finding.ok and "out of memory" in model.finding.message:
            message = f"{model.finding.message} {_less_memory(config, 'weights')}"
            model = Attempt(Finding("model", False, message), None)
        findings.append(model.finding)
        backbone = model.result
    findings += check_files(config, backbone)
    for reward in {r.name: r for r in (*config.evaluation.rewards, *config.rewards)}.values():
        name = f"reward {reward.name}"
        findings.append(attempt(name, partial(build_reward, reward), lambda _: "loads").finding)
    return findings


def check_files(config: Config, backbone: Backbone | None) -> list[Finding]:
    """Check the prompts. Without a model only whether their files can be read."""
    findings, data = [], config.data
    uses: tuple[tuple[Literal["train", "eval"], str, str | None], ...] = (
        ("train", f"data.{data.kind or 'prompts'}", data.image_file or data.prompts),
        ("eval", "data.eval_prompts", data.eval_prompts),
    )
    if data.kind is not None:
        check = partial(check_prompt_files, config)
        findings.append(attempt("images", check, lambda _: "found").finding)
    for use, name, path in uses:
        if backbone is not None:
            read: Callable[[], list[Prompt]] = partial(load_prompts, config, backbone, use)
        elif path is not None:
            read = partial(read_prompts, name, path)
        else:
            continue
        findings.append(attempt(name, read, _describe_prompts).finding)
    return findings


def _describe_prompts(prompts: Sequence[Prompt]) -> str:
    return "1 prompt" if len(prompts) == 1 else f"{len(prompts):,} prompts"


def _trainer(config: Config, out: Path, backbone: Backbone | None) -> Trainer:
    """A trainer without rollout workers, after checking that it could have them."""
    check_workers(config, ())
    return Trainer(without_workers(config), out, backbone=backbone)


def check_parts(trainer: Trainer) -> list[Finding]:
    """Check the prompts, the model and the rewards of a trainer, and give the cost of the run."""
    config = trainer.config
    encoding = attempt("encoding", partial(encode_first, trainer), describe_conditioning)
    findings = [check_prompts(trainer), encoding.finding]
    rate: float | None = None
    images: Tensor | None = None
    if encoding.result is not None:
        trial = Trial.of(trainer, encoding.result)
        forward = attempt(
            "forward pass", partial(forward_rate, trial), partial(describe_rate, trial)
        )
        decoding = attempt("decoding", partial(decode_noise, trial), describe_image)
        findings += [forward.finding, decoding.finding]
        rate, images = forward.result, decoding.result
        if config.tail_schedule != "interleaved":
            findings.append(attempt("approximate tail", partial(tail_quality, trial), str).finding)
    for name, reward in {**trainer.rewards, **trainer.eval_rewards}.items():
        prompt = (trainer.prompts if name in trainer.rewards else trainer.eval_prompts)[0]
        scoring = attempt(f"reward {name}", partial(score_noise, reward, images, prompt), str)
        findings.append(scoring.finding)
    guided = config.sampling.guidance_scale != 1 and not trainer.backbone.embedded_guidance
    return [*findings, check_cost(config, 2 if guided else 1, rate)]


def check_versions() -> Finding:
    """The versions of the most important packages."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    return Finding("versions", True, versions)


def check_device(config: Config, device: torch.device) -> Finding:
    """The compute device and dtype."""
    dtype = compute_dtype(config.runtime.dtype, device)
    return Finding("device", True, f"{device}, {str(dtype).removeprefix('torch.')}")


def check_memory(
    config: Config, size: ModelSize, device: torch.device, loaded: bool = False, gpus: int = 1
) -> Finding:
    """Whether the parts of the run fit into the memory of the device.

    Args:
        config: configuration of the run.
        size: size of the model.
        device: compute device.
        loaded: whether the model was loaded to measure its size.
        gpus: number of processes of the run.
    """
    needed = memory(config, size, compute_dtype(config.runtime.dtype, device), gpus)
    available = available_memory(device)
    parts = ", ".join(f"{name} {in_bytes(part)}" for name, part in needed.parts.items())
    message = f"{in_bytes(needed.total)} of {in_bytes(available)}, without activations: {parts}."
    if needed.fits(available):
        return Finding("memory", True, message)
    skipped = "" if loaded else "The model was not loaded. "
    largest = max(needed.parts, key=lambda name: needed.parts[name])
    advice = f"{skipped}{_less_memory(config, largest)}"
    return Finding("memory", False, f"{message} This does not fit. {advice}")


def _less_memory(config: Config, largest: str) -> str:
    """Settings that make the largest part of the memory smaller."""
    lora, more = config.lora.rank > 0, "more GPUs"
    if largest == "latents":
        ways = ["a smaller training.prompts_per_step", "a smaller method.group_size"]
    elif lora:  # the frozen weights are the same with every rank
        ways, more = ["a smaller training.prompts_per_step"], "runtime.rollout_weights=sharded"
        more += " on several GPUs"
    else:
        ways = ["lora.rank=32"]
    if largest != "latents" and not config.model.gradient_checkpointing:
        ways.append("model.gradient_checkpointing=true")
    return (
        f"The largest part is {largest}. Try {', '.join(ways)} or {more}. `flowgrain rehearse` "
        "shows what other machines need."
    )


def check_disk(config: Config, size: ModelSize, out: Path) -> Finding:
    """Whether the checkpoints and records of the run fit on the disk of `out`."""
    needed, folder = run_bytes(config, size), existing_parent(out)
    free = shutil.disk_usage(folder).free
    parts = ", ".join(f"{in_bytes(part)} for {purpose}" for purpose, part in needed.items())
    message = f"{parts}, {in_bytes(free)} free in {folder}."
    if sum(needed.values()) < free:
        return Finding("disk", True, message)
    setting, value = largest_setting(config, max(needed, key=lambda purpose: needed[purpose]))
    return Finding("disk", False, f"{message} Free some space, or lower {setting}={value}.")


def check_cost(config: Config, rows_per_row: int | None, rate: float | None) -> Finding:
    """The cost of the run.

    Args:
        config: configuration of the run.
        rows_per_row: 2 if true CFG doubles every row; None if not known.
        rate: rows per second through the model, if it was measured.
    """
    cost, training = prompt_cost(config), config.training
    sentences = [
        f"{training.max_steps:,} steps of {training.prompts_per_step} prompts.",
        f"A prompt takes {cost.forward_passes:,} sampling forward passes, "
        f"{cost.train_forward_passes:,} with gradient, {cost.decodes:,} decodes and "
        f"{cost.reward_calls:,} reward calls.",
    ]
    if rows_per_row == 2:
        sentences.append("True CFG doubles the rows of every pass.")
    calibration = calibration_cost(config.method, config.sampling.num_steps).forward_passes
    if calibration:
        sentences.append(f"The calibration takes {calibration:,} forward passes first.")
    if rate is not None:
        seconds = cost.passes * training.prompts_per_step / rate
        sentences.append(
            f"About {duration(seconds)} per step and {duration(seconds * training.max_steps)} in "
            "total, without decoding and scoring."
        )
    return Finding("cost", True, " ".join(sentences))


def check_prompts(trainer: Trainer) -> Finding:
    """The numbers of prompts, and whether training and evaluation share some."""
    training = trainer.config.training
    texts = [prompt.text for prompt in trainer.prompts]
    eval_texts = [prompt.text for prompt in trainer.eval_prompts]
    repeats, shared = len(texts) - len(set(texts)), len(set(texts) & set(eval_texts))
    epochs = training.max_steps * training.prompts_per_step / len(texts)
    rounds = f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"
    rounds += " epoch" if rounds == "1" else " epochs"
    sentences = [f"{len(texts):,} for training ({rounds}), {len(eval_texts):,} for evaluation."]
    if repeats:
        sentences.append(f"{repeats:,} training prompts are repeats.")
    if shared:
        sentences.append(
            f"{shared:,} evaluation prompts are also training prompts. "
            "Remove them from data.prompts."
        )
    return Finding("prompts", not shared, " ".join(sentences))
