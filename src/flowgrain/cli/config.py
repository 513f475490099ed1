"""The commands `recipes`, `config show` and `config diff`."""

import json
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flowgrain.cli.app import Json, Plugins, Preset, Words, app, config_from, out, say

config_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Show and compare configurations."
)
app.add_typer(config_app, name="config")

_SHOWN = ("task", "source", "published")
"""Facts that the list of all recipes shows. A single recipe shows all its facts."""


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe, or the start of names, such as sd3/.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the bundled recipes with their task, the source of their settings and published result.

    Examples:
    * `flowgrain recipes`
    * `flowgrain recipes sd3/`
    * `flowgrain recipes flux/g2rpo`: all facts of a recipe
    * `flowgrain recipes --json`
    """
    from flowgrain.config.load import recipe_facts, recipe_names
    from flowgrain.settings import SettingsError, did_you_mean

    known = recipe_names()
    names = [name] if name in known else [n for n in known if n.startswith(name or "")]
    if not names:
        raise SettingsError(f"There is no recipe {name!r}. {did_you_mean(str(name), known)}")
    facts = [recipe_facts(each) for each in names]
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for recipe in facts:
        shown = (*_SHOWN[:2], "hardware", "cost", _SHOWN[2]) if len(facts) == 1 else _SHOWN
        heading = f"[bold]{escape(recipe['name'])}[/bold]  {escape(recipe['title'])}"
        out.print(f"{heading} (arXiv {recipe['paper']})", soft_wrap=True)
        lines = Table.grid(padding=(0, 2))
        lines.add_column(no_wrap=True)
        lines.add_column(overflow="fold")
        for fact in shown:
            lines.add_row(f"    {fact}", escape(recipe[fact]))
        out.print(lines)


@config_app.command()
def show(words: Words = None, plugins: Plugins = None, preset: Preset = None) -> None:
    """Print all settings as YAML, with their descriptions as comments. `train` accepts this file.

    Examples:
    * `flowgrain config show flux/g2rpo`
    * `flowgrain config show g2rpo method.group_size=8 > my.yaml`, then `flowgrain train my.yaml`
    """
    from flowgrain.config.show import to_yaml

    typer.echo(to_yaml(config_from(words, plugins, preset)), nl=False)


@config_app.command()
def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="Recipe, method, YAML file or run.")],
    right: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """List the settings that differ between two recipes, methods, YAML files or runs.

    Examples:
    * `flowgrain config diff g2rpo flow_grpo`
    * `flowgrain config diff flux/g2rpo runs/two`
    """
    from flowgrain.config.load import load_config
    from flowgrain.config.show import differences

    found = differences(*(load_config(each, plugins=plugins or ()) for each in (left, right)))
    if as_json:
        typer.echo(json.dumps([difference._asdict() for difference in found]))
        return
    if not found:
        say("The settings are equal.")
        return
    table = Table("setting", escape(left), escape(right))
    for difference in found:
        table.add_row(*map(escape, difference))
    out.print(table)
