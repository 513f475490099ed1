"""The application, its consoles, and the arguments that several commands share."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer
from rich.console import Console

from flowgrain.settings import SettingsError

if TYPE_CHECKING:
    from flowgrain.config import Config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Post-train flow-matching image models with reinforcement learning and step-level
    credit.

    `flowgrain train` trains the bundled demo. `flowgrain train g2rpo training.max_steps=20` trains
    the bundled model with a method. `flowgrain plan flux/g2rpo` shows the cost of a recipe.""",
)
out = Console()
err = Console(stderr=True)


def _show_version(shown: bool) -> None:
    if shown:
        from flowgrain import __version__

        typer.echo(f"flowgrain {__version__}")
        raise typer.Exit


DEBUG = "--debug"


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. Works anywhere.")
    ] = False,
) -> None:
    """Options of all commands. `main` reads --debug before the words are parsed."""


def debugging() -> bool:
    """Whether tracebacks are shown. --debug may stand anywhere on the command line."""
    return DEBUG in sys.argv[1:]


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SOURCE] [section.key=VALUE ...]",
        help="A recipe, a method, a YAML file or the directory of a run, and settings that "
        "override it. Default: the recipe demo.",
    ),
]
"""A recipe, method, YAML file or run directory, and overrides."""
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE.py",
        help="Python file that registers methods, rewards or backbones. Repeatable.",
    ),
]
Preset = Annotated[
    str | None, typer.Option("--preset", help="one-gpu: fit the run to one GPU with 80 GB.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Out = Annotated[Path | None, typer.Option("--out", help="Output directory.")]


def split_words(words: list[str] | None) -> tuple[str | None, list[str]]:
    """The source, if the first word is not an override, and the overrides."""
    words = list(words or [])
    setting = re.compile(r"[a-z]+\.(?!ya?ml$)[a-z_.]+")  # its value is missing
    is_source = words and "=" not in words[0] and not setting.fullmatch(words[0])
    source = words.pop(0) if is_source or (words and Path(words[0]).exists()) else None
    return source, words


def config_from(
    words: list[str] | None, plugins: list[str] | None, preset: str | None = None
) -> "Config":
    """The configuration of a command. The default source is the demo. Warnings are printed.

    Raises:
        SettingsError: the source does not exist, or a setting is wrong.
    """
    from flowgrain.config.load import DEFAULT, load_config

    source, overrides = split_words(words)
    config = load_config(source or DEFAULT, overrides, preset=preset, plugins=plugins or ())
    show_warnings(config)
    return config


def show_warnings(config: "Config") -> None:
    """Print the warnings about settings to stderr, on the main rank."""
    from flowgrain.distributed import env_rank

    for warning in config.warnings() if env_rank()[0] == 0 else ():
        note(f"warning: {warning}", style="yellow")


def integers(option: str, text: str, least: int) -> list[int]:
    """The integers of an option with a comma-separated list.

    Raises:
        SettingsError: an entry is not an integer of at least `least`.
    """
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [least - 1]
    if min(values) < least:
        raise SettingsError(
            f"{option}={text}: not a list of integers of at least {least}. "
            f"Write for example {option} 10,16,20."
        )
    return values


@contextmanager
def writing(option: str, folder: Path) -> Iterator[None]:
    """Turn an error of writing to `folder` inside this context into an error of `option`.

    Other errors, such as those of a network connection, are not changed.

    Raises:
        SettingsError: a file cannot be written.
    """
    try:
        yield
    except OSError as error:
        if not _is_of(error, folder):
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        reason = f"{place}{error.strerror or error}"
        raise SettingsError(
            f"{option}: cannot be written ({reason}). Use another directory."
        ) from error


_OF_DISKS = {
    *(errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR),
    *(errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG),
}


def _is_of(error: OSError, folder: Path) -> bool:
    """Whether the error is about `folder`, a file in it, or a directory above it."""
    names = [name for name in (error.filename, error.filename2) if name is not None]
    if not names:
        return error.errno in _OF_DISKS
    folder = folder.absolute()
    paths = [Path(os.fsdecode(name)).absolute() for name in names if not isinstance(name, int)]
    return any(path.is_relative_to(folder) or folder.is_relative_to(path) for path in paths)


def say(text: str) -> None:
    """Print a line of plain text to stdout."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def note(text: str, style: str | None = None) -> None:
    """Print a line of plain text to stderr."""
    err.print(text, markup=False, highlight=False, soft_wrap=True, style=style)
