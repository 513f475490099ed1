"""The training loop: steps, evaluations, metrics and checkpoints until a run ends."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from flowgrain.training.errors import Diverged, Interrupted
from flowgrain.training.rollout_batch import Metrics
from flowgrain.training.signals import StopSignal

if TYPE_CHECKING:
    from flowgrain.training.trainer import Trainer


def run_steps(
    trainer: Trainer, signals: StopSignal, progress: Callable[[Metrics], None] | None
) -> None:
    """Run the remaining training steps of `trainer`.

    Args:
        trainer: the run.
        signals: signals that end the run after the current step.
        progress: called with the metrics of every step.

    Raises:
        Diverged: too many updates in a row were skipped. The run is saved.
        Interrupted: a signal arrived. The current step is finished and saved.
    """
    config, main = trainer.config, trainer.world.is_main
    limit = config.training.max_seconds
    seconds = sum(m["seconds"] for m in trainer.recorder.read_metrics() if "seconds" in m)
    seconds = trainer.world.gather(seconds)[0]
    if trainer.steps_done == 0 and config.evaluation.is_due(0, last=False):
        first = {"step": 0, **evaluate_and_record(trainer, 0)}
        if main:
            trainer.recorder.write_metrics(first)
    for step in range(trainer.steps_done + 1, config.training.max_steps + 1):
        if limit is not None and seconds >= limit:
            break  # the run reached the limit before it was resumed
        metrics = {"step": step, **trainer.step(step)}
        # All ranks stop after the same step: by the clock of rank 0, or by a signal to any rank.
        ranks = trainer.world.gather((metrics["seconds"], signals.number))
        seconds += ranks[0][0]
        stop = next((number for _, number in ranks if number is not None), None)
        diverged = trainer.optimizer.diverged
        last = step == config.training.max_steps or (limit is not None and seconds >= limit)
        if config.evaluation.is_due(step, last) and not diverged:
            metrics |= evaluate_and_record(trainer, step)
        if main:
            trainer.recorder.write_metrics(metrics)
        interval = config.training.checkpoint_every
        due = bool(interval) and step % interval == 0
        if last or stop is not None or diverged or due:
            trainer.save(metrics)
        if progress is not None:
            progress(metrics)
        if diverged:
            raise Diverged(_divergence(trainer))
        if last:
            break
        if stop is not None:
            name = signal.Signals(stop).name
            raise Interrupted(
                f"{name}: step {step} is finished and saved. Resume with {trainer.resume_command}"
            )


def evaluate_and_record(trainer: Trainer, step: int) -> Metrics:
    """Evaluate the policy after training step `step`. Returns the metrics "eval/NAME"."""
    evaluation = trainer.evaluate(num_images=trainer.config.evaluation.images_of_run)
    if trainer.world.is_main:
        trainer.recorder.write_evaluation(step, evaluation)
    values = evaluation.means() | evaluation.part_means()
    return {f"eval/{name}": value for name, value in values.items()}


def _divergence(trainer: Trainer) -> str:
    """The message of a run that diverged."""
    settings, skipped = trainer.config.optimizer, trainer.optimizer.skipped_in_a_row
    rate = trainer.config.learning_rate
    return (
        f"{skipped} updates in a row had a non-finite loss or gradient and were skipped "
        f"(optimizer.max_skipped_updates={settings.max_skipped_updates}). "
        f"Use a smaller learning rate than {rate:g}: "
        f"{trainer.resume_command} optimizer.learning_rate={rate / 3:g}"
    )
