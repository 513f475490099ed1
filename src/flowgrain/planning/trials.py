"""Trials of the parts of a model: a forward pass, an approximate tail, decoding, a reward.

Shapes: B rows, *L latent, H x W pixels.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrain.data import Prompt
from flowgrain.models import Conditioning, take
from flowgrain.rewards import NOT_FINITE, GroupReward, Reward, score
from flowgrain.training import Trainer

MAX_TAIL_ERROR = 0.05
"""Relative error of quantized velocities above which the check fails."""
MAX_ROWS = 64
"""Largest batch of the trial forward pass."""


@dataclass(frozen=True)
class Trial:
    """A batch of noise for trial forward passes.

    Attributes:
        trainer: trainer of the run.
        x: latents [B, *L].
        sigma: noise levels [B].
        cond: conditioning with B rows.
    """

    trainer: Trainer
    x: Tensor
    sigma: Tensor
    cond: Conditioning

    @classmethod
    def of(cls, trainer: Trainer, cond: Conditioning) -> "Trial":
        """A batch with the batch size of the run, but at most 64 rows.

        Args:
            trainer: trainer of the run.
            cond: conditioning of one prompt.
        """
        rows = min(trainer.config.sampling.batch_size, MAX_ROWS)
        x = torch.randn(rows, *trainer.backbone.latent_shape, device=trainer.device)
        sigma = torch.full((rows,), 0.5, device=trainer.device)
        index = torch.zeros(rows, dtype=torch.long, device=trainer.device)
        return cls(trainer, x, sigma, take(cond, index))

    def velocity(self) -> Tensor:
        """Velocity [B, *L] of the policy."""
        guidance = self.trainer.config.sampling.guidance_scale
        return self.trainer.policy.sample_velocity(self.x, self.sigma, self.cond, guidance)


def encode_first(trainer: Trainer) -> Conditioning:
    """Conditioning of the first training prompt, one row."""
    return trainer.policy.encode([trainer.prompts[0].text])


def describe_conditioning(cond: Conditioning) -> str:
    """The names and shapes of a conditioning."""
    return ", ".join(f"{name} {list(value.shape[1:])}" for name, value in cond.items())


def forward_rate(trial: Trial) -> float:
    """Rows per second through the model.

    Raises:
        ValueError: the velocity is not finite.
    """
    rate = 0.0
    for _ in range(2):  # the first call is slower
        begin = time.perf_counter()
        finite = bool(trial.velocity().isfinite().all())  # waits for the device
        rate = len(trial.x) / (time.perf_counter() - begin)
        if not finite:
            raise ValueError("the velocity is not finite. Try runtime.dtype=float32")
    return rate


def describe_rate(trial: Trial, rate: float) -> str:
    """The rate of a trial forward pass in words."""
    return f"{len(trial.x)} rows, {rate:,.0f} rows per second"


def tail_quality(trial: Trial) -> str:
    """Speed of approximate tails, and the relative error of their first step.

    Raises:
        ValueError: the velocity is not finite, or a quantized copy is too inexact.
    """
    sampling, x = trial.trainer.config.sampling, trial.x
    exact = trial.velocity().float()
    error = seconds = 0.0
    with trial.trainer.collector.tails.open() as velocity:
        for step in range(3):  # a cache makes the third call cheaper, but not the first two
            begin = time.perf_counter()
            sigma = trial.sigma - 0.05 * step
            v = velocity(x, sigma, trial.cond, sampling.guidance_scale, step > 0)
            if not v.isfinite().all():
                raise ValueError("the velocity is not finite")
            seconds = time.perf_counter() - begin
            if step == 0:
                error = float((v.float() - exact).norm() / exact.norm())
    if sampling.tail_weights != "same" and error > MAX_TAIL_ERROR:
        raise ValueError(
            f"the relative error of quantized velocities is {error:.1%}, more than "
            f"{MAX_TAIL_ERROR:.0%}. Remove sampling.tail_weights={sampling.tail_weights}"
        )
    return (
        f"{len(x)} rows, {len(x) / seconds:,.0f} rows per second in the third step, "
        f"relative error of the first step {error:.1%}"
    )


def decode_noise(trial: Trial) -> Tensor:
    """An image [1, 3, H, W] of noise."""
    return trial.trainer.backbone.decode(trial.x[:1]).cpu()


def describe_image(images: Tensor) -> str:
    """The size of an image in words."""
    height, width = images.shape[-2:]
    return f"an image of {height} x {width} pixels"


def score_noise(reward: Reward, images: Tensor | None, prompt: Prompt) -> str:
    """The score of an image of noise.

    Raises:
        ValueError: there is no image, or the reward failed.
    """
    if images is None:
        raise ValueError("there is no image to score, because decoding failed")
    count = 2 if isinstance(reward, GroupReward) else 1
    scores = score(reward, images.repeat(count, 1, 1, 1), [prompt] * count)
    if not scores.failed:
        return f"{float(scores.values[0]):.3f} for an image of noise"
    if scores.reason == NOT_FINITE:
        return "does not apply to the first prompt"
    raise ValueError(scores.reason or "no score")
