"""The command `rehearse`: the first training step at full size, without GPUs."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from flowgrain.cli.app import (
    Json,
    Plugins,
    Preset,
    Words,
    app,
    config_from,
    debugging,
    note,
    out,
    say,
)
from flowgrain.settings import SettingsError

if TYPE_CHECKING:
    from flowgrain.config.schema import Config
    from flowgrain.planning.gpus import Gpu
    from flowgrain.planning.rehearse import Rehearsal
    from flowgrain.planning.search import Proposal


@app.command("rehearse")
def rehearse_command(
    words: Words = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="Number of GPUs. Default: 8, or 1, 2, 4, 8 and 16 with --search."
        ),
    ] = None,
    gpu: Annotated[str, typer.Option(help="Kind of the GPUs: a100, h100 or h200.")] = "h100",
    search: Annotated[
        bool, typer.Option("--search", help="Search settings that fit, the fastest layouts first.")
    ] = False,
    full_depth: Annotated[
        bool,
        typer.Option("--full-depth", help="Run all blocks of the transformer. Takes minutes."),
    ] = False,
    plugins: Plugins = None,
    preset: Preset = None,
    as_json: Json = False,
) -> None:
    """Run the first training step at full size on fake tensors: no GPU and no weights are needed.

    Finds errors of shapes, dtypes, devices and shards. Shows the memory of a GPU by kind, FLOPs,
    traffic, and where the host waits for the GPU. The exit status is 1 if the step raises an error
    or does not fit.

    Examples:
    * `flowgrain rehearse flux/g2rpo --gpus 8 --gpu h100`
    * `flowgrain rehearse sd3/flow_grpo --gpus 4 lora.rank=64 --json`
    * `flowgrain rehearse flux/g2rpo --search --gpus 4 --gpu h200`
    """
    from flowgrain.models.quiet import quiet_libraries
    from flowgrain.planning.gpus import gpu_named

    quiet_libraries()
    from flowgrain.planning.rehearse import RehearsalError, prepared, rehearse

    if search and full_depth:
        raise SettingsError("--full-depth: has no effect with --search. Remove one of the two.")
    card, config = gpu_named(gpu), config_from(words, plugins, preset)
    try:
        if search:
            _search(config, card, gpu, gpus, as_json)
            return
        prepared(config, gpus or 8, card)  # refuses settings that cannot be rehearsed
        note("The first step runs on fake tensors. For a large model this takes about a minute.")
        rehearsal = rehearse(config, gpus or 8, card, "full" if full_depth else "lines")
    except RehearsalError as error:
        if as_json:
            typer.echo(json.dumps({"error": str(error), "traceback": error.details}))
        note(f"The training step fails: {error}", "bold red")
        note(error.details if debugging() else "Use --debug to see the traceback.")
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps({**rehearsal.to_dict(), **_verdict(rehearsal, gpu, card)}))
    else:
        _show(rehearsal, gpu, card)
    if not rehearsal.fits(card.memory):
        raise typer.Exit(1)


def _search(config: "Config", card: "Gpu", name: str, gpus: int | None, as_json: bool) -> None:
    """Search settings for `gpus` GPUs, by default for several numbers of them."""
    from flowgrain.planning.search import proposals

    # Progress goes to stderr, so that stdout contains only the result.
    found = proposals(config, card, None if gpus is None else (gpus,), progress=note)
    if as_json:
        typer.echo(json.dumps([proposal.to_dict() for proposal in found]))
    else:
        _show_proposals(found, name)
    if not any(proposal.fits for proposal in found):
        raise typer.Exit(1)


def _verdict(found: "Rehearsal", name: str, card: "Gpu") -> dict[str, Any]:
    """Whether the step fits, and the forecast of its time."""
    from flowgrain.planning.forecast import forecast

    fits, expected = found.fits(card.memory), forecast(found, card).to_dict()
    return {"gpu": name, "fits": fits, "forecast": expected}


def _show(found: "Rehearsal", name: str, card: "Gpu") -> None:
    """Memory by phase and kind, cost, and waits of a rehearsal."""
    from flowgrain.planning.rehearsal.step import LATER

    # An update with one micro-batch has no later ones.
    phases = {
        phase: peak
        for phase, peak in found.phases.items()
        if phase != LATER or found.measured.flops.get(LATER)
    }
    unit = 1e9 if found.peak[1].total >= 1e9 else 1e6
    kinds = [k for k in _ORDER if any(p.kinds.get(k, 0) >= 1e-3 * unit for p in phases.values())]
    title = f"{'GB' if unit == 1e9 else 'MB'} on each of {found.gpus} x {name}"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    table.add_column("")
    for phase in phases:
        table.add_column(_LABELS.get(phase, phase), justify="right")
    for kind in kinds:
        table.add_row(
            _LABELS.get(kind, kind),
            *(_number(peak.kinds.get(kind, 0.0) / unit) for peak in phases.values()),
        )
    table.add_section()
    table.add_row("total", *(_number(peak.total / unit) for peak in phases.values()))
    out.print(table)
    for line in summary(found, name, card):
        say(line)


def summary(found: "Rehearsal", name: str, card: "Gpu") -> list[str]:
    """The result of a rehearsal in sentences."""
    from flowgrain.planning.forecast import forecast
    from flowgrain.training.fit import in_bytes
    from flowgrain.units import duration

    phase, peak = found.peak
    label = _LABELS.get(phase, phase)
    measured, available = found.measured, card.memory
    setting = found.batch_of_peak
    batch = f" ({setting[0]}={setting[1]})" if setting else ""
    fits = "fits" if found.fits(available) else "does not fit"
    expected = forecast(found, card)
    parts = [f"{p} {duration(s)}" for p, s in expected.seconds.items() if s >= 0.05]
    seconds = duration(expected.total) if parts else "less than 0.1 s"
    of_parts = f" ({', '.join(parts)})" if parts else ""
    syncs = sum(measured.syncs.values())
    most = sorted(measured.syncs.items(), key=lambda item: -item[1])[:3]
    places = ", ".join(f"{place} ({count:,})" for place, count in most)
    moved, operations = sum(expected.moved.values()), sum(measured.flops.values())
    counts = measured.counts
    encoded = found.peak_if_encoded
    without = f"With all prompts encoded before by `flowgrain encode`: {in_bytes(encoded)}."
    return [
        f"Most memory: {in_bytes(peak.total)} in the phase {label!r}{batch}. It {fits} on "
        f"one {name} ({available / 1e9:,.0f} GB) with 10% left free.",
        *([without] if encoded < 0.99 * peak.total else []),
        f"Forward passes on each GPU: {counts.get('no gradient', 0):,.0f} without gradient, "
        f"{counts.get('gradient', 0):,.0f} with gradient. Decoded images: "
        f"{counts.get('decoded', 0):,.0f}.",
        f"{_number(operations / 1e12)} TFLOP, {in_bytes(moved)} received over links, "
        f"{in_bytes(measured.checkpoint)} in a checkpoint, per GPU.",
        f"Forecast: {seconds} per step without rewards{of_parts}.",
        f"The host waits for the GPU {syncs:,} times, most often at {places}."
        if most
        else "The host never waits.",
        f"The rehearsal took {found.seconds:.0f} s.",
    ]


def _show_proposals(found: "list[Proposal]", name: str) -> None:
    """Numbers of every proposal, and its settings, ready to copy."""
    from flowgrain.planning.gpus import gpu_count
    from flowgrain.planning.search import MOST_ROWS
    from flowgrain.training.fit import in_bytes
    from flowgrain.units import duration

    table = Table(f"{name}, GPUs", "on a GPU", "forecast", "images per second", box=box.SIMPLE)
    for proposal in found:
        small = proposal.seconds < 0.1
        seconds = "less than 0.1 s" if small else duration(proposal.seconds)
        table.add_row(
            str(proposal.gpus),
            in_bytes(proposal.memory),
            f"{seconds} per step" if proposal.fits else "does not fit",
            f"{proposal.images_per_second:,.3g}" if proposal.fits and not small else "-",
        )
    out.print(table)
    for proposal in found:
        closest = "" if proposal.fits else ", which need least memory"
        say(f"{gpu_count(proposal.gpus)}{closest}: {' '.join(proposal.settings)}")
    say(
        "The forecast follows from FLOPs and data sheets, without rewards. Batches have at most "
        f"{MOST_ROWS} rows."
    )


def _number(value: float) -> str:
    return f"{value:,.{2 if value < 10 else 1 if value < 1000 else 0}f}"


_LABELS = {
    "rewards": "rewards",
    "first micro-batch": "update 1",
    "later micro-batches": "update",
    "optimizer": "AdamW",
    "unsharded parameters": "unsharded",
    "sampling copy": "sampler",
    "text encoders": "encoders",
    "conditioning": "embeddings",
}
"""Short names for the table. "update 1": the first micro-batch of the first update."""
_ORDER = (
    *("weights", "unsharded parameters", "gradients", "optimizer", "EMA", "reference"),
    *("old policy", "sampling copy", "VAE", "text encoders", "rewards", "latents"),
    *("conditioning", "activations"),
)
"""Kinds of memory, in the order of the table."""
