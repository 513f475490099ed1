"""Checks that a model is not destroyed: finite parameters, and images that can be scored."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowgrain.distributed import World
from flowgrain.distributed.sharding import local_tensor
from flowgrain.rewards import Scores
from flowgrain.training import checkpoint
from flowgrain.training.errors import Diverged, RunStopped
from flowgrain.training.evaluate import Evaluation
from flowgrain.training.run_files import forget_checkpoints, resume_command

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
        raise destroyed(trainer, f"step {step}", f"{name} contains NaN or infinity")


def check_failed_rewards(scores: Mapping[str, Scores], allowed: float) -> None:
    """Check that at most the share `allowed` of the images has no score.

    Raises:
        RunStopped: a reward failed on more images.
    """
    for name, of_reward in scores.items():
        if of_reward.failed > allowed * len(of_reward.values):
            raise RunStopped(
                f"reward {name!r} failed on {of_reward.failed} of {len(of_reward.values)} images "
                f"({of_reward.reason}), more than training.max_failed_rewards={allowed:g} allows"
            )


def check_images(images: Tensor, allowed: float, world: World) -> None:
    """Check the images [I, 3, H, W] of a rollout. All ranks must call it together.

    Raises:
        Diverged: too many images of all ranks contain NaN or infinity.
    """
    counts = world.gather_data((_broken(images), len(images)))
    broken, count = (sum(column) for column in zip(*counts, strict=True))
    excess = _excess(broken, count, allowed)
    if excess:
        raise Diverged(f"{broken} of {count} images contain NaN or infinity, {excess}")


def check_evaluation(trainer: Trainer, step: int, evaluation: Evaluation) -> None:
    """Check the images and the scores of an evaluation after training step `step`.

    Raises:
        Diverged: too many images contain NaN or infinity.
        EvaluationFailed: a reward failed on too many images.
    """
    allowed, place = trainer.config.training.max_failed_rewards, f"evaluation after step {step}"
    broken, count = _broken(evaluation.images), len(evaluation.images)
    excess = _excess(broken, count, allowed)
    if excess:
        reason = f"{broken} of {count} images contain NaN or infinity, {excess}"
        raise destroyed(trainer, place, reason)
    for name, scores in evaluation.scores.items():
        failed = int((~torch.from_numpy(scores).isfinite()).sum())
        excess = _excess(failed, len(scores), allowed)
        if excess:
            trained = name in trainer.rewards
            other = "" if trained else " or remove it from evaluation.rewards"
            raise EvaluationFailed(
                f"{place}: reward {name!r} failed on {failed} of {len(scores)} images "
                f"({evaluation.reasons.get(name)}), {excess}. Fix the reward{other}, "
                f"then resume with {trainer.resume_command}"
            )


def destroyed(trainer: Trainer, place: str, reason: str) -> Diverged:
    """The error of a run whose model is destroyed. All ranks must call it together.

    The current step is not saved. If it already has a checkpoint, this checkpoint is renamed like
    a damaged checkpoint, so that a resume uses an earlier checkpoint.
    """
    kept = trainer.world.on_main(lambda: _drop_checkpoint(trainer))
    text = f"{place}: the model is destroyed: {reason}. Nothing was exported"
    if trainer.steps_done == 0:
        settings = trainer.config
        return Diverged(
            f"{text}. No step was trained. Check the weights of "
            f"model.name={settings.model.name} and runtime.dtype={settings.runtime.dtype}"
        )
    return Diverged(f"{text}. {kept}. {smaller_rate(trainer)}")


def smaller_rate(trainer: Trainer) -> str:
    """The advice to resume with a third of the learning rate, at most a rate that is safe.

    That is 1e-4 for the bundled model, and the published rate of the method for other models.
    """
    config, rate = trainer.config, trainer.config.learning_rate
    limit = 1e-4
    if config.model.name != "shapes":
        with contextlib.suppress(ValueError):  # no rate was published for this kind of training
            limit = config.method.published_learning_rate(lora=config.lora.rank > 0)
    changes = {"optimizer.learning_rate": f"{min(rate / 3, limit):g}"}
    command = resume_command(trainer.out, trainer.recorder.given, changes)
    return f"Use a smaller learning rate than {rate:g}: {command}"


def _drop_checkpoint(trainer: Trainer) -> str:
    """Rename the checkpoint of the current step, if there is one. Returns what is left."""
    folder = trainer.out / "checkpoints"
    path, text = checkpoint.path_of(folder, trainer.steps_done), ""
    if path.exists():
        checkpoint.mark_damaged(path)
        text = f"Its checkpoint was renamed to damaged-{path.name}. "
    saved = checkpoint.checkpoints(folder)
    if saved:
        return f"{text}A resume uses {saved[-1]}"
    forget_checkpoints(trainer.out)
    return f"{text}There is no earlier checkpoint: a resume starts at step 0"


def _broken(images: Tensor) -> int:
    return int((~images.isfinite().flatten(1).all(1)).sum())


def _excess(failed: int, count: int, allowed: float) -> str:
    """Why `failed` of `count` images are too many. Empty if they are not."""
    if failed > allowed * count:
        return f"more than training.max_failed_rewards={allowed:g} allows"
    return "which leaves none" if failed == count > 0 else ""
