"""The command `export`."""

from pathlib import Path
from typing import Annotated

import typer

from flowgrain.cli.app import Plugins, app, say


@app.command("export")
def export_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Step of a checkpoint, or best. Default: the last good checkpoint."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Directory to write. Default: RUN/export, or RUN/export-NAME."),
    ] = None,
    plugins: Plugins = None,
) -> None:
    """Write the weights of a checkpoint in a format that diffusers loads. Nothing is trained.

    A run with an EMA exports the EMA weights. Training already exports its last step.

    Examples:
    * `flowgrain export runs/demo`
    * `flowgrain export runs/demo --checkpoint best`
    * `flowgrain export runs/demo --checkpoint 40 --out weights`
    """
    from flowgrain.models.quiet import quiet_libraries

    quiet_libraries()
    from flowgrain.evaluation.export import export_run
    from flowgrain.registry import load_plugin

    for path in plugins or ():
        load_plugin(path)
    written, source = export_run(folder, checkpoint, out)
    say(f"wrote {written} from {source}")
