"""Models x prompts x seeds x inference steps, scored by every metric: in pieces, so that a stop loses one piece at most.

Letters: I images, P prompts. Several processes share the work by the rank that torchrun gives them.
"""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from flowgrain.training import checkpoint
from flowgrain.models.base import BACKBONES
from flowgrain.training.checkpoint import write_atomically
from flowgrain.training.evaluate import Evaluation, evaluate, mean
from flowgrain.training.policy import Policy, compute_device, load_export
from flowgrain.evaluation.published import Published, published
from flowgrain.config.recipes import DEFAULT, MODELS, recipe
from flowgrain.training.recorder import read_saved, read_settings, to_pixels
from flowgrain.rewards import Explains, Reward, fields_of
from flowgrain.config.schema import FIXED, Settings, SettingsError, existing_file, settings
from flowgrain.training.trainer import load_model, load_prompts, load_rewards

log = logging.getLogger(__name__)
PIECE = 64
"""Images of a piece: what a stop can lose."""
_RESAMPLES = 4000


# ---------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Target:
    """A model to evaluate: its name in the table, where it is, what it is ("base", "run", "lora", "transformer"), which weights."""

    label: str
    path: str
    kind: str
    identity: str
    checkpoint: Path | None = None
    """Of a run, the one that is evaluated: the run may go on meanwhile."""


def targets(words: Sequence[str]) -> list[Target]:
    """What `words` name: `base` or a backbone, a run's folder, an export or its lora or transformer folder, a LoRA file.

    Raises SettingsError for a word that names none of these, or for the same model twice.
    """
    found = [_target(word) for word in words]
    for number, one in enumerate(found):
        if (one.kind, one.identity) in [(other.kind, other.identity) for other in found[:number]]:
            raise SettingsError(f"{one.path}: stands there twice; name each model once")
    labels: list[Target] = []
    for one in found:
        if [other.label for other in found].count(one.label) > 1:
            path = re.sub(r"[^\w.+-]+", "-", one.path).strip("-")
            one = replace(one, label=f"{path}-{hashlib.sha256(one.identity.encode()).hexdigest()[:6]}")
        labels.append(one)
    return labels


def _target(word: str) -> Target:
    path = Path(word).expanduser()
    if word == "base" or word in BACKBONES:
        return Target(word, word, "base", word)
    if (path / "run.yaml").exists():
        newest, _, damaged = checkpoint.load_last_good(path / "checkpoints")
        for message in damaged:
            log.warning("%s; an older one is evaluated", message)
        step = newest.name if newest is not None else "step-0"
        return Target(path.resolve().name, str(path), "run", f"{path.resolve()} {step}", newest)
    for part, kind in (("lora", "lora"), ("transformer", "transformer"), ("", "lora"), ("", "transformer")):
        folder = path / part
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [path] if path.suffix == ".safetensors" else []
        if files and (kind == "lora") != (folder / "config.json").exists():
            stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            parents = [
                one for one in (path.resolve(), *path.resolve().parents) if one.name not in ("export", "lora", "transformer")
            ]
            name = parents[0].stem if path.suffix == ".safetensors" else parents[0].name
            return Target(
                re.sub(r"[^\w.+-]+", "-", name), str(folder if path.is_dir() else path), kind, f"{path.resolve()} {stamp}"
            )
    raise SettingsError(
        f"{word}: there is no such model; name a run's folder, its export, a LoRA file or folder, `base`, or one of "
        f"{', '.join(BACKBONES)}"
    )


@dataclass(frozen=True)
class Survey:
    """What is evaluated: models by inference steps by seeds, on the prompts and by the metrics that the settings name."""

    targets: list[Target]
    settings: Settings
    """Of the first model: its prompts and metrics are everybody's."""
    changes: Mapping[str, Any]
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    keep_images: bool = False
    retry: bool = False
    """Make pieces again in which something could not be scored."""

    def __post_init__(self) -> None:
        for name, values in (("steps", self.steps), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise SettingsError(f"--{name} {','.join(map(str, values))}: names a value twice; give each once")


def survey(
    words: Sequence[str],
    changes: Mapping[str, Any],
    steps: Sequence[int],
    seeds: Sequence[int],
    keep_images: bool = False,
    retry: bool = False,
) -> Survey:
    """The survey of the models that `words` name, with settings `changes` for all of them. Raises SettingsError."""
    for setting, option in (("eval_num_steps", "--steps"), ("seed", "--seeds")):
        if setting in changes:
            raise SettingsError(f"{setting}={changes[setting]}: here it is {option} that says so")
    found = targets(words)
    for first in [one for one in found if one.kind == "run"][:1]:  # its prompts and metrics are everybody's
        given = read_saved(Path(first.path)).get("given", [])
        for what, setting in (("rewards", "rewards"), ("eval_prompts", "eval_prompts_file")):
            if what in given and setting not in changes:
                raise SettingsError(f"{first.path}: this run was given its {what} in Python; name some here: {setting}=...")
    return Survey(found, base_settings(found, changes), changes, tuple(steps), tuple(seeds), keep_images, retry)


def base_settings(found: Sequence[Target], changes: Mapping[str, Any]) -> Settings:
    """The settings of what is no run: those of the first run among the models, or of a backbone with `changes`."""
    runs = [one for one in found if one.kind == "run"]
    if runs:
        return read_settings(Path(runs[0].path), **changes)
    named = next((one.path for one in found if one.path in BACKBONES), None)
    return settings(
        {
            **MODELS.get(named or str(changes.get("model")), recipe(DEFAULT).model_dump()),
            **({"model": named} if named else {}),
            **changes,
        }
    )


def open_model(target: Target, base: Settings, changes: Mapping[str, Any]) -> tuple[Policy, Settings]:
    """The policy of `target`, with its averaged weights where it has them, and its settings with a known shift."""
    if target.kind == "run":
        folder = Path(target.path)
        s = read_settings(folder, **changes)
        own = [name for name in (*FIXED, "weights", "ema_decay") if getattr(s, name) != getattr(read_settings(folder), name)]
        if own:
            raise SettingsError(
                f"{own[0]}={changes[own[0]]}: {folder} was trained with {getattr(read_settings(folder), own[0])} and keeps it"
            )
        if "backbone" in read_saved(folder).get("given", []):
            raise SettingsError(
                f"{folder}: this run was given its backbone in Python; load it there with Run(..., backbone=...).restore()"
            )
        policy = Policy(load_model(s), s, compute_device(s.device))
        if target.checkpoint is not None:
            state = checkpoint.load(target.checkpoint)
            checkpoint.read(target.checkpoint, policy.tensors())
            policy.restored(state["policy"])
        return policy, s
    s = base if target.path not in BACKBONES else base.model_copy(update={"model": target.path})
    backbone = load_model(s, train=False)
    if target.kind != "base":
        load_export(backbone, Path(target.path), target.kind)
    if s.shift == "auto":
        s = s.with_natural_shift(*backbone.natural_shift(s.num_steps))
    return Policy(backbone, s, compute_device(s.device), train=False), s


# ---------------------------------------------------------------------- running it


@dataclass(frozen=True)
class Piece:
    """Some images of one model at one step count from one seed, and the file of their scores."""

    target: Target
    steps: int
    seed: int
    first: int
    file: Path


@dataclass(frozen=True)
class State:
    """How many pieces there are and how many are done."""

    done: int
    total: int


def pieces(survey: Survey, folder: Path, count: int) -> Iterator[Piece]:
    """All pieces of a survey of `count` prompts, model by model."""
    for target in survey.targets:
        for steps in survey.steps:
            for seed in survey.seeds:
                for first in range(0, count, PIECE):
                    file = folder / "scores" / target.label / f"{steps:04d}-{seed}-{first:06d}.parquet"
                    yield Piece(target, steps, seed, first, file)


def run_survey(survey: Survey, folder: Path, show: Callable[[State], None] | None = None) -> State:
    """Scores this process's share of what `folder` lacks. Raises SettingsError if the folder holds something else.

    Under torchrun every process takes every so many-th piece; they need not wait for each other. When all pieces are
    there, `tabulate` reads them.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available() and survey.settings.device != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if survey.settings.threads:
        torch.set_num_threads(survey.settings.threads)
    s, current = survey.settings, survey.targets[0]
    if s.eval_prompts_file is not None:
        existing_file("eval_prompts_file", s.eval_prompts_file)  # before a large model is loaded
    try:
        metrics = load_rewards(s)[1]
    except ValueError as error:
        raise SettingsError(str(error)) from error
    model: tuple[Policy, Settings] | None = open_model(current, s, survey.changes)
    chosen = load_prompts(s, model[0].backbone, "eval")
    prompts = [chosen[i % len(chosen)] for i in range(s.eval_prompts)]
    _agree(survey, folder, prompts, metrics)
    everything = list(pieces(survey, folder, len(prompts)))
    for piece in everything[rank::size]:
        count = len(prompts[piece.first : piece.first + PIECE])
        there = _read_piece(piece) if piece.file.exists() else None
        shown = not survey.keep_images or _image_of(folder, piece, count - 1).exists()
        if there is not None and shown and not (survey.retry and any(np.isnan(there[name]).any() for name in metrics)):
            continue
        if piece.target != current:
            model = None  # one at a time in memory
            current, model = piece.target, open_model(piece.target, s, survey.changes)
        found = _evaluate(piece, *model, prompts[piece.first : piece.first + PIECE], metrics)
        if survey.keep_images:
            _keep_images(found, piece, folder)
        if there is not None:  # what was scored before stays so, whatever fails now
            kept = {name: np.where(np.isnan(values), there.get(name, values), values) for name, values in found.scores.items()}
            found = replace(found, scores=kept)
        _keep_scores(found, piece)
        if show is not None:
            show(_state(everything))
    return _state(everything)


def _state(everything: Sequence[Piece]) -> State:
    return State(sum(piece.file.exists() for piece in everything), len(everything))


def _evaluate(piece: Piece, policy: Policy, s: Settings, prompts: Sequence[str], metrics: Mapping[str, Reward]) -> Evaluation:
    return evaluate(
        policy,
        prompts,
        metrics,
        sigmas=s.grid(piece.steps),
        guidance=s.eval_guidance,
        rows_per_pass=s.rows_per_pass,
        reward_batch=s.reward_batch,
        seed=piece.seed,
        places=range(piece.first, piece.first + len(prompts)),
    )


def _read_piece(piece: Piece) -> dict[str, NDArray[Any]] | None:
    """The columns of a finished piece; None if its file is damaged, and the piece is then made again."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(piece.file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        log.warning("%s is damaged (%s) and is made again", piece.file, error)
        return None
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def image_path(folder: Path, label: str, steps: int, seed: int, place: int) -> Path:
    """Where the image of prompt number `place` is kept."""
    return folder / "images" / label / f"{steps:04d}-{seed}" / f"{place:06d}.png"


def _image_of(folder: Path, piece: Piece, offset: int) -> Path:
    return image_path(folder, piece.target.label, piece.steps, piece.seed, piece.first + offset)


def _keep_images(found: Evaluation, piece: Piece, folder: Path) -> None:
    for offset, pixels in enumerate(to_pixels(found.images)):
        file = _image_of(folder, piece, offset)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)


def _keep_scores(found: Evaluation, piece: Piece) -> None:
    import pyarrow
    from pyarrow import parquet

    count = len(found.prompts)
    columns: dict[str, Any] = {
        "model": [piece.target.label] * count,
        "steps": [piece.steps] * count,
        "seed": [piece.seed] * count,
        "place": list(range(piece.first, piece.first + count)),
        "prompt": list(map(str, found.prompts)),
        **found.scores,
        **found.parts,
        **{f"{name}{_WEIGHT}": values for name, values in found.weights.items()},
    }
    piece.file.parent.mkdir(parents=True, exist_ok=True)
    aside = piece.file.with_suffix(f".{os.getpid()}.tmp")
    parquet.write_table(pyarrow.table(columns), aside)
    aside.replace(piece.file)


_WEIGHT = "#weight"


_OF_BASE = (
    "reward_models",
    "judge_template",
    "weights",
    "revision",
    "height",
    "width",
    "shift",
    "shift_terminal",
    "eval_guidance",
    "dtype",
)
"""What else than its weights decides the images of a model that is no run."""


def _agree(survey: Survey, folder: Path, prompts: Sequence[str], metrics: Mapping[str, Reward]) -> None:
    """Writes what the folder holds, or checks that it is this: the same prompts, metrics, models and settings."""
    fixed = {
        "prompts": hashlib.sha256(repr([(str(p), dict(fields_of(p))) for p in prompts]).encode()).hexdigest(),
        "metrics": list(metrics),
        "settings": _plain(survey.changes),
        "model": survey.settings.model,
        "base": {name: getattr(survey.settings, name) for name in _OF_BASE},
        "mean_of_parts": [name for name, one in metrics.items() if isinstance(one, Explains) and one.mean_of_parts],
    }
    models = {one.label: one.identity for one in survey.targets}
    file = folder / "survey.yaml"
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"--out {folder}: is a file; name a folder")
    if file.exists():
        saved = _read_spec(folder)
        for name, value in fixed.items():
            if saved.get(name) != value:
                raise SettingsError(f"--out {folder}: holds an evaluation with other {name}; give another folder")
        for label, identity in models.items():
            if saved["models"].get(label, identity) != identity:
                raise SettingsError(
                    f"--out {folder}: {label} has other weights now than when it was evaluated there; give another folder"
                )
        models = {**saved["models"], **models}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, yaml.safe_dump({**fixed, "models": models}, sort_keys=False))


def _read_spec(folder: Path) -> dict[str, Any]:
    """What survey.yaml says. Raises SettingsError if it cannot be read."""
    try:
        saved = yaml.safe_load((folder / "survey.yaml").read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or not isinstance(saved.get("models"), dict):
            raise ValueError("it holds no models")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{folder / 'survey.yaml'}: cannot be read ({error}); give another folder") from None
    return saved


def _plain(changes: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in sorted(changes.items())}


def default_folder(survey: Survey) -> Path:
    """A folder of this survey's own: the same command finds what it did before, another one does not."""
    what = [_plain(survey.changes), [one.identity for one in survey.targets]]
    return Path("evaluations") / f"{survey.targets[-1].label}-{hashlib.sha256(repr(what).encode()).hexdigest()[:8]}"


# ---------------------------------------------------------------------- reading it


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """A metric of a model: its mean over prompts, the paired difference to the first model, and how many images count."""

    value: Interval
    difference: Interval | None
    scored: int
    failed: int


@dataclass(frozen=True)
class Row:
    """A line of the table: cells by metric, and the means of parts by metric and part."""

    model: str
    steps: int
    cells: dict[str, Cell]
    parts: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Table:
    """All rows, the first model of each step count being what the others are compared with, and the papers' own rows."""

    metrics: list[str]
    rows: list[Row]
    published: list[Published]
    mean_of_parts: list[str]


def bootstrap(values: NDArray[np.floating]) -> Interval:
    """Mean of finite `values` with its 95% percentile bootstrap interval, from a fixed seed; NaN ends for fewer than two."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return Interval(float(values.mean()) if len(values) else math.nan, math.nan, math.nan)
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, method="percentile", batch=500, rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(float(values.mean()), float(found.low), float(found.high))


def read_scores(folder: Path) -> dict[str, NDArray[Any]]:
    """All finished pieces of a survey as columns [I]. Raises SettingsError if there is none, or one cannot be read."""
    import pyarrow
    from pyarrow import parquet

    files = sorted((folder / "scores").glob("*/*.parquet"))
    if not files:
        raise SettingsError(f"{folder}: nothing is evaluated here yet; go on with `flowgrain evaluate ... --out {folder}`")
    tables = []
    for file in files:
        try:
            tables.append(parquet.read_table(file))
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise SettingsError(f"{file}: cannot be read ({error}); delete it, and the same command makes it again") from None
    whole = pyarrow.concat_tables(tables, promote_options="default")
    aside = folder / f".scores.{os.getpid()}.tmp"
    parquet.write_table(whole, aside)
    aside.replace(folder / "scores.parquet")
    return {name: whole.column(name).to_numpy(zero_copy_only=False) for name in whole.column_names}


def tabulate(
    folder: Path, models: Sequence[str] | None = None, steps: Sequence[int] | None = None, seeds: Sequence[int] | None = None
) -> Table:
    """The table of a survey's folder, of all that is there or of some of it. The bootstrap is over prompts: seeds are averaged."""
    saved = _read_spec(folder)
    data = read_scores(folder)
    models = list(saved["models"]) if models is None else models
    steps = sorted(set(data["steps"].tolist())) if steps is None else steps
    metrics = saved["metrics"]
    number = {text: i for i, text in enumerate(dict.fromkeys(data["prompt"].tolist()))}
    text = np.array([number[one] for one in data["prompt"].tolist()])
    keys = np.unique(np.stack([data["place"], data["seed"]], 1), axis=0, return_inverse=True)[1].reshape(-1)
    prompt_of_key = np.zeros(keys.max() + 1, dtype=np.int64)
    prompt_of_key[keys] = text
    rows = []
    for count in steps:
        first: dict[str, NDArray[np.floating]] | None = None
        for model in models:
            there = (data["model"] == model) & (data["steps"] == count)
            if seeds is not None:
                there &= np.isin(data["seed"], list(seeds))
            if not there.any():
                continue
            of_image = {m: np.full(len(prompt_of_key), np.nan) for m in metrics}  # by place and seed, the same for every model
            for m in metrics:
                of_image[m][keys[there]] = data[m][there]
            cells = {
                m: Cell(
                    bootstrap(_by_prompt(values, prompt_of_key)),
                    # Image by image: what one side lacks is left out of the other too.
                    bootstrap(_by_prompt(values - first[m], prompt_of_key)) if first is not None else None,
                    scored=int(np.isfinite(data[m][there]).sum()),
                    failed=int(np.isnan(data[m][there]).sum()),
                )
                for m, values in of_image.items()
            }
            first = first or of_image
            rows.append(Row(model, count, cells, _parts(data, there, metrics, saved["mean_of_parts"])))
    names = [*metrics, *(f"{m}/{part}" for m in metrics for part in (rows[0].parts.get(m, {}) if rows else {}))]
    return Table(metrics, rows, published(saved["model"], names, steps), saved["mean_of_parts"])


def _by_prompt(values: NDArray[np.floating], prompt: NDArray[np.integer]) -> NDArray[np.floating]:
    """Mean of each prompt's finite values, NaN where there is none; `prompt` numbers the prompt of every value."""
    there, count = np.isfinite(values), int(prompt.max()) + 1
    total, images = (np.bincount(prompt[there], weights=w, minlength=count) for w in (values[there], None))
    return np.divide(total, images, out=np.full(count, np.nan), where=images > 0)


def _parts(
    data: Mapping[str, NDArray[Any]], there: NDArray[np.bool_], metrics: Sequence[str], mean_of_parts: Sequence[str]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for metric in metrics:
        names = [name for name in data if name.startswith(f"{metric}/") and not name.endswith(_WEIGHT)]
        of_metric = {}
        for name in names:
            weights = data.get(f"{name}{_WEIGHT}")
            value = mean(data[name][there].astype(float), None if weights is None else weights[there].astype(float))
            if math.isfinite(value):
                of_metric[name.removeprefix(f"{metric}/")] = value
        if of_metric:
            overall = {"overall": float(np.mean(list(of_metric.values())))} if metric in mean_of_parts else {}
            found[metric] = {**overall, **of_metric}
    return found


def as_json(table: Table) -> str:
    """A table for machines: numbers that are not there are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return plain(vars(value)) if isinstance(value, Interval | Cell | Row | Published) else value

    return json.dumps(plain(vars(table)), allow_nan=False)


def markdown(table: Table) -> Iterator[str]:
    """The table as text: mean [95% interval], paired difference to the first model [its interval]; papers' rows; then parts."""
    yield f"| model | steps | {' | '.join(table.metrics)} |\n|---|---|{'---|' * len(table.metrics)}\n"
    for row in table.rows:
        yield f"| {row.model} | {row.steps} | {' | '.join(' '.join(cell_text(row.cells[m])) for m in table.metrics)} |\n"
    for one in table.published:
        if any(m in one.scores for m in table.metrics):
            cells = [f"{one.scores[m]:.3f}" if m in one.scores else "-" for m in table.metrics]
            yield f"| {one.label} (published, {one.paper}) | {one.steps or '-'} | {' | '.join(cells)} |\n"
    for metric, names, lines in part_tables(table):
        yield f"\n{metric}, part by part\n\n| model | steps | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}\n"
        for label, steps, values in lines:
            yield f"| {label} | {steps} | {' | '.join(values)} |\n"


def cell_text(cell: Cell) -> list[str]:
    """A cell, line by line: mean, its interval, the difference, its interval, failures; without what is not there."""
    told = _interval_text(cell.value, "")
    if cell.difference is not None:
        told += _interval_text(cell.difference, "+")
    return [*told, f"{cell.failed} not scored"] if cell.failed else told


def _interval_text(found: Interval, sign: str) -> list[str]:
    if not math.isfinite(found.mean):
        return ["-"]
    bounds = [f"[{found.low:{sign}.3f}, {found.high:{sign}.3f}]"] if math.isfinite(found.low) else []
    return [f"{found.mean:{sign}.3f}", *bounds]


def part_tables(table: Table) -> Iterator[tuple[str, list[str], list[tuple[str, str, list[str]]]]]:
    """For every metric with parts: its name, the names of the parts, and lines of model, steps and values."""
    for metric in table.metrics:
        names = list(dict.fromkeys(part for row in table.rows for part in row.parts.get(metric, {})))
        if not names:
            continue
        lines = [
            (row.model, str(row.steps), [f"{row.parts[metric][n]:.3f}" if n in row.parts[metric] else "-" for n in names])
            for row in table.rows
            if metric in row.parts
        ]
        for one in table.published:
            values = {name: one.scores.get(f"{metric}/{name}") for name in names}
            if any(value is not None for value in values.values()):
                shown = [f"{value:.3f}" if value is not None else "-" for value in values.values()]
                lines.append((f"{one.label} (published, {one.paper})", str(one.steps or "-"), shown))
        yield metric, names, lines
