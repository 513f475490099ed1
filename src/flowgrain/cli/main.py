"""The command line: flowgrain train | plan | evaluate | sample | report | compare | fidelity | doctor | encode | serve."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from flowgrain.distributed.process import cores, keep_memory, quieten
from flowgrain.config.schema import SettingsError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Aligns flow-matching image models with rewards, crediting the denoising step that earned them.

    `flowgrain train` runs the bundled demo; `flowgrain train g2rpo max_steps=20` a method on the bundled model;
    `flowgrain plan g2rpo granularities=1,2` says what it will cost; `flowgrain report runs/demo` draws what came out.""",
)
out = Console()
err = Console(stderr=True)

Words = Annotated[list[str] | None, typer.Argument(metavar="[RECIPE] [key=value ...]", show_default=False)]


def _read_words(words: list[str] | None) -> tuple[str | None, dict[str, str]]:
    """A recipe's name, if the first word is none of key=value, and the settings that follow it."""
    words = list(words or [])
    name = words.pop(0) if words and "=" not in words[0] else None
    changes = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise SettingsError(f"{word!r} is neither the first word (a recipe) nor a setting; write it as key=value")
        changes[key] = value
    return name, changes


@app.command(no_args_is_help=False)
def train(
    words: Words = None,
    folder: Annotated[Path | None, typer.Option("--out", help="the run's folder by default runs/NAME")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="go on with the run in this folder")] = None,
) -> None:
    """Train: a recipe, a method or a saved run, with settings after it.

    Examples: `flowgrain train` · `flowgrain train g2rpo granularities=1,2 max_steps=40 seed=1 --out runs/two` ·
    `flowgrain train flow_grpo rewards=oracle:1,towers:0.5` · `flowgrain train --resume runs/demo max_steps=120` ·
    `torchrun --nproc-per-node 8 -m flowgrain train flux_g2rpo prompts=a.txt eval_prompts_file=b.txt`
    """
    quieten()
    from flowgrain.distributed.mesh import leave
    from flowgrain.config.recipes import DEFAULT, recipe
    from flowgrain.training.recorder import read_saved, read_settings
    from flowgrain.training.trainer import Run

    name, changes = _read_words(words)
    if resume is not None:
        if name is not None or folder is not None:
            raise SettingsError(f"--resume {resume} already says which run; leave out {name or f'--out {folder}'}")
        s = read_settings(resume, **changes)
        given = read_saved(resume).get("given", [])
        if given:
            raise SettingsError(
                f"{resume}: this run was given its {', '.join(given)} in Python; go on with it there: Run(...).resume()"
            )
        run = Run(s, resume)
        for message in run.resume():
            err.print(f"[yellow]{message}; going back to step {run.steps_done}")
    else:
        run = Run(recipe(name or DEFAULT, **changes), folder)
    s = run.settings
    try:
        if not run.group.first:  # it works, and the first process tells
            run.train()
            return
        out.print(f"{s.method} on {s.model}: {s.max_steps} steps from step {run.steps_done}, into {run.out}", highlight=False)
        begin = time.perf_counter()
        with _ProgressBar(s.max_steps, run.steps_done) as show:
            run.train(show)
    finally:
        leave()
    lines = run.record.read()
    rewards = ", ".join(
        f"{key.removeprefix('eval/')} {lines[0][key]:.3f} -> {lines[-1][key]:.3f}"
        for key in lines[-1]
        if key.startswith("eval/") and key.count("/") == 1 and key in lines[0]
    )
    out.print(
        f"done in {time.perf_counter() - begin:.0f} s. {'Held-out ' + rewards if rewards else ''}", highlight=False, soft_wrap=True
    )
    out.print(f"open {run.out / 'report.html'}", highlight=False)


class _ProgressBar:
    """A progress bar with reward, rate and time left on a terminal; nothing elsewhere."""

    def __init__(self, total: int, done: int) -> None:
        columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(*columns, *times, console=err, disable=not err.is_terminal)
        self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Any:
        self.bar.start()
        return self.show

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, metrics: dict[str, Any]) -> None:
        rewards = " ".join(f"{key[7:]} {value:.3f}" for key, value in metrics.items() if key.startswith("reward/"))
        rate = metrics["forward_passes"] / metrics["seconds"]
        self.bar.update(self.task, completed=metrics["step"], description=f"{rewards}  {rate:.0f} passes/s")


@app.command()
def plan(
    words: Words = None,
    gpus: Annotated[int, typer.Option(min=0, help="also say what a step should take on so many cards")] = 0,
    gpu: Annotated[str, typer.Option(help="a100, h100 or h200")] = "h200",
    as_json: Annotated[bool, typer.Option("--json", help="for machines, per prompt")] = False,
) -> None:
    """Plan: the tree of one prompt and its exact cost, without running anything.

    Examples: `flowgrain plan g2rpo` · `flowgrain plan g2rpo granularities=1,2 --json` · `flowgrain plan flow_grpo num_steps=8` ·
    `flowgrain plan flux_g2rpo --gpus 16 --gpu h200`
    """
    from flowgrain.methods.algorithms import build, changes_with_step, plan_tree, price
    from flowgrain.methods.calibration import calibration_price
    from flowgrain.config.recipes import DEFAULT, recipe
    from flowgrain.core.tree import schedule

    name, changes = _read_words(words)
    s = recipe(name or DEFAULT, **changes)
    method = build(s)
    tree = plan_tree(method, s)
    found: dict[str, Any] = {"method": s.method, **vars(price(method, s))}
    if method.published_passes:
        found["published_forward_passes"] = method.published_passes
    found["peak_latents"] = schedule(tree, s.rows_per_pass, s.order_of_tails).num_slots
    calibration = calibration_price(s).forward_passes
    if calibration:
        found["calibration_forward_passes"] = calibration
    of_steps = [price(method, s, step).forward_passes for step in range(1, s.max_steps + 1)] if changes_with_step(s) else []
    if of_steps:
        found["mean_forward_passes"] = sum(of_steps) / len(of_steps)
    if gpus:
        quieten()
        from flowgrain.planning.forecast import forecast, told

        expected = forecast(s, gpus, gpu)
        found["forecast"] = {**vars(expected), "total": expected.total}
    if as_json:
        typer.echo(json.dumps(found))
        return
    from flowgrain.report.drawing import draw_tree

    out.print(draw_tree(tree, s))
    table = Table("per prompt", "", title=f"cost of {s.method}", title_justify="left")
    for key, value in found.items():
        if key not in ("method", "forecast"):
            table.add_row(_MEANING.get(key, key.replace("_", " ")), f"{value:,.1f}".removesuffix(".0"))
    out.print(table)
    total = (sum(of_steps) or found["forward_passes"] * s.max_steps) * s.prompts_per_step
    out.print(
        f"{s.prompts_per_step} prompts a step, {s.max_steps} steps: {total:,} sampling forward passes in all", highlight=False
    )
    if gpus:
        table = Table("a forecast", "", title_justify="left")
        for what, how_much in told(expected, gpus, gpu):
            table.add_row(what, how_much)
        out.print(table)


_MEANING = {
    "forward_passes": "sampling forward passes",
    "train_forward_passes": "forward passes with gradient",
    "frozen_forward_passes": "of the update without gradient (reference, old policy)",
    "published_forward_passes": "sampling passes as published",
    "peak_latents": "latents held at most",
    "mean_forward_passes": "sampling passes, mean over the run",
    "calibration_forward_passes": "once a run, not a prompt: calibration",
}


@app.command("evaluate")
def evaluate_command(
    words: Annotated[list[str], typer.Argument(metavar="MODEL ... [key=value ...]")],
    steps: Annotated[str, typer.Option(help="ODE steps, a list")] = "16",
    seeds: Annotated[str, typer.Option(help="of the initial noise, a list; each is an image a prompt")] = "0",
    folder: Annotated[Path | None, typer.Option("--out", help="by default one of its own under evaluations/")] = None,
    images: Annotated[bool, typer.Option("--images", help="keep every image, for the side-by-side page")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="make again what has images that could not be scored")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Evaluate: models x held-out prompts x seeds x step counts by every metric, compared with the first model.

    A model is a run's folder, an export or a LoRA, `base`, or a backbone's name. The same command goes on after a stop;
    torchrun shares it among processes.

    Examples: `flowgrain evaluate base runs/demo --steps 10,16,20 --images` · `flowgrain evaluate shapes eval_prompts=302 --json` ·
    `torchrun --nproc-per-node 8 -m flowgrain evaluate flux runs/a/export weights=FLUX.1-dev eval_prompts_file=a.txt rewards=hps`
    """
    quieten()
    from flowgrain.report.side_by_side import write_side_by_side
    from flowgrain.evaluation.survey import as_json as json_of
    from flowgrain.evaluation.survey import default_folder, markdown, run_survey, survey, tabulate

    models = [word for word in words if "=" not in word or Path(word).exists()]
    if not models:
        raise SettingsError(f"{' '.join(words)}: names no model; write a run's folder, `base` or a backbone before the settings")
    changes = _read_words([word for word in words if word not in models])[1]
    asked = survey(models, changes, _ints("--steps", steps, 1), _ints("--seeds", seeds, 0), images, retry)
    folder = folder or default_folder(asked)
    s = asked.settings
    told = f"{s.model}: {s.height}x{s.width}, guidance {s.eval_guidance:g}, shift {s.shift}, {s.eval_prompts} prompts"
    err.print(told if s.model != "shapes" else f"shapes: {s.eval_prompts} prompts", highlight=False, soft_wrap=True)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("evaluating")
        state = run_survey(asked, folder, lambda now: bar.update(task, total=now.total, completed=now.done))
    if state.done < state.total:
        err.print(f"{state.done} of {state.total} pieces are done; other processes have the rest", highlight=False)
        return
    found = tabulate(folder, [one.label for one in asked.targets], asked.steps, asked.seeds)
    (folder / "table.md").write_text("".join(markdown(found)), encoding="utf-8")
    (folder / "table.json").write_text(json_of(found), encoding="utf-8")
    page = write_side_by_side(folder, found, asked.seeds)
    if as_json:
        typer.echo(json_of(found))
        return
    _show_table(found)
    out.print(f"raw scores in {folder / 'scores.parquet'}; open {page}", highlight=False, soft_wrap=True)


def _show_table(found: Any) -> None:
    """A survey's table and its parts on the terminal."""
    from flowgrain.evaluation.survey import cell_text, part_tables

    table = Table(
        "model", "steps", *map(escape, found.metrics), title="mean over prompts, 95% bootstrap interval", title_justify="left"
    )
    for row in found.rows:
        table.add_row(escape(row.model), str(row.steps), *("\n".join(map(escape, cell_text(row.cells[m]))) for m in found.metrics))
    for one in found.published:
        if any(m in one.scores for m in found.metrics):
            values = (f"{one.scores[m]:.3f}" if m in one.scores else "-" for m in found.metrics)
            table.add_row(f"{one.label} (published)", str(one.steps or "-"), *values, style="dim")
    out.print(table)
    if len(found.rows) > 1:
        out.print("with a sign: the difference to the first model at the same steps, paired by prompt", highlight=False)
    for metric, names, lines in part_tables(found):
        table = Table("model", "steps", *map(escape, names), title=escape(f"{metric}, part by part"), title_justify="left")
        for label, count, values in lines:
            table.add_row(escape(label), count, *values)
        out.print(table)


def _ints(option: str, text: str, least: int) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [least - 1]
    if min(values) < least:
        raise SettingsError(f"{option}={text}: give whole numbers from {least}, such as 10,16,20")
    return values


@app.command()
def sample(
    words: Annotated[list[str], typer.Argument(metavar="MODEL [key=value ...]")],
    prompt: Annotated[list[str], typer.Option(help="what to draw; may be given several times")],
    steps: Annotated[int, typer.Option(min=1, help="ODE steps")] = 16,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    file: Annotated[Path, typer.Option("--out", help="a picture file")] = Path("sample.png"),
) -> None:
    """Sample: pictures of prompts by a model (as `evaluate` takes them), side by side in one file, enlarged where they are small.

    Example: `flowgrain sample runs/demo --prompt "three green circles" --prompt "red square and blue circle" --out two.png`
    """
    quieten()
    from flowgrain.training.evaluate import draw
    from flowgrain.training.recorder import contact_sheet, enlarged, to_pixels
    from flowgrain.evaluation.survey import base_settings, open_model, targets

    target, changes = _read_words(words)
    if target is None:
        raise SettingsError(f"{' '.join(words)}: names no model; write a run's folder or a backbone before the settings")
    (found,) = targets([target])
    policy, s = open_model(found, base_settings([found], changes), changes)
    try:
        pixels = to_pixels(draw(policy, s, prompt, steps, seed))
    except ValueError as error:
        raise SettingsError(f"--prompt: {error}") from error
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        enlarged(contact_sheet(pixels, min(len(pixels), 8)), pixels.shape[2], 256).save(file)
    except ValueError:
        raise SettingsError(f"--out {file}: not a picture's name; end it in .png") from None
    out.print(f"wrote {file}", highlight=False)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN")]) -> None:
    """Report: (re)draws the page of a run or a comparison, finished or not. Example: `flowgrain report runs/demo`"""
    from flowgrain.report import write_report
    from flowgrain.report.comparison import write_comparison

    write = write_comparison if (folder / "comparison.yaml").exists() else write_report
    out.print(f"wrote {write(folder)}", highlight=False)


@app.command()
def compare(
    words: Annotated[list[str] | None, typer.Argument(metavar="[COMPARISON] [key=value ...]", show_default=False)] = None,
    methods: Annotated[str | None, typer.Option(help="instead of the comparison's: g2rpo,mixgrpo")] = None,
    rewards: Annotated[
        list[str] | None, typer.Option(help="a reward set, towers or towers,preference; may be given several times")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="a list, 1,2,3")] = None,
    budget: Annotated[float | None, typer.Option(help="of one run, in --unit")] = None,
    unit: Annotated[str | None, typer.Option(help="passes (with decodes and reward calls), updates or seconds")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="processes, a thread each; 0: one a core")] = 0,
    folder: Annotated[
        Path | None, typer.Option("--out", help="by default comparisons/NAME; a finished run in it is not run again")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it would cost, and stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --dry-run, for machines")] = False,
) -> None:
    """Compare: methods x reward sets x seeds at equal budget, one table and one page. The same command goes on after a stop.

    Examples: `flowgrain compare quick` · `flowgrain compare --dry-run` (of the full one) ·
    `flowgrain compare full --methods g2rpo,densegrpo --rewards towers --seeds 1,2 --budget 40000 --out comparisons/two`
    """
    quieten()
    from flowgrain.studies.compare import entries, load_comparison, method_names, run_comparison
    from flowgrain.report.comparison import write_comparison
    from flowgrain.training.trainer import RunStopped

    name, common = _read_words(words)
    given = {"seeds": seeds, "budget": budget, "unit": unit, "override": common}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if methods is not None:
        changes["methods"] = method_names(methods, name or "full")
    if rewards:
        if len(set(rewards)) < len(rewards):
            raise SettingsError(f"--rewards {' --rewards '.join(rewards)}: one stands there twice; two runs cannot have one name")
        changes["rewards"] = {one.replace(",", "+"): one for one in rewards}
    c = load_comparison(name or "full", changes)
    planned = entries(c)
    jobs = jobs or cores()
    if dry_run:
        _tell_plan(c.name, planned, jobs, as_json)
        return
    folder = folder or Path("comparisons") / c.name
    begin = time.perf_counter()

    def show(state: Any, finished: str) -> None:
        err.print(f"{state.done}/{state.total} {finished} [{time.perf_counter() - begin:.0f} s]", highlight=False, markup=False)

    try:
        state = run_comparison(c, folder, jobs, show)
    except RunStopped:
        with contextlib.suppress(SettingsError):  # nothing may be finished yet
            err.print(f"so far: {write_comparison(folder)}", highlight=False)
        raise
    for run_name, reason in state.stopped.items():
        err.print(f"{run_name} stopped early: {reason}", highlight=False, markup=False)
    out.print(f"open {write_comparison(folder)}", highlight=False)


def _tell_plan(name: str, planned: list[Any], jobs: int, as_json: bool) -> None:
    """What each run of a comparison will cost, and about how long on this machine."""
    from flowgrain.studies.compare import estimated_seconds, machine_speed

    speed = machine_speed(planned[0].settings)
    rows = [
        {
            "name": entry.name,
            "rollouts": None if entry.settings.max_seconds else entry.settings.max_steps,
            "units": entry.units,
            "evaluation_passes": entry.evaluation_passes,
            "seconds": estimated_seconds(entry, speed),
        }
        for entry in planned
    ]
    seconds = sum(row["seconds"] for row in rows) / jobs
    if as_json:
        typer.echo(json.dumps({"name": name, "runs": rows, "seconds": seconds, "jobs": jobs}))
        return
    table = Table("run", "rollouts", "units", "evaluation passes", "about", title=f"{name}: {len(rows)} runs", title_justify="left")
    for row in rows:
        rollouts = "-" if row["rollouts"] is None else f"{row['rollouts']:,}"
        table.add_row(
            row["name"], rollouts, f"{row['units']:,.0f}", f"{row['evaluation_passes']:,}", f"{row['seconds'] / 60:.1f} min"
        )
    out.print(table)
    total = f"in all {sum(row['units'] for row in rows):,.0f} units"
    out.print(f"{total}; about {seconds / 60:.0f} minutes with {jobs} processes on this machine", highlight=False)


@app.command("fidelity")
def fidelity_command(
    words: Words = None,
    cheap: Annotated[list[str] | None, typer.Option(help="key=value of the cheaper rollout; may be given several times")] = None,
    steps: Annotated[int, typer.Option(min=1, help="training steps whose groups are sampled both ways")] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Fidelity: how well a cheaper rollout ranks the groups of a recipe, and what it saves. Nothing is trained.

    Examples: `flowgrain fidelity mixgrpo --cheap tail_order=2 --cheap tail_ratio=0.4` ·
    `flowgrain fidelity g2rpo --cheap granularities=1` · `flowgrain fidelity sd35_g2rpo_lora --cheap tail_cache=taylorseer:3`
    """
    quieten()
    import numpy as np

    from flowgrain.evaluation.fidelity import fidelity
    from flowgrain.config.recipes import DEFAULT, recipe

    name, changes = _read_words(words)
    rest = _read_words(cheap)[1] if cheap and all("=" in one for one in cheap) else {}
    if not rest:
        raise SettingsError(f"--cheap {' '.join(cheap or ())}: say what is cheaper, as key=value")
    found = fidelity(recipe(name or DEFAULT, **changes), recipe(name or DEFAULT, **{**changes, **rest}), steps)
    low, middle, high = (
        (float(v) for v in np.quantile(found.correlation, (0.1, 0.5, 0.9))) if len(found.correlation) else (float("nan"),) * 3
    )
    told = {
        "spearman": middle,
        "spearman_10": low,
        "spearman_90": high,
        "flipped": found.flipped,
        "seconds": found.seconds,
        "passes": found.passes,
    }
    if as_json:
        typer.echo(json.dumps(told))
        return
    out.print(
        f"Spearman of a group {middle:.2f} (from {low:.2f} to {high:.2f} in 8 of 10 of {len(found.correlation)} groups), "
        f"{found.flipped:.0%} of the advantages with the other sign, "
        f"{found.seconds:.2f} of the time, {found.passes:.2f} of the passes",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def doctor(words: Words = None) -> None:
    """Doctor: before a long run, tries its parts and says what it will need, do and cost.

    Example: `flowgrain doctor g2rpo model=flux weights=FLUX.1-dev prompts=a.txt eval_prompts_file=b.txt rewards=clip`
    """
    quieten()
    from flowgrain.planning.doctor import examine
    from flowgrain.config.recipes import DEFAULT, recipe

    name, changes = _read_words(words)
    findings = examine(recipe(name or DEFAULT, **changes))
    table = Table(show_header=False, box=None, padding=(0, 1))
    for one in findings:
        table.add_row("[green]well[/]" if one.well else "[bold red]not well[/]", one.what, escape(one.said))
    out.print(table)
    if not all(one.well for one in findings):
        raise typer.Exit(1)


@app.command()
def encode(words: Words = None) -> None:
    """Encode: writes the embeddings of a recipe's prompts, so that training needs no text encoder.

    Example: `flowgrain encode g2rpo model=flux weights=FLUX.1-dev prompts=a.txt eval_prompts_file=b.txt embedding_cache=cache`
    """
    quieten()
    from flowgrain.training.policy import compute_device
    from flowgrain.config.recipes import DEFAULT, recipe
    from flowgrain.training.trainer import load_model, load_prompts

    name, changes = _read_words(words)
    s = recipe(name or DEFAULT, **changes)
    if s.embedding_cache is None or s.model == "shapes":
        raise SettingsError(
            f"embedding_cache={s.embedding_cache}, model={s.model}: name the folder to write to, and a model with text encoders"
        )
    backbone = load_model(s, train=False)
    backbone.to(compute_device(s.device))
    prompts = list(dict.fromkeys(["", *(p for split in ("train", "eval") for p in load_prompts(s, backbone, split))]))
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("encoding", total=len(prompts))
        for first in range(0, len(prompts), 64):
            backbone.encode(prompts[first : first + 64])
            bar.update(task, completed=min(first + 64, len(prompts)))
    out.print(f"{len(prompts)} prompts are in {s.embedding_cache}", highlight=False)


@app.command()
def serve(
    rewards: Annotated[list[str], typer.Argument(metavar="REWARD ...", help="names, as in rewards=")],
    words: Annotated[str, typer.Option("--models", help="as in reward_models=")] = "",
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8600,
    device: Annotated[str, typer.Option()] = "cpu",
    max_images: Annotated[int, typer.Option(min=1, help="of one request")] = 256,
    max_megabytes: Annotated[int, typer.Option(min=1, help="of one request")] = 256,
) -> None:
    """Serve: rewards over HTTP, for trainers elsewhere. With FLOWGRAIN_TOKEN set, requests must bear it.

    Example: `flowgrain serve towers preference --port 8600`, and there `flowgrain train rewards=remote
    reward_models=remote=http://HOST:8600#towers`
    """
    quieten()
    from flowgrain.rewards import RewardSource, load_reward
    from flowgrain.config.schema import settings

    try:
        import uvicorn
    except ImportError:
        raise SettingsError("flowgrain serve needs FastAPI; install it with `pip install 'flowgrain[serve]'`") from None
    from flowgrain.rewards.service import TOKEN, service

    models = settings({"reward_models": words}).reward_models
    try:
        loaded = {name: load_reward(name, RewardSource(models.get(name), device)) for name in rewards}
    except ValueError as error:
        raise SettingsError(str(error)) from error
    token = os.environ.get(TOKEN)
    out.print(f"serving {', '.join(loaded)} on http://{host}:{port}{'' if token else ', without a token'}", highlight=False)
    uvicorn.run(service(loaded, token, max_images, max_megabytes * 2**20), host=host, port=port, log_level="warning")


def main() -> None:
    """Runs the command; errors that concern the user are one message and an exit status, not a traceback."""
    from flowgrain.training.checkpoint import CheckpointError

    keep_memory()
    try:
        app()
    except SettingsError as error:
        _fail(str(error), 2)
    except CheckpointError as error:
        _fail(str(error), 1)
    except RuntimeError as error:
        from flowgrain.training.trainer import Interrupted, RunStopped

        if not isinstance(error, RunStopped):
            raise
        _fail(str(error), 130 if isinstance(error, Interrupted) else 1)


def _fail(message: str, status: int) -> None:
    err.print("error:", style="bold red", end=" ")
    err.print(message, markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(status)
