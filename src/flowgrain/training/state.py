"""Saving and restoring a trainer, and the settings that a resumed run must keep."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrain.config.schema import Config
from flowgrain.data import Prompt
from flowgrain.image_data import identity
from flowgrain.methods import Method
from flowgrain.records.metrics import parse_metrics
from flowgrain.settings import Section, SettingsError
from flowgrain.training import checkpoint
from flowgrain.training.best import export_best
from flowgrain.training.errors import Diverged, RunStopped
from flowgrain.training.fit import check_disk, check_writable
from flowgrain.training.health import destroyed
from flowgrain.training.restart import LOCK_SECONDS, belongs_to_job, remember_job
from flowgrain.training.rollout_batch import Metrics
from flowgrain.training.run_files import forget_checkpoints, had_checkpoints, remember_checkpoints
from flowgrain.training.watch_files import update_best

if TYPE_CHECKING:
    from flowgrain.training.trainer import Trainer

log = logging.getLogger(__name__)


def save(trainer: Trainer, metrics: Metrics | None) -> Path:
    """Write a checkpoint of everything that the next step depends on."""
    config, policy, optimizer = trainer.config, trainer.policy, trainer.optimizer
    source = trainer.collector.source
    state = {
        "step": trainer.steps_done,
        "config": config.to_dict(),
        "prompts": fingerprint(trainer.prompts),
        "method": trainer.method.state_dict(),
        "policy": policy.state_dict(),
        "stepped": optimizer.stepped(),
        "skipped_in_a_row": optimizer.skipped_in_a_row,
        "scaler": optimizer.scaler.state_dict(),
        "watch": trainer.watch.state_dict(),
        "rollout": source.state_dict(trainer.steps_done),
        "records": trainer.world.on_main(trainer.recorder.state_dict),
    }
    path = checkpoint.save(
        trainer.out / "checkpoints",
        trainer.steps_done,
        {**policy.tensors(), **optimizer.tensors(), **source.tensors(trainer.steps_done)},
        state,
        _score(metrics, trainer.collector.reward_weights),
        config.training.keep_checkpoints,
        trainer.world,
        trainer.recorder.metrics_text() if trainer.world.is_main else "",
    )
    if trainer.world.is_main:
        remember_checkpoints(trainer.out)
        update_best(trainer.out)
    return path


def restore(trainer: Trainer) -> list[str]:
    """Load the last good checkpoint. See `Trainer.restore`."""
    return _restore(trainer)[0]


def _restore(trainer: Trainer) -> tuple[list[str], Path | None]:
    """Load the last good checkpoint: a message for each damaged checkpoint, and its path."""
    folder, world = trainer.out / "checkpoints", trainer.world
    path, state, damaged = checkpoint.load_last_good(folder, world)
    if path is None:
        return damaged, None
    check_kept(trainer.config, state["config"], trainer.out)
    if fingerprint(trainer.prompts) != state["prompts"]:
        kind = trainer.config.data.kind
        raise SettingsError(
            f"data.{kind or 'prompts'}: the training prompts {'and images ' if kind else ''}differ "
            f"from those of the run in {trainer.out}. Use the same prompts, or start a new run."
        )
    policy, optimizer, source = trainer.policy, trainer.optimizer, trainer.collector.source
    optimizer.allocate(state["stepped"])
    policy.updates = state["policy"]["updates"]  # decides which tensors the source has
    source.load_state_dict(state["step"], state.get("rollout", {}))
    older = source.tensors(state["step"])
    checkpoint.read(path, {**policy.tensors(), **optimizer.tensors(), **older}, world)
    policy.load_state_dict(state["policy"])
    trainer.method.load_state_dict(state["method"])
    if "watch" in state:  # not in checkpoints of version 0.1
        trainer.watch.load_state_dict(state["watch"])
    optimizer.scale_rate(trainer.watch.rate_factor)
    trainer.steps_done = state["step"]
    if optimizer.scaler.is_enabled():
        optimizer.scaler.load_state_dict(state["scaler"])
    trainer.recorder.load_state_dict(state.get("records", {}), trainer.steps_done)
    skipped = state["skipped_in_a_row"]
    # A run that stopped because it diverged may be resumed with other settings.
    limit = trainer.config.optimizer.max_skipped_updates
    optimizer.skipped_in_a_row = skipped if skipped < limit else 0
    return damaged, path


def resume(trainer: Trainer) -> list[str]:
    """Restore, and delete the files of later steps. See `Trainer.resume`."""
    try:
        return _resume(trainer)
    except OSError as error:
        trainer.lock.release()
        if isinstance(error, PermissionError):
            raise SettingsError(f"{trainer.out}: is not writable ({error}). Chmod it.") from error
        raise RunStopped(
            f"the run in {trainer.out} cannot be resumed yet: {error}. Nothing is lost. "
            f"Free some disk space or repair the disk, then resume with {trainer.resume_command}"
        ) from error
    except BaseException:
        trainer.lock.release()
        raise


def _resume(trainer: Trainer) -> list[str]:
    folder, world = trainer.out / "checkpoints", trainer.world

    def lock() -> list[str]:
        _check_not_lost(trainer)
        messages = trainer.lock.acquire(LOCK_SECONDS if belongs_to_job(trainer.out) else 0.0)
        checkpoint.repair(folder)
        return messages

    messages = world.on_main(lock)
    damaged, restored = _restore(trainer)

    def discard() -> list[str]:
        for path in checkpoint.checkpoints(folder):
            if checkpoint.step_of(path) > trainer.steps_done:
                checkpoint.mark_damaged(path)
        if restored is None:
            forget_checkpoints(trainer.out)
        metrics = (restored / checkpoint.METRICS).read_text("utf-8") if restored else ""
        return trainer.recorder.discard_after(trainer.steps_done, metrics)

    return [*messages, *damaged, *world.on_main(discard)]


def _check_not_lost(trainer: Trainer) -> None:
    """Check that the checkpoints of the run were not deleted.

    Raises:
        SettingsError: the run has metrics and had a checkpoint, but has none now.
    """
    folder, file = trainer.out / "checkpoints", trainer.out / "metrics.jsonl"
    content = file.read_bytes() if file.exists() else b""
    found = checkpoint.checkpoints(folder) or list(folder.glob(".old-step-*"))
    lost = not folder.is_dir() or (not found and had_checkpoints(trainer.out))
    if content.strip() and lost:
        last = max((line["step"] for line in parse_metrics(content)[0]), default=0)
        raise SettingsError(
            f"{folder}: the checkpoints of this run are gone, but it was trained to step {last}. "
            "Restore the directory, or start a new run with the same settings: "
            f"flowgrain train {trainer.out} --out NEW_DIRECTORY"
        )


def begin(trainer: Trainer, start: Callable[[], None] | None = None) -> None:
    """Lock the directory of a run, create its files, and call `start`.

    Raises:
        SettingsError: the directory is locked, cannot be written, contains a run that is not
            being resumed, or its disk is too small.
    """
    trainer.recorder.check()
    try:
        check_writable(trainer.out)
        check_disk(trainer.config, trainer.size, trainer.out)
        for message in trainer.lock.acquire():
            log.warning("%s: %s", trainer.out, message)
        trainer.collector.source.start()  # before files, so that an error leaves no run behind
        remember_job(trainer.out)
        trainer.recorder.start()
    except OSError as error:
        if trainer.steps_done:
            raise
        raise SettingsError(
            f"--out {trainer.out}: cannot be created ({error}). Set another directory."
        ) from error
    if start is not None:
        start()


def ensure_saved(trainer: Trainer) -> str:
    """Save the current step if it has no checkpoint. Returns a message with the path."""
    newest = checkpoint.path_of(trainer.out / "checkpoints", trainer.steps_done)
    try:
        exists = trainer.world.gather(newest.exists())[0]
        saved = newest if exists else trainer.save(trainer.world.on_main(partial(_line, trainer)))
        return f"the run is saved in {saved}"
    except (OSError, checkpoint.CheckpointError) as error:
        return f"the last steps could not be saved ({error})"


def _line(trainer: Trainer) -> Metrics | None:
    """The metrics of the current step, which may have an evaluation. None if it has no line."""
    lines = trainer.recorder.read_metrics()
    return lines[-1] if lines and lines[-1]["step"] == trainer.steps_done else None


def finish(trainer: Trainer) -> None:
    """Write the last records and the export of a run that has trained all steps."""
    trainer.recorder.finish()
    exported = trainer.export()
    trainer.recorder.trackers.artifact(export_best(trainer) or exported)


def stopped(trainer: Trainer, step: int, error: RunStopped) -> RunStopped:
    """The error of a run that `error` stopped in training step `step`. Saves an intact run."""
    trainer.optimizer.adamw.zero_grad(set_to_none=True)
    if isinstance(error, Diverged):
        return destroyed(trainer, f"step {step}", str(error))
    saved = ensure_saved(trainer)
    reason = str(error).removesuffix(".")
    return RunStopped(f"{reason}; {saved}. Resume with {trainer.resume_command}")


def stopped_by_disk(trainer: Trainer, error: OSError) -> RunStopped:
    """The error of a run whose files cannot be written. Saves the run if possible."""
    # Writing a checkpoint needs all ranks, but the error is only raised on this rank.
    several = trainer.world.size > 1
    saved = "the last checkpoint is unchanged" if several else ensure_saved(trainer)
    return RunStopped(
        f"{error}; {saved}. Free some disk space or repair the disk, "
        f"then resume with {trainer.resume_command}"
    )


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of the training prompts and their order, and of the images of a data set."""
    texts = "\0".join(prompt.text for prompt in prompts)
    digest = hashlib.sha256(texts.encode())
    for part in identity(prompts):  # contents of images: a copy of all of them may not fit
        digest.update(part)
    return digest.hexdigest()


_EARLIER = {
    "sampling.grid": "shifted",
    "method.reward_weights": "as_given",
    "rollout.max_staleness": 0,
}
"""Values of settings in runs that were started before the settings existed."""


def check_kept(config: Config, saved: Mapping[str, Any], folder: Path) -> None:
    """Check that every setting that a run must keep has the value of the checkpoint.

    Raises:
        SettingsError: a setting has changed.
    """
    now = config.to_dict()
    for path in kept_settings(config):
        old, new = _at(saved, path), _at(now, path)
        if old is None:
            old = _EARLIER.get(path)
        if old != new:
            raise SettingsError(
                f"{path}={new}: the run in {folder} was started with {old} and must keep it. "
                "Start a new run."
            )
    old_weights = {reward["name"]: reward["weight"] for reward in saved["rewards"]}
    if old_weights != config.reward_weights:
        raise SettingsError(
            f"rewards: the weights are {config.reward_weights}. The run in {folder} was started "
            f"with {old_weights} and must keep them. Start a new run."
        )
    old_decay, decay = _at(saved, "training.ema_decay"), config.training.ema_decay
    if bool(old_decay) != bool(decay):
        raise SettingsError(
            f"training.ema_decay={decay}: the run in {folder} has {old_decay}. "
            "A resumed run cannot start or stop the EMA."
        )


def kept_settings(config: Config) -> Iterator[str]:
    """Full paths of the settings that a resumed run must keep: the fields with `keep=True`."""
    yield "method.name"
    yield from _kept(type(config.method), "method.")
    yield from _kept(Config, "")


def _kept(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            if kind is not Method:
                yield from _kept(kind, f"{prefix}{name}.")
        elif isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("keep"):
            yield f"{prefix}{name}"


def _at(values: Mapping[str, Any], path: str) -> Any:
    found: Any = values
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _score(metrics: Metrics | None, weights: Mapping[str, float]) -> float | None:
    """The weighted sum of the evaluated trained rewards.

    None if nothing was evaluated, or if the evaluation raised an alarm.
    """
    if metrics is None or metrics.get("alarms"):
        return None
    found = {name: metrics[f"eval/{name}"] for name in weights if f"eval/{name}" in metrics}
    return sum(weights[name] * value for name, value in found.items()) if found else None
