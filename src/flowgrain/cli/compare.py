"""The command `compare`."""

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flowgrain.cli.app import Plugins, app, integers, note, out, say, split_words, writing
from flowgrain.settings import SettingsError
from flowgrain.units import duration

if TYPE_CHECKING:
    from flowgrain.studies.comparison import Comparison
    from flowgrain.studies.entries import Entry
    from flowgrain.studies.run import Progress


@app.command()
def compare(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[COMPARISON] [section.key=VALUE ...]")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, such as g2rpo,mixgrpo.")] = None,
    rewards: Annotated[
        list[str] | None,
        typer.Option(help="A set of rewards, such as towers or towers,preference. Repeatable."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, a list such as 1,2,3.")] = None,
    budget: Annotated[float | None, typer.Option(help="Budget of each run, in --unit.")] = None,
    unit: Annotated[str | None, typer.Option(help="Unit: passes, updates or seconds.")] = None,
    jobs: Annotated[
        int, typer.Option(min=0, help="Processes, one thread each. 0: one per CPU core.")
    ] = 0,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Output directory. Default: comparisons/NAME.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the cost.")] = False,
    plugins: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
) -> None:
    """Train methods x rewards x seeds with equal budgets. Writes one table and one page.

    The options replace values of the comparison: full, quick, sweep, ablations, family,
    family_sweep, or a YAML file. Repeat the command to continue after an interruption.

    Examples:
    * `flowgrain compare quick`
    * `flowgrain compare full --dry-run`
    * `flowgrain compare full --methods g2rpo,densegrpo --rewards towers --seeds 1,2 --budget 40000`
    """
    from flowgrain.models.quiet import quiet_libraries

    quiet_libraries()
    from flowgrain.distributed.threads import available_cores
    from flowgrain.studies.comparison import DEFAULT, load_comparison
    from flowgrain.studies.entries import plan_entries

    source, overrides = split_words(words)
    comparison = load_comparison(
        source or DEFAULT,
        methods=methods.split(",") if methods else None,
        rewards=[names.split(",") for names in rewards] if rewards else None,
        seeds=integers("--seeds", seeds, 0) if seeds is not None else None,
        budget=budget,
        unit=unit,
        overrides=overrides,
        plugins=plugins or (),
    )
    jobs = jobs or available_cores()
    if dry_run:
        _show_cost(comparison.name, plan_entries(comparison), jobs, as_json)
        return
    if as_json:
        raise SettingsError("--json: only works with --dry-run. Add --dry-run or remove --json.")
    _run(comparison, folder or Path("comparisons") / comparison.name, jobs)


def _run(comparison: "Comparison", folder: Path, jobs: int) -> None:
    """Run the comparison, and write its page. After a failure the page shows the finished runs."""
    from flowgrain.report import write_comparison
    from flowgrain.studies.run import run_comparison
    from flowgrain.training import RunStopped

    begin = time.perf_counter()

    def show(progress: "Progress", name: str) -> None:
        seconds = time.perf_counter() - begin
        note(f"{progress.done}/{progress.total} {name} [{seconds:.0f} s]")

    try:
        with writing(f"--out {folder}", folder):
            progress = run_comparison(comparison, folder, jobs, show)
    except RunStopped:
        with contextlib.suppress(SettingsError):  # possibly no run is finished
            note(f"finished runs: {write_comparison(folder)}")
        raise
    for name, reason in progress.diverged.items():
        note(f"{name} diverged: {reason}")
    with writing(f"--out {folder}", folder):
        say(f"open {write_comparison(folder)}")


def _show_cost(name: str, entries: "list[Entry]", jobs: int, as_json: bool) -> None:
    """The cost of every run of a comparison, and the estimated time on this machine."""
    from flowgrain.studies.measure import estimated_seconds, machine_speed

    speed = machine_speed(entries[0].config)
    seconds = [estimated_seconds(entry, speed) for entry in entries]
    total = sum(seconds) / jobs
    if as_json:
        rows = [
            {
                "name": entry.name,
                "rollouts": _rollouts(entry),
                "units": entry.units,
                "evaluation_passes": entry.evaluation_passes,
                "seconds": of_run,
            }
            for entry, of_run in zip(entries, seconds, strict=True)
        ]
        typer.echo(json.dumps({"name": name, "runs": rows, "seconds": total, "jobs": jobs}))
        return
    columns = ("run", "rollouts", "units", "evaluation passes", "minutes")
    table = Table(*columns, title=escape(f"{name}: {len(entries)} runs"), title_justify="left")
    for entry, of_run in zip(entries, seconds, strict=True):
        rollouts = _rollouts(entry)
        table.add_row(
            escape(entry.name),
            "-" if rollouts is None else f"{rollouts:,}",
            f"{entry.units:,.0f}",
            f"{entry.evaluation_passes:,}",
            f"{of_run / 60:.1f}",
        )
    out.print(table)
    units = sum(entry.units for entry in entries)
    say(
        f"{units:,.0f} units in total. About {duration(total)} with {jobs} processes on this "
        "machine."
    )


def _rollouts(entry: "Entry") -> int | None:
    """Training steps of a run. None if its budget is a time."""
    training = entry.config.training
    return None if training.max_seconds else training.max_steps
