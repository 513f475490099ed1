"""The training loop: steps, evaluations, metrics and checkpoints until a run ends."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from traceback import clear_frames
from typing import TYPE_CHECKING

from flowgrain.training import checkpoint, state
from flowgrain.training.best import export_best
from flowgrain.training.errors import Diverged, Interrupted, RunStopped, StoppedByAlarm
from flowgrain.training.evaluate import mean, warn_of_failures
from flowgrain.training.health import (
    EvaluationFailed,
    check_evaluation,
    check_weights,
    smaller_rate,
)
from flowgrain.training.rollout_batch import Metrics
from flowgrain.training.run_files import resume_command
from flowgrain.training.signals import StopRequested, StopSignal, check_stop

if TYPE_CHECKING:
    from flowgrain.training.trainer import Trainer


def run_steps(
    trainer: Trainer, signals: StopSignal, progress: Callable[[Metrics], None] | None
) -> None:
    """Run the remaining training steps of `trainer`.

    Args:
        trainer: the run.
        signals: signals that end the run.
        progress: called with the metrics of every step.

    Raises:
        Diverged: too many updates in a row were skipped (the run is saved), or parameters or
            images are not finite (the last step is not saved).
        EvaluationFailed: a reward failed on too many images. The run is saved, except at step 0.
        StoppedByAlarm: an alarm stops the run. The run is saved.
        Interrupted: a signal arrived. The run is saved.
    """
    config, main = trainer.config, trainer.world.is_main
    limit = config.training.max_seconds
    lines = trainer.recorder.read_metrics()
    seconds = trainer.world.gather(sum(line.get("seconds", 0) for line in lines))[0]
    _evaluate_base(trainer)
    _repeat_evaluation(trainer, limit is not None and seconds >= limit)
    for step in range(trainer.steps_done + 1, config.training.max_steps + 1):
        if limit is not None and seconds >= limit:
            break  # the run reached the limit before it was resumed
        metrics = {"step": step, **_unless_stopped(trainer, partial(trainer.step, step))}
        check_weights(trainer, step)
        # All ranks stop after the same step: by the clock of rank 0, or by a signal to any rank.
        ranks = trainer.world.gather((metrics["seconds"], signals.number))
        seconds += ranks[0][0]
        stop = next((number for _, number in ranks if number is not None), None)
        diverged = trainer.optimizer.diverged
        failure: RunStopped | None = Diverged(_divergence(trainer)) if diverged else None
        last = step == config.training.max_steps or (limit is not None and seconds >= limit)
        if config.evaluation.is_due(step, last) and not diverged:
            try:
                metrics |= evaluate_and_record(trainer, step)
                failure = _alarm(trainer, last)
            except EvaluationFailed as error:
                failure = error
            except StopRequested as request:
                stop, last = request.number, False
        if main:
            trainer.recorder.write_metrics(metrics)
        every = config.training.checkpoint_every
        if last or stop is not None or failure or (every and step % every == 0):
            trainer.save(metrics)
        if progress is not None:
            progress(metrics)
        if failure is not None:
            raise _with_export(trainer, failure)
        if last:
            break
        if stop is not None:
            name = signal.Signals(stop).name
            raise Interrupted(
                f"{name}: step {step} is finished and saved. Resume with {trainer.resume_command}"
            )


def _unless_stopped(trainer: Trainer, work: Callable[[], Metrics]) -> Metrics:
    """The metrics of `work`, which changes no parameter if a signal stops it.

    Raises:
        Interrupted: a signal arrived. The run is saved as it was before `work`.
    """
    try:
        check_stop(trainer.world)
        return work()
    except StopRequested as request:
        trainer.optimizer.adamw.zero_grad(set_to_none=True)
        clear_frames(request.__traceback__)  # the latents and graphs of the abandoned step
        saved = state.ensure_saved(trainer)
        raise Interrupted(
            f"{request}: stopped after step {trainer.steps_done}; {saved}. "
            f"Resume with {trainer.resume_command}"
        ) from None


def _evaluate_base(trainer: Trainer) -> None:
    """Evaluate the model before training, if this is due."""
    if trainer.steps_done == 0 and trainer.config.evaluation.is_due(0, last=False):
        first = {"step": 0, **_unless_stopped(trainer, partial(evaluate_and_record, trainer, 0))}
        if trainer.world.is_main:
            trainer.recorder.write_metrics(first)


def _repeat_evaluation(trainer: Trainer, out_of_time: bool) -> None:
    """Repeat the evaluation of the last step, if a signal stopped it.

    Args:
        trainer: the run.
        out_of_time: whether the run has reached training.max_seconds.
    """
    step, config = trainer.steps_done, trainer.config
    lines = trainer.recorder.read_metrics()
    line = lines[-1] if lines and lines[-1]["step"] == step else {}
    last = out_of_time or step == config.training.max_steps
    due = config.evaluation.is_due(step, last)
    evaluated = any(name.startswith("eval/") for name in line)
    if not trainer.world.gather(step > 0 and due and bool(line) and not evaluated)[0]:
        return
    line |= _unless_stopped(trainer, partial(evaluate_and_record, trainer, step))
    if trainer.world.is_main:
        trainer.recorder.replace_last(line)
    trainer.save(line)
    failure = _alarm(trainer, last)
    if failure is not None:
        raise _with_export(trainer, failure)


def what_is_kept(trainer: Trainer) -> str:
    """What remains of a run whose process ends at once."""
    saved = checkpoint.checkpoints(trainer.out / "checkpoints")
    if not saved:
        return (
            f"No checkpoint was written. Start the run again, with another --out than {trainer.out}"
        )
    return f"The last checkpoint is {saved[-1]}. Resume with {trainer.resume_command}"


def evaluate_and_record(trainer: Trainer, step: int) -> Metrics:
    """Evaluate the policy after training step `step`, and compare it with the base model.

    Returns:
        The metrics eval/NAME and eval/monitor/NAME, and the number of alarms if there is a rule.
    """
    evaluation = trainer.evaluate(num_images=trainer.config.evaluation.images_of_run)
    check_evaluation(trainer, step, evaluation)
    watch = trainer.watch
    evaluation = watch.measure(step, evaluation)
    base = watch.judge(step, evaluation)
    trainer.optimizer.scale_rate(watch.rate_factor)
    if trainer.world.is_main:
        warn_of_failures(evaluation)
        trainer.recorder.write_evaluation(step, evaluation, base)
        trainer.recorder.write_alarms([alarm.as_dict() for alarm in watch.alarms])
    values = evaluation.means() | evaluation.part_means()
    values |= {f"monitor/{name}": mean(column) for name, column in evaluation.monitors.items()}
    metrics: Metrics = {f"eval/{name}": value for name, value in values.items()}
    return metrics | ({"alarms": len(watch.alarms)} if base else {})


def _alarm(trainer: Trainer, last: bool) -> StoppedByAlarm | None:
    """The error of a run that stops because of an alarm. None if it continues.

    Args:
        trainer: the run.
        last: whether this is the last step, so that the run ends anyway.
    """
    alarms = trainer.watch.alarms
    if not alarms or last or trainer.config.watch.action != "stop":
        return None
    names = ", ".join(alarm.finding.monitor for alarm in alarms)
    given, out = trainer.recorder.given, trainer.out
    go_on = resume_command(out, given, {"watch.action": "warn"})
    found = checkpoint.best(out / "checkpoints")
    best = f"The best checkpoint without an alarm is {found}"
    if found is None:
        best = "No saved checkpoint was evaluated without an alarm"
    return StoppedByAlarm(
        f"{alarms[0].message} The run stopped (watch.action=stop; alarms: {names}) and is saved. "
        f"{best}. See the images with flowgrain view {out}. To resume without a stop: {go_on}"
    )


def _with_export(trainer: Trainer, failure: RunStopped) -> RunStopped:
    """`failure`. Exports the best checkpoint of a run that an alarm stopped."""
    if isinstance(failure, StoppedByAlarm):
        best = export_best(trainer)
        if best is not None:
            trainer.recorder.trackers.artifact(best)
    return failure


def _divergence(trainer: Trainer) -> str:
    """The message of a run that diverged."""
    settings, skipped = trainer.config.optimizer, trainer.optimizer.skipped_in_a_row
    return (
        f"{skipped} updates in a row had a non-finite loss or gradient and were skipped "
        f"(optimizer.max_skipped_updates={settings.max_skipped_updates}). "
        f"{smaller_rate(trainer)}"
    )
