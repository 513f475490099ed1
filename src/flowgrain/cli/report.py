"""The command `report`."""

from pathlib import Path
from typing import Annotated

import typer

from flowgrain.cli.app import Plugins, app, say, writing
from flowgrain.registry import load_plugin


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Directory of a run or of a comparison.")
    ],
    plugins: Plugins = None,
) -> None:
    """Write the report of a run or a comparison, finished or not.

    Examples:
    * `flowgrain report runs/demo`
    * `flowgrain report comparisons/quick`
    """
    from flowgrain.report import write_comparison, write_report

    for plugin in plugins or ():
        load_plugin(plugin)
    write = write_comparison if (folder / "comparison.yaml").exists() else write_report
    with writing(f"the report of {folder}", folder):
        say(f"wrote {write(folder)}")
