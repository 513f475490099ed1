"""The commands `evaluate` and `sample`, which use trained models."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flowgrain.cli.app import (
    Json,
    Out,
    Plugins,
    app,
    integers,
    note,
    out,
    say,
    writing,
)
from flowgrain.cli.progress import ProgressDisplay
from flowgrain.settings import SettingsError

if TYPE_CHECKING:
    from flowgrain.evaluation import EvaluationRequest
    from flowgrain.evaluation import Table as EvaluationTable

_COLUMNS, _TILE = 8, 256
"""Images in a row of `sample`, and the minimum width of an image in pixels."""


@app.command("evaluate")
def evaluate_command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL ... [section.key=VALUE ...]",
            help="A run, an export, a LoRA file, `base`, or a backbone.",
        ),
    ],
    steps: Annotated[str, typer.Option(help="ODE steps, a list such as 10,16,20.")] = "16",
    seeds: Annotated[str, typer.Option(help="Seeds of the noise. One image per seed.")] = "0",
    folder: Out = None,
    images: Annotated[bool, typer.Option("--images", help="Save every image.")] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Recompute results that contain unscored images.")
    ] = False,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Evaluate models on held-out prompts by every reward, and compare them with the first model.

    The default directory is evaluations/LABEL-HASH. Repeat the command to continue after an
    interruption. Under torchrun, the processes share the work.

    Examples:
    * `flowgrain evaluate base runs/demo --steps 10,16,20 --images`
    * `flowgrain evaluate shapes evaluation.num_prompts=302 --json`
    * `torchrun --nproc-per-node 8 -m flowgrain evaluate base runs/flux data.eval_prompts=test.txt`
    """
    from flowgrain.models.quiet import quiet_libraries

    quiet_libraries()
    from flowgrain.evaluation import make_request, run_evaluation
    from flowgrain.registry import load_plugin

    for path in plugins or ():
        load_plugin(path)
    models, overrides = _models_and_overrides(words)
    request = make_request(
        models,
        overrides,
        steps=integers("--steps", steps, 1),
        seeds=integers("--seeds", seeds, 0),
        keep_images=images,
        retry_failed=retry,
    )
    folder = folder or request.default_directory
    note(_description(request))
    with writing(f"--out {folder}", folder), ProgressDisplay("chunk", done=None) as display:
        progress = run_evaluation(
            request, folder, lambda state: display.show(state.finished, state.total)
        )
    if progress.finished < progress.total:
        others = f"{progress.finished} of {progress.total} chunks are finished"
        note(f"{others}. Other processes work on the rest.")
        return
    with writing(f"--out {folder}", folder):
        _write_results(request, folder, as_json)


def _models_and_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """The words that name models, and the overrides. A path may contain "="."""
    models = [word for word in words if "=" not in word or Path(word).exists()]
    if not models:
        raise SettingsError(
            f"{' '.join(words)}: no model. Write the directory of a run, base, or a backbone first."
        )
    return models, [word for word in words if word not in models]


def _description(request: "EvaluationRequest") -> str:
    """The settings of an evaluation in a line."""
    config = request.config
    prompts = f"{config.evaluation.num_prompts} prompts"
    if config.model.name == "shapes":
        return f"shapes: {prompts}"
    size = f"{config.model.height} x {config.model.width} pixels"
    shifted = config.sampling.grid == "shifted"
    grid = f"shift {config.sampling.shift or 3.0}" if shifted else "grid of the model"
    sampling = f"guidance {config.eval_guidance:g}, {grid}"
    return f"{config.model.name}: {size}, {sampling}, {prompts}"


def _write_results(request: "EvaluationRequest", folder: Path, as_json: bool) -> None:
    """Write the table and the page of a finished evaluation, and print the table."""
    from flowgrain.evaluation import make_table
    from flowgrain.evaluation.table import markdown
    from flowgrain.report import write_side_by_side

    labels = [target.label for target in request.targets]
    table = make_table(folder, labels, request.steps, request.seeds)
    (folder / "table.md").write_text(markdown(table), encoding="utf-8")
    (folder / "table.json").write_text(table.to_json(), encoding="utf-8")
    page = write_side_by_side(folder, table, request.seeds)
    if as_json:
        typer.echo(table.to_json())
        return
    _show_table(table)
    say(f"raw scores in {folder / 'scores.parquet'}; open {page}")


def _show_table(results: "EvaluationTable") -> None:
    """The table of an evaluation and the tables of its parts on the terminal."""
    from flowgrain.evaluation.table import cell_lines, part_tables

    title = "mean over prompts, 95% confidence interval"
    names = map(escape, results.metrics)
    table = Table("model", "steps", *names, title=title, title_justify="left")
    for row in results.rows:
        cells = ("\n".join(map(escape, cell_lines(row.cells[m]))) for m in results.metrics)
        table.add_row(escape(row.model), str(row.steps), *cells)
    for paper in results.published:
        scores = [paper.scores.get(metric) for metric in results.metrics]
        if any(score is not None for score in scores):
            cells = ("-" if score is None else f"{score:.3f}" for score in scores)
            label = escape(f"{paper.label} (published)")
            table.add_row(label, str(paper.steps or "-"), *cells, style="dim")
    out.print(table)
    if len(results.rows) > 1:
        say("Δ: difference to the first model at the same steps, paired by prompt")
    for part_table in part_tables(results):
        title = escape(f"parts of {part_table.metric}")
        parts = map(escape, part_table.names)
        table = Table("model", "steps", *parts, title=title, title_justify="left")
        for label, count, values in part_table.lines:
            table.add_row(escape(label), count, *values)
        out.print(table)


@app.command()
def sample(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL [section.key=VALUE ...]",
            help="A run, an export, a LoRA file, `base`, or a backbone.",
        ),
    ],
    prompt: Annotated[list[str], typer.Option(help="Prompt of an image. Repeatable.")],
    steps: Annotated[int, typer.Option(min=1, help="ODE steps.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    file: Annotated[Path, typer.Option("--out", help="Image file to write.")] = Path("sample.png"),
    plugins: Plugins = None,
) -> None:
    """Sample images of prompts, side by side in one file.

    Examples:
    * `flowgrain sample shapes --prompt "three green circles"`
    * `flowgrain sample runs/demo --prompt "three green circles" --prompt "one red square"`
    """
    from flowgrain.models.quiet import quiet_libraries

    quiet_libraries()
    from flowgrain.config.load import parse_overrides
    from flowgrain.evaluation import base_config, find_targets, load_target
    from flowgrain.registry import load_plugin
    from flowgrain.training.evaluate import sample_images
    from flowgrain.training.pictures import contact_sheet, enlarge, to_pixels

    for path in plugins or ():
        load_plugin(path)
    models, words = _models_and_overrides(words)
    overrides = parse_overrides(words)
    if len(models) > 1:
        raise SettingsError(f"{' '.join(models)}: sample takes one model. Remove the others.")
    (target,) = find_targets(models)
    policy, config = load_target(target, base_config([target], overrides), overrides)
    try:
        images = sample_images(policy, config, prompt, steps, seed)
    except ValueError as error:
        raise SettingsError(f"--prompt: {error}") from error
    sheet = contact_sheet(to_pixels(images), min(len(prompt), _COLUMNS))
    try:
        with writing(f"--out {file}", file):
            file.parent.mkdir(parents=True, exist_ok=True)
            enlarge(sheet, images.shape[-1], _TILE).save(file)
    except (ValueError, KeyError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"--out {file}: not the name of an image. End it in .png.") from None
    say(f"wrote {file}")
