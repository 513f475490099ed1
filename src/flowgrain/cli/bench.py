"""The command `bench`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from flowgrain.bench import STEP_NAMES
from flowgrain.cli.app import Json, app, note, writing
from flowgrain.settings import SettingsError

Step = Annotated[
    list[str] | None,
    typer.Option(
        "--step",
        metavar="NAME",
        help=f"Run only this step. Repeatable. Steps: {', '.join(STEP_NAMES)}.",
    ),
]


@app.command()
def bench(
    out_dir: Annotated[
        Path,
        typer.Option(
            "--out", help="Directory of the results. Steps that are done are not repeated."
        ),
    ] = Path("bench"),
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(help="Device that is measured.")
    ] = "cuda",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Measure the speed of tiny models, which takes minutes.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Run everything on the CPU: --device cpu --tiny."),
    ] = False,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Total time. Later steps are not started.")
    ] = 25.0,
    step: Step = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Print the results in this directory, and exit.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure one GPU: correctness first, then the speed of FLUX.1-dev and SD3.5-medium.

    Weights are random, and nothing is downloaded. Every step runs in its own process for at most 8
    minutes. The exit status is 1 if a step is not done. Run the same command to repeat such steps.

    Examples:
    * `flowgrain bench --out bench/h100`
    * `flowgrain bench --dry-run --out bench/dry`
    * `flowgrain bench --report bench/h100`
    """
    from flowgrain.bench.tables import markdown, read_results

    if report is not None:
        records = read_results(report)
        typer.echo(json.dumps({"steps": records}) if as_json else markdown(records))
        return
    from flowgrain.bench.runner import Bench, all_records, choose_steps, run_bench
    from flowgrain.bench.steps import STEPS

    device = "cpu" if dry_run else device
    chosen = choose_steps(step or (), list(STEPS))
    _check_device(device)
    measured = Bench(out_dir, device, tiny or dry_run)
    with writing(f"--out {out_dir}", out_dir):
        undone = run_bench(measured, chosen, minutes, note)
    records = all_records(measured, chosen)
    typer.echo(json.dumps({"steps": records}) if as_json else markdown(records))
    if undone:
        note(f"{len(undone)} of {len(chosen)} steps are not done: {', '.join(undone)}.")
        raise typer.Exit(1)


def _check_device(device: str) -> None:
    """Check that this machine has the device of --device."""
    from flowgrain.training.load import compute_device

    try:
        compute_device(device)
    except SettingsError as error:
        raise SettingsError(
            f"--device {device}: torch finds no GPU. Use --device cpu, or --dry-run."
        ) from error
