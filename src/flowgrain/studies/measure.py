"""Measurement of trained models, and the speed of this machine."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowgrain.config import Config
from flowgrain.rewards import score
from flowgrain.shapes.features import diversity, features, frechet, true_features
from flowgrain.studies.comparison import Measurement
from flowgrain.studies.entries import Entry
from flowgrain.training.evaluate import Evaluation
from flowgrain.training.pictures import contact_sheet, to_pixels
from flowgrain.training.trainer import Trainer

NUM_SHOWN = 8
"""Number of images of a run that are saved, for every number of inference steps."""


def measure(trainer: Trainer, how: Measurement, folder: Path) -> dict[str, dict[str, float]]:
    """Every metric of a trained model, by number of inference steps.

    Writes the first images of every number of steps to `folder`/pictures-STEPS.png.
    """
    return {str(steps): _measure_at(trainer, how, steps, folder) for steps in how.num_steps}


def _measure_at(
    trainer: Trainer, how: Measurement, num_steps: int, folder: Path
) -> dict[str, float]:
    count, per_prompt = min(how.num_prompts, len(trainer.eval_prompts)), how.images_per_prompt
    prompts = trainer.eval_prompts[:count] * per_prompt
    evaluation = trainer.evaluate(num_steps, prompts=prompts)
    shown = to_pixels(evaluation.images[:NUM_SHOWN])
    contact_sheet(shown, NUM_SHOWN).save(folder / f"pictures-{num_steps}.png")
    values = evaluation.means() | evaluation.part_means()
    if trainer.config.model.name == "shapes":  # the features are of this model's images
        values |= _image_statistics(evaluation, per_prompt)
    return values


def _image_statistics(evaluation: Evaluation, per_prompt: int) -> dict[str, float]:
    """Frechet distance to true renderings, and diversity. NaN for images that are not finite."""
    of_images = features(evaluation.images)
    if not np.isfinite(of_images).all():
        return {"frechet": math.nan, "diversity": math.nan}
    truth = true_features([prompt.text for prompt in evaluation.prompts])
    by_repeat = of_images.reshape(per_prompt, -1, of_images.shape[1])
    adjacent = by_repeat.swapaxes(0, 1).reshape(of_images.shape)
    return {"frechet": frechet(of_images, truth), "diversity": diversity(adjacent, per_prompt)}


def machine_speed(config: Config) -> dict[str, float]:
    """Rows per second on one thread of this machine, by stage: "passes", "decodes", "scores"."""
    before = torch.get_num_threads()
    trainer = Trainer(config.with_changes({"runtime.threads": 1}))
    try:
        count, device = config.sampling.batch_size, trainer.device
        policy, backbone = trainer.policy, trainer.backbone
        noise = torch.randn(count, *backbone.latent_shape, device=device)
        sigma = torch.full((count,), 0.5, device=device)
        prompts = trainer.prompts[:1] * count
        cond = policy.encode([prompt.text for prompt in prompts])
        guidance = config.sampling.guidance_scale
        images = backbone.decode(noise).cpu()
        work: dict[str, Callable[[], Any]] = {
            "passes": lambda: policy.sample_velocity(noise, sigma, cond, guidance),
            "decodes": lambda: backbone.decode(noise),
            "scores": lambda: [
                score(reward, images, prompts) for reward in trainer.rewards.values()
            ],
        }
        return {name: count * _calls_per_second(call) for name, call in work.items()}
    finally:
        torch.set_num_threads(before)


def _calls_per_second(call: Callable[[], Any]) -> float:
    """Calls of `call` per second. The first call is a warm-up."""
    call()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < 1.0:
        call()
        count += 1
    return count / (time.perf_counter() - begin)


def estimated_seconds(entry: Entry, speed: Mapping[str, float]) -> float:
    """The seconds of a run and of its measurement on one thread with `machine_speed`."""
    config = entry.config
    if config.training.max_seconds is not None:
        return config.training.max_seconds + entry.evaluation_passes / speed["passes"]
    images = (entry.units - entry.passes) / (1 + len(config.rewards))
    sampling = (entry.passes + entry.evaluation_passes) / speed["passes"]
    return sampling + images / speed["decodes"] + images / speed["scores"]
