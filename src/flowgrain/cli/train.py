"""The command `train`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowgrain.cli.app import (
    Plugins,
    Preset,
    Words,
    app,
    config_from,
    note,
    say,
    show_warnings,
    split_words,
)
from flowgrain.cli.progress import ProgressDisplay, step_text
from flowgrain.settings import SettingsError

if TYPE_CHECKING:
    from flowgrain.training import Trainer


@app.command(no_args_is_help=False)
def train(
    words: Words = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Directory of the run. Default: runs/NAME.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Resume the run in this directory.")
    ] = None,
    plugins: Plugins = None,
    preset: Preset = None,
) -> None:
    """Train a recipe, a method, a YAML file or the settings of a run.

    Examples:
    * `flowgrain train` trains the bundled demo.
    * `flowgrain train g2rpo method.granularities=[1,2] training.max_steps=40 --out runs/two`
    * `flowgrain train flux/g2rpo --preset one-gpu data.prompts=prompts.txt`
    * `flowgrain train my.yaml optimizer.learning_rate=1e-4`
    * `flowgrain train --resume runs/two training.max_steps=80`
    * `flowgrain train --plugin my_method.py my_method`
    * `torchrun --nproc-per-node 8 -m flowgrain train flux/g2rpo data.prompts=prompts.txt`
    """
    from flowgrain.distributed import destroy_process_group
    from flowgrain.models.quiet import quiet_libraries
    from flowgrain.training.restart import no_restart_after_permanent_errors

    quiet_libraries()
    with no_restart_after_permanent_errors():
        try:
            if resume is None:
                trainer = _start(words, plugins, preset, folder)
            elif folder is not None or preset is not None:
                raise SettingsError(
                    f"--resume {resume}: remove --out and --preset. A resumed run keeps its own."
                )
            else:
                trainer = _resume(resume, words, plugins)
            _train(trainer)
        finally:
            destroy_process_group()


def _start(
    words: list[str] | None, plugins: list[str] | None, preset: str | None, folder: Path | None
) -> "Trainer":
    """The trainer of a new run, or of the run that this torchrun job has started before."""
    from flowgrain.training import Interrupted, Trainer
    from flowgrain.training.restart import resume_after_restart

    try:
        trainer = Trainer(config_from(words, plugins, preset), folder)
    except KeyboardInterrupt:
        raise Interrupted("interrupted before the run started; nothing was written.") from None
    messages = resume_after_restart(trainer)
    if messages is not None and trainer.world.is_main:
        for message in messages:
            note(f"{message}.", style="yellow")
        note(
            f"torchrun has started {trainer.out} before. The run continues from step "
            f"{trainer.steps_done}.",
            style="yellow",
        )
    return trainer


def _resume(folder: Path, words: list[str] | None, plugins: list[str] | None) -> "Trainer":
    """The trainer of the run in `folder`, at its last good checkpoint."""
    from flowgrain.records.run_yaml import read_run
    from flowgrain.training import Trainer
    from flowgrain.training.run_files import read_run_config

    source, overrides = split_words(words)
    if source is not None:
        raise SettingsError(f"--resume {folder}: remove {source}. The run has its own settings.")
    given = read_run(folder).get("given", [])
    if given:
        raise SettingsError(
            f"{folder}: this run was started from Python with custom {', '.join(given)}. "
            "Resume it from Python: Trainer(...).resume()."
        )
    config = read_run_config(folder, overrides, plugins or ())
    show_warnings(config)
    trainer = Trainer(config, folder)
    messages = trainer.resume()
    steps = trainer.config.training.max_steps
    if trainer.steps_done > steps:
        trainer.lock.release()
        raise SettingsError(
            f"training.max_steps={steps}: the run in {folder} is already at step "
            f"{trainer.steps_done}. Use a larger value."
        )
    for message in messages:
        note(f"{message}. The run continues from step {trainer.steps_done}.", style="yellow")
    unused = [word for word in overrides if not word.startswith("training.max_steps=")]
    if trainer.steps_done == steps and unused:
        note(
            f"warning: no step is left, so {', '.join(unused)} has no effect. "
            f"Add training.max_steps=VALUE with a value above {steps}.",
            style="yellow",
        )
    return trainer


def _train(trainer: "Trainer") -> None:
    """Train, and write the report. Only the main rank prints."""
    if not trainer.world.is_main:
        trainer.train()
        return
    config, begin = trainer.config, time.perf_counter()
    first, last = trainer.steps_done + 1, config.training.max_steps
    steps = f"steps {first} to {last}" if first < last else f"step {last}"
    steps = steps if first <= last else "no step is left"

    def start() -> None:
        say(f"{config.method.name} on {config.model.name}: {steps}, into {trainer.out}")
        note(f"watch: {trainer.watch.description}")

    with ProgressDisplay("step", trainer.steps_done, last) as display:
        metrics = trainer.train(
            lambda step: display.show(step["step"], text=step_text(step)), start=start
        )
    from flowgrain.records.alarms import ALARMS, read_alarms, read_best
    from flowgrain.report import write_report  # matplotlib and templates are not needed before

    say(f"done in {time.perf_counter() - begin:.0f} s. {_gain(metrics)}".rstrip())
    best, alarms = read_best(trainer.out), read_alarms(trainer.out)
    if alarms:
        steps = ", ".join(str(step) for step in dict.fromkeys(line["step"] for line in alarms))
        note(f"alarms at step {steps}: see {trainer.out / ALARMS}", style="yellow")
    if best is not None:
        say(f"best checkpoint: step {best['step']} ({best['rule']}), in {trainer.out}/export/best")
    try:
        report = write_report(trainer.out)
    except (OSError, SettingsError) as error:
        note(
            f"error: training is finished, but the report could not be written: {error}. "
            f"Run flowgrain report {trainer.out}.",
            style="red",
        )
        raise typer.Exit(1) from None
    say(f"open {report}")


def _gain(metrics: list[dict[str, Any]]) -> str:
    """The first and the last evaluation of every reward."""
    evaluated = [line for line in metrics if any(name.startswith("eval/") for name in line)]
    if len(evaluated) < 2:
        return ""
    first, last = evaluated[0], evaluated[-1]
    rewards = [
        f"{name.removeprefix('eval/')} {first[name]:.3f} -> {last[name]:.3f}"
        for name in last
        if name.startswith("eval/") and name.count("/") == 1 and name in first
    ]
    return f"Held-out {', '.join(rewards)}" if rewards else ""
