"""The commands `plan`, `fidelity` and `doctor`, for use before a run starts."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from flowgrain.cli.app import Json, Plugins, Preset, Words, app, config_from, note, out, say
from flowgrain.settings import SettingsError

if TYPE_CHECKING:
    from flowgrain.config.schema import Config
    from flowgrain.planning.plan import RunPlan
    from flowgrain.planning.rehearse import Rehearsal


@app.command()
def plan(
    words: Words = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Rehearse a step on this number of GPUs.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Kind of the GPUs: a100, h100 or h200. Default: h100.")
    ] = None,
    plugins: Plugins = None,
    preset: Preset = None,
    as_json: Json = False,
) -> None:
    """Show the tree of one prompt and its exact cost. Nothing is run.

    With --gpus, the first training step is also rehearsed, see `flowgrain rehearse`.

    Examples:
    * `flowgrain plan g2rpo`
    * `flowgrain plan g2rpo method.granularities=[1,2] --json`
    * `flowgrain plan flow_grpo sampling.num_steps=8`
    * `flowgrain plan flux/g2rpo --gpus 16 --gpu h200`
    """
    from flowgrain.planning.plan import RunPlan

    if gpu is not None and gpus is None:
        raise SettingsError(f"--gpu {gpu}: has no effect without --gpus. Add --gpus, or remove it.")
    gpu = gpu or "h100"
    run = RunPlan(config_from(words, plugins, preset))
    numbers = run.to_dict()
    found: Rehearsal | None = None
    if gpus is not None:
        found = _rehearsed(run, gpus, gpu)
        numbers["rehearsal"] = found.to_dict()
        numbers["forecast"] = _forecast(found, gpu)
    if as_json:
        typer.echo(json.dumps(numbers))
        return
    _show_plan(run, numbers)
    if found is not None:
        from flowgrain.cli.rehearse import summary
        from flowgrain.planning.gpus import gpu_named

        for line in summary(found, gpu, gpu_named(gpu)):
            say(line)


def _rehearsed(run: "RunPlan", gpus: int, gpu: str) -> "Rehearsal":
    from flowgrain.models.quiet import quiet_libraries
    from flowgrain.planning.gpus import gpu_named

    card = gpu_named(gpu)
    quiet_libraries()
    from flowgrain.planning.rehearse import RehearsalError, rehearse

    try:
        return rehearse(run.config, gpus, card)
    except RehearsalError as error:
        raise SettingsError(
            f"the training step fails: {error}. `flowgrain rehearse --debug` shows the traceback."
        ) from error


def _forecast(found: "Rehearsal", gpu: str) -> dict[str, Any]:
    from flowgrain.planning.forecast import forecast
    from flowgrain.planning.gpus import gpu_named

    return forecast(found, gpu_named(gpu)).to_dict()


def _show_plan(run: "RunPlan", numbers: dict[str, Any]) -> None:
    """The tree and the cost table on the terminal."""
    from flowgrain.report.drawing import draw_tree

    config = run.config
    if config.sampling.num_steps <= _DRAWN_STEPS and len(run.tree) <= _DRAWN_ROWS:
        out.print(draw_tree(run.tree, config))
    title = escape(f"cost of {config.method.name}")
    table = Table("per prompt", "", title=title, title_justify="left")
    for name, value in numbers.items():
        if name not in ("method", "forecast", "rehearsal"):
            label = _LABELS.get(name, name.replace("_", " "))
            table.add_row(label, f"{value:,.1f}".removesuffix(".0"))
    out.print(table)
    training = config.training
    say(
        f"{training.prompts_per_step} prompts per step, {training.max_steps} steps: "
        f"{run.total_forward_passes:,} sampling forward passes in total"
    )
    published = "" if config.optimizer.learning_rate else ", the published rate of the method"
    say(f"learning rate {config.learning_rate:g} ({_kind(config)}{published})")
    if not config.grid_is_known:
        say("The noise levels are those of the model's own grid. They are known after loading.")


def _kind(config: "Config") -> str:
    """What is trained."""
    return f"LoRA of rank {config.lora.rank}" if config.lora.rank else "full fine-tune"


_DRAWN_STEPS, _DRAWN_ROWS = 100, 20_000
"""Size of the largest tree that is drawn."""
_LABELS = {
    "forward_passes": "sampling forward passes",
    "train_forward_passes": "forward passes with gradient",
    "frozen_forward_passes": "forward passes of the old policy and the reference",
    "reused_forward_passes": "sampling forward passes whose graphs the update uses",
    "published_forward_passes": "sampling forward passes, the same settings in the published code",
    "peak_latents": "latents held at once",
    "mean_forward_passes": "sampling forward passes, mean over the steps",
    "calibration_forward_passes": "forward passes of the calibration, once per run",
}


@app.command("fidelity")
def fidelity_command(
    words: Words = None,
    cheap: Annotated[
        list[str] | None,
        typer.Option(
            metavar="section.key=VALUE", help="A setting of the cheaper rollout. Repeatable."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps to sample.")] = 3,
    plugins: Plugins = None,
    preset: Preset = None,
    as_json: Json = False,
) -> None:
    """Measure how well a cheaper rollout ranks the samples of a group, and what it saves.

    Nothing is trained.

    Examples:
    * `flowgrain fidelity mixgrpo --cheap method.tail_order=2 --cheap method.tail_ratio=0.4`
    * `flowgrain fidelity g2rpo --cheap method.granularities=[1]`
    * `flowgrain fidelity g2rpo method.granularities=[1] --cheap sampling.tail_cache=taylorseer:3`
    """
    from flowgrain.models.quiet import quiet_libraries

    quiet_libraries()
    from flowgrain.planning.fidelity import fidelity

    if not cheap:
        raise SettingsError("--cheap: required. Write a setting: --cheap method.tail_ratio=0.4.")
    full = config_from(words, plugins, preset)
    found = fidelity(full, config_from([*(words or []), *cheap], plugins, preset), steps)
    numbers = found.to_dict()
    if as_json:
        typer.echo(json.dumps(numbers))
        return
    say(
        f"Spearman correlation of the advantages in a group: {numbers['spearman']:.2f} (10% to 90% "
        f"of {len(found.correlation)} groups: {numbers['spearman_10']:.2f} to "
        f"{numbers['spearman_90']:.2f}). {found.flipped:.0%} of the advantages change sign."
    )
    say(f"Time: {found.seconds:.2f} of the full rollout. Forward passes: {found.passes:.2f}.")


@app.command()
def doctor(
    words: Words = None,
    gpus: Annotated[int, typer.Option(min=1, max=1024, help="Processes of the run.")] = 1,
    plugins: Plugins = None,
    preset: Preset = None,
) -> None:
    """Check a configuration before a long run: memory, disk, prompts, the model and every reward.

    Memory is checked before the weights are loaded, and the first step of a large model is
    rehearsed, see `flowgrain rehearse`. All checks are made, also after one has failed.
    Nothing is trained or written. The exit status is 1 if a check fails.

    Examples:
    * `flowgrain doctor g2rpo`
    * `flowgrain doctor flux/g2rpo model.path=FLUX.1-dev data.prompts=prompts.txt rewards=[clip]`
    """
    from flowgrain.models.quiet import quiet_libraries

    quiet_libraries()
    from flowgrain.planning.doctor import examine

    findings = examine(config_from(words, plugins, preset), gpus=gpus)
    table = Table("check", "result", "found", box=box.SIMPLE)
    for finding in findings:
        result = "[green]ok[/]" if finding.ok else "[bold red]failed[/]"
        table.add_row(escape(finding.name), result, escape(finding.message))
    out.print(table)
    failed = [finding.name for finding in findings if not finding.ok]
    if failed:
        note(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}.")
        raise typer.Exit(1)
