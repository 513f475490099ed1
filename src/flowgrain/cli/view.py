"""The command `view`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgrain.cli.app import app, note, say, writing
from flowgrain.settings import SettingsError

if TYPE_CHECKING:
    from flowgrain.view import Catalog

DEFAULT = ("runs", "comparisons", "evaluations")
"""Directories that are shown if none is given, as far as they exist."""


@app.command()
def view(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DIRECTORY ...]",
            help="Runs, comparisons, evaluations, or directories that contain them. "
            "Default: runs, comparisons and evaluations.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port. Default: 7860, or the next free port."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Other computers then need the token.")
    ] = "127.0.0.1",
    token: Annotated[
        bool, typer.Option("--token", help="Ask for a token on 127.0.0.1 too.")
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(help="Write the pages to an .html file or a directory. No server starts."),
    ] = None,
    export_votes: Annotated[
        Path | None,
        typer.Option(help="Write the votes as a data set for data.pairs. No server starts."),
    ] = None,
) -> None:
    """Look into runs in the browser, also while they train.

    Examples:
    * `flowgrain view`
    * `flowgrain view comparisons/full --port 9000`
    * `flowgrain view runs/demo --export demo.html`
    * `flowgrain view runs --export-votes preferences`
    """
    import secrets

    from flowgrain.view import Catalog
    from flowgrain.view.security import is_loopback

    catalog = Catalog(_existing(folders))
    if export is not None or export_votes is not None:
        _write(catalog, export, export_votes)
        return
    from flowgrain.view.server import listen, serve

    secret = secrets.token_urlsafe(24) if token or not is_loopback(host) else None
    with listen(host, port) as listener:
        try:
            serve(catalog, listener, host, secret, say)
        except KeyboardInterrupt:
            return


def _existing(folders: list[Path] | None) -> list[Path]:
    """The directories to show.

    Raises:
        SettingsError: a directory does not exist, or there is none.
    """
    for folder in folders or ():
        if not folder.is_dir():
            raise SettingsError(
                f"{folder}: is not a directory. Give runs, or directories that contain them."
            )
    found = folders or [Path(name) for name in DEFAULT if Path(name).is_dir()]
    if not found:
        raise SettingsError(
            f"There is no directory {', '.join(DEFAULT)} here. Name one: flowgrain view DIRECTORY."
        )
    return found


def _write(catalog: "Catalog", export: Path | None, export_votes: Path | None) -> None:
    """Write an export, and the votes."""
    if export is not None:
        from flowgrain.view.export import export as write_export

        with writing(f"--export {export}", export):
            found = write_export(catalog, export)
        for problem in found.damaged:
            note(f"left out: {problem}", style="yellow")
        if found.left_out:
            note(f"left out: {found.left_out} images. Export fewer runs to see all.", "yellow")
        say(f"wrote {found.path}: {found.runs} runs, {found.images} images")
    if export_votes is not None:
        from flowgrain.view.votes import write_preferences

        with writing(f"--export-votes {export_votes}", export_votes):
            file, pairs, problems = write_preferences(catalog, export_votes)
        for problem in problems:
            note(f"left out: {problem}", style="yellow")
        say(f"wrote {file}: {pairs} pairs. Train: flowgrain train diffusion_dpo data.pairs={file}")
