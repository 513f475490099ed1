"""Speed of a training step, side by side with the loop of published code."""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flowgrain.bench.memory import MemoryTimer, compare_memory
from flowgrain.bench.published_loop import STAGES, PublishedLoop
from flowgrain.bench.record import StepRecord
from flowgrain.bench.setup import Setup
from flowgrain.bench.sizes import ModelSizes
from flowgrain.config import Config
from flowgrain.planning.plan import prompt_cost
from flowgrain.training import Trainer

Stages = Mapping[str, float]


def measure_iteration(setup: Setup, record: StepRecord, kind: str) -> None:
    """Measure a cut-down training step of model `kind`, and the same step as a published loop."""
    sizes = setup.sizes.kinds[kind]
    trainer = setup.trainer(sizes, setup.config(sizes, *sizes.iteration))
    name, peaks = sizes.name, dict[str, float]()
    record.run(f"memory by stage, {name}", partial(_memory, trainer, peaks))
    record.run(f"memory, {name}, rehearsed", partial(compare_memory, trainer.config, peaks))
    record.run(f"training step, {name}", partial(side_by_side, setup, sizes, trainer))


def _memory(trainer: Trainer, peaks: dict[str, float]) -> dict[str, Any]:
    """The largest memory of every stage of a step, in 10^9 bytes. It is also a warm-up."""
    timer = MemoryTimer(trainer.device)
    trainer.collector.timer = timer
    trainer.step(1)
    trainer.collector.timer = trainer.timer
    peaks |= {stage: timer.peak[stage] for stage in STAGES if stage in timer.peak}
    return {f"{stage}_gb": size / 1e9 for stage, size in peaks.items()}


def side_by_side(setup: Setup, sizes: ModelSizes, trainer: Trainer) -> dict[str, Any]:
    """Seconds of both sides by stage, run in turn, and the median of the ratios of the rounds."""
    loop, ours, theirs, metrics = PublishedLoop(trainer), list[Stages](), list[Stages](), {}
    loop.step()  # a warm-up
    for number in range(setup.sizes.repeats):
        metrics = trainer.step(2 + number)
        ours.append({stage: metrics[f"seconds/{stage}"] for stage in STAGES})
        theirs.append(loop.step())
    config, training = trainer.config, trainer.config.training
    images = len(config.tree().leaves) * training.prompts_per_step
    seconds = _medians(ours)
    total = statistics.median(sum(stages.values()) for stages in ours)
    return {
        "method": config.method.name,
        "resolution": config.model.height,
        "batch": config.sampling.batch_size,
        "gpus": 1,
        "prompts": training.prompts_per_step,
        "images_per_prompt": len(config.tree().leaves),
        "seconds": total,
        "images_per_second": images / total,
        "stages": seconds,
        "forward_passes": metrics["forward_passes"],
        "published": {
            "seconds": statistics.median(sum(stages.values()) for stages in theirs),
            "stages": _medians(theirs),
            "forward_passes": loop.forward_passes,
        },
        "ratio": _ratio(ours, theirs),
        "recipe": scaled(setup.config(sizes), config, seconds),
    }


def _medians(rounds: Sequence[Stages]) -> dict[str, float]:
    return {stage: statistics.median(entry[stage] for entry in rounds) for stage in STAGES}


def _ratio(ours: Sequence[Stages], theirs: Sequence[Stages]) -> float:
    """Seconds of the published loop : seconds of flowgrain, median of the rounds."""
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(sum(b.values()) / sum(a.values()) for a, b in pairs)


def scaled(recipe: Config, measured: Config, seconds: Stages) -> dict[str, Any]:
    """The step of the complete recipe, computed from the stages of the measured step.

    Every stage is scaled by its units: forward passes, images, images, and forward passes with
    gradient or of the old policy and the reference. Prompts are processed one after the other, as
    on one GPU.
    """
    full, part = prompt_cost(recipe), prompt_cost(measured)
    updates = [c.train_forward_passes + c.frozen_forward_passes for c in (full, part)]
    prompts = recipe.training.prompts_per_step / measured.training.prompts_per_step
    factors = {
        "sample": full.forward_passes / part.forward_passes,
        "decode": full.decodes / part.decodes,
        "score": full.decodes / part.decodes,
        "update": updates[0] / updates[1],
    }
    total = sum(prompts * factors[stage] * seconds[stage] for stage in STAGES)
    images = full.decodes * recipe.training.prompts_per_step
    return {
        "prompts": recipe.training.prompts_per_step,
        "images_per_prompt": full.decodes,
        "computed_seconds": total,
        "computed_images_per_second": images / total,
    }
