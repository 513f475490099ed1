"""Running a comparison: all runs, one after another or in several processes, resumable."""

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flowgrain.config.load import read_yaml, validate
from flowgrain.heap import retain_freed_memory
from flowgrain.methods.calibration import calibration_cost
from flowgrain.models.quiet import quiet_libraries
from flowgrain.records.files import write_atomically
from flowgrain.registry import load_plugin
from flowgrain.settings import SettingsError
from flowgrain.studies import workers
from flowgrain.studies.comparison import Comparison, Measurement
from flowgrain.studies.entries import Entry, plan_entries
from flowgrain.studies.measure import NUM_SHOWN, measure
from flowgrain.studies.results import (
    BASE,
    Result,
    read_result,
    result_file,
    units_of_step,
)
from flowgrain.training import Diverged, Interrupted, RunStopped, Trainer
from flowgrain.training.run_files import describe_environment


@dataclass
class Progress:
    """Progress of a comparison.

    Attributes:
        total: number of runs, with the base model.
        done: number of finished runs.
        diverged: reason by name, for finished runs whose training diverged.
    """

    total: int
    done: int = 0
    diverged: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A run for a worker process.

    Attributes:
        name: name of the run's directory.
        folder: directory of the comparison.
        settings: plain values, because the classes of a plugin cannot be pickled.
        measurement: measurement of the trained model.
        label: the method. None: the base model, which is not trained.
        reward_set: label of the trained rewards.
        seed: seed of the run.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    measurement: Measurement
    label: str | None = None
    reward_set: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Outcome:
    """A run that ended: finished, possibly after its training diverged, or stopped by a failure."""

    name: str
    diverged: str | None = None
    failure: str | None = None


def run_comparison(
    comparison: Comparison,
    folder: Path,
    jobs: int = 1,
    progress: Callable[[Progress, str], None] | None = None,
) -> Progress:
    """Run everything that is not finished, and write runs/NAME/result.json for every run.

    Repeat the call to continue after an interruption or a failure.

    Args:
        comparison: what to run.
        folder: directory of the comparison.
        jobs: number of processes.
        progress: called with the progress and the name of every run that finishes.

    Raises:
        SettingsError: `folder` contains another comparison, or another process works on it.
        Interrupted: SIGINT or SIGTERM arrived. The current training steps are saved.
        RunStopped: some runs failed, for example because of a reward or a full disk. All others are
            finished.
    """
    entries = plan_entries(comparison)
    _claim(comparison, folder)
    state = Progress(len(entries) + 1)
    all_jobs = [_base_job(comparison, folder, entries[0])]
    all_jobs += [_job(comparison, folder, entry) for entry in entries]
    pending = [job for job in all_jobs if read_result(result_file(folder, job.name)) is None]
    state.done = len(all_jobs) - len(pending)
    failures: dict[str, str] = {}

    def note(outcome: Outcome) -> None:
        if outcome.failure is not None:
            failures[outcome.name] = outcome.failure
            return
        state.done += 1
        if outcome.diverged:
            state.diverged[outcome.name] = outcome.diverged
        if progress is not None:
            progress(state, outcome.name)

    with _locked(folder):
        try:
            workers.run_all(run_job, pending, jobs, note)
        except (Interrupted, KeyboardInterrupt):
            raise Interrupted(
                f"{state.done} of {state.total} runs are finished. "
                "Run the same command to continue."
            ) from None
    if failures:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise RunStopped(
            f"{len(failures)} of {state.total} runs failed: {reasons}. "
            "Run the same command to try them again."
        )
    return state


def run_job(job: Job) -> Outcome:
    """Train a run to its end, or resume it, measure it, and write its result.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived. The run is saved.
    """
    retain_freed_memory()
    quiet_libraries()
    for path in job.settings["runtime"]["plugins"]:
        load_plugin(path)
    config = validate(dict(job.settings))
    file = result_file(job.folder, job.name)
    out = file.parent
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, out)
    result: Result = {"label": BASE, "reward_set": None, "seed": None, "stopped": None}
    if job.label is not None:
        diverged = out / "diverged.txt"
        try:
            _train(trainer, diverged)
        except Interrupted:
            raise
        except RunStopped as error:
            return Outcome(job.name, failure=str(error))
        result |= {"label": job.label, "reward_set": job.reward_set, "seed": job.seed}
        result |= {"stopped": diverged.read_text() if diverged.exists() else None}
        result |= _totals(trainer)
    begin = time.perf_counter()
    result["prompts"] = [prompt.text for prompt in trainer.eval_prompts[:NUM_SHOWN]]
    result["steps"] = measure(trainer, job.measurement, out)
    result["seconds/measure"] = time.perf_counter() - begin
    write_atomically(file, json.dumps(result))
    return Outcome(job.name, result["stopped"])


def _train(trainer: Trainer, diverged: Path) -> None:
    """Train, or resume. Diverged training counts as finished. `diverged` contains the reason."""
    trainer.resume()
    if diverged.exists():
        return
    try:
        trainer.train(workers.stop_check())
    except Diverged as error:
        write_atomically(diverged, str(error))


def _totals(trainer: Trainer) -> Result:
    """Cost, optimizer updates and seconds of all training steps."""
    config = trainer.config
    num_rewards = len(config.rewards)
    lines = [line for line in trainer.recorder.read_metrics() if line["step"] > 0]
    calibration = calibration_cost(config.method, config.sampling.num_steps, num_rewards)
    return {
        "learning_rate": config.learning_rate,
        "units": calibration.units + sum(units_of_step(line, num_rewards) for line in lines),
        "rollouts": len(lines),
        "updates": sum(line["updates"] for line in lines),
        "seconds": sum(line["seconds"] for line in lines),
    }


def _job(comparison: Comparison, folder: Path, entry: Entry) -> Job:
    return Job(
        entry.name,
        folder,
        entry.config.to_dict(),
        comparison.measurement,
        entry.label,
        entry.reward_set,
        entry.config.runtime.seed,
    )


def _base_job(comparison: Comparison, folder: Path, first: Entry) -> Job:
    """The measurement of the base model, with the settings of the first run."""
    return Job(BASE, folder, first.config.to_dict(), comparison.measurement)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock `folder` against other processes.

    Raises:
        SettingsError: another process has the lock.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingsError(
                f"{folder}: another process works on this comparison. "
                "Wait for it, or use another directory."
            ) from None
        yield


def _claim(comparison: Comparison, folder: Path) -> None:
    """Write comparison.yaml, or check that it contains this comparison.

    Raises:
        SettingsError: `folder` contains another comparison.
    """
    file, values = folder / "comparison.yaml", comparison.model_dump(mode="json")
    if file.exists():
        saved = read_yaml(file).get("comparison")
        if not isinstance(saved, dict):
            raise SettingsError(f"{file}: contains no comparison. Use another directory.")
        changed = [key for key in values if saved.get(key) != values[key]]
        if changed:
            raise SettingsError(
                f"{folder}: contains a comparison with other {', '.join(changed)}. "
                "Use another directory, or the values with which it was started."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({"comparison": values, **describe_environment()}, sort_keys=False)
    write_atomically(file, text)
