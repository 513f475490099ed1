"""Checks that a model is not destroyed: finite parameters, and images that can be scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowgrain.distributed import World
from flowgrain.distributed.sharding import local_tensor
from flowgrain.training import checkpoint
from flowgrain.training.errors import Diverged, RunStopped
from flowgrain.training.evaluate import Evaluation

if TYPE_CHECKING:
    from flowgrain.training.trainer import Trainer


class EvaluationFailed(RunStopped):
    """A reward failed on too many images of an evaluation. The model may be good."""


@torch.no_grad()
def first_not_finite(tensors: Mapping[str, Tensor], world: World) -> str | None:
    """Name of the first tensor with NaN or infinity on any rank. All ranks must call it together.

    Only the floating-point tensors are checked.
    """
    floating = {name: t for name, t in tensors.items() if t.is_floating_point()}
    flags = [local_tensor(t).isfinite().all() for t in floating.values()]
    # A single transfer from the device.
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    own = next((name for name, good in zip(floating, finite, strict=True) if not good), None)
    return next((name for name in world.gather(own) if name is not None), None)


def check_weights(trainer: Trainer, step: int) -> None:
    """Check the parameters, the EMA and the old policy after training step `step`.

    Raises:
        Diverged: a value is NaN or infinite. The step is neither saved nor exported.
    """
    name = first_not_finite(trainer.policy.tensors(), trainer.world)
    if name is not None:
        raise Diverged(
            f"step {step}: the model is destroyed: {name} contains NaN or infinity. "
            f"{_what_remains(trainer)}"
        )


def check_evaluation(trainer: Trainer, step: int, evaluation: Evaluation) -> None:
    """Check the images and the scores of an evaluation after training step `step`.

    Raises:
        Diverged: too many images contain NaN or infinity.
        EvaluationFailed: a reward failed on too many images.
    """
    allowed = trainer.config.training.max_failed_rewards
    limit = f"more than training.max_failed_rewards={allowed:g} allows"
    broken = ~evaluation.images.isfinite().flatten(1).all(1)
    if _too_many(int(broken.sum()), len(broken), allowed):
        raise Diverged(
            f"evaluation after step {step}: the model is destroyed: {int(broken.sum())} of "
            f"{len(broken)} images contain NaN or infinity, {limit}. {_what_remains(trainer)}"
        )
    for name, scores in evaluation.scores.items():
        failed = int((~torch.from_numpy(scores).isfinite()).sum())
        if _too_many(failed, len(scores), allowed):
            raise EvaluationFailed(
                f"evaluation after step {step}: reward {name!r} failed on {failed} of "
                f"{len(scores)} images ({evaluation.reasons.get(name)}), {limit}. "
                f"Fix the reward or remove it from evaluation.rewards, then resume with "
                f"{trainer.resume_command}"
            )


def _too_many(failed: int, count: int, allowed: float) -> bool:
    return failed > allowed * count or failed == count > 0


def _what_remains(trainer: Trainer) -> str:
    """The last checkpoint, and how to go on from it or from the start."""
    saved = checkpoint.checkpoints(trainer.out / "checkpoints")
    kept = f"The last checkpoint is {saved[-1]}"
    if not saved:
        kept = "There is no checkpoint, so the resumed run starts again from step 0"
    return f"Nothing was exported. {kept}. {smaller_rate(trainer)}"


def smaller_rate(trainer: Trainer) -> str:
    """The advice to resume with a smaller learning rate, at most the published rate."""
    config, rate = trainer.config, trainer.config.learning_rate
    optimizer = config.optimizer.model_copy(update={"learning_rate": None})
    try:
        published = config.model_copy(update={"optimizer": optimizer}).learning_rate
    except ValueError:  # the method has none for this kind of training
        published = 1e-4
    return (
        f"Use a smaller learning rate than {rate:g}: "
        f"{trainer.resume_command} optimizer.learning_rate={min(rate / 3, published):g}"
    )
