"""The commands `recipes`, `config show` and `config diff`."""

import json
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flowgrain.cli.app import Json, Plugins, Preset, Words, app, config_from, out, say

config_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Show and compare configurations."
)
app.add_typer(config_app, name="config")

_COLUMNS = {
    "name": "name",
    "paper": "paper (arXiv)",
    "task": "task",
    "source": "source of the settings",
    "published": "published result",
}
"""Facts of a recipe in the table, and their titles. JSON also has title, hardware and cost."""


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the bundled recipes with their paper, task, source and published result.

    Examples:
    * `flowgrain recipes`
    * `flowgrain recipes --json`
    """
    from flowgrain.config.load import recipe_facts, recipe_names

    facts = [recipe_facts(name) for name in recipe_names()]
    if as_json:
        typer.echo(json.dumps(facts))
        return
    table = Table(*_COLUMNS.values(), show_lines=True)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for recipe in facts:
        table.add_row(*(escape(_cell(column, recipe.get(column))) for column in _COLUMNS))
    out.print(table)


def _cell(column: str, fact: Any) -> str:
    """The text of a fact: the first sentence of a published result, and other facts in full."""
    text = "" if fact is None else str(fact)
    return text.split(". ")[0] if column == "published" else text


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
