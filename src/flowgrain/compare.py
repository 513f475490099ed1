"""Several methods on one model at equal budget: planned, priced, run resumably, and measured alike.

Letters: R runs (method x reward set x seed), S seeds, P prompts.
"""

import concurrent.futures
import difflib
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flowgrain import comparisons
from flowgrain.algorithms import build, densegrpo, plan_tree, price
from flowgrain.checkpoint import write_atomically
from flowgrain.process import keep_memory, quieten
from flowgrain.record import contact_sheet, describe_environment, to_pixels
from flowgrain.settings import PAPER, IntList, Settings, SettingsError, canonical, settings
from flowgrain.shapes.features import diversity, features, frechet, true_features
from flowgrain.train import Interrupted, Run, RunStopped
from flowgrain.tree import cost

BASE = "base"
SHOWN = 8  # pictures kept of a run
_MANY = 10**6


class Comparison(BaseModel):
    """What is compared. Every run is a method's settings with `common` and its own changes, one reward set and one seed.

    Example: Comparison(name="two", methods={"g2rpo": {}, "g2rpo {1}": {"method": "g2rpo", "granularities": 1}},
    rewards={"towers": "towers"}, seeds=(1, 2), budget=20000)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, pattern=r"^[\w.+-]+$")
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    rewards: dict[str, Any] = Field(min_length=1)
    seeds: IntList = Field(min_length=1)
    budget: float = Field(gt=0)
    unit: Literal["passes", "updates", "seconds"] = "passes"
    common: dict[str, Any] = {}
    learning_rates: tuple[float, ...] = ()
    eval_steps: IntList = (10, 16, 20)
    eval_prompts: int = Field(256, ge=2)
    images_per_prompt: int = Field(2, ge=2)
    curve_points: int = Field(4, ge=0)


@dataclass(frozen=True)
class Entry:
    """One run of a comparison: its place in the table, its settings, and what it costs by plan (units: see tree.Cost.units)."""

    label: str
    reward_set: str
    settings: Settings
    units: float
    passes: float
    evaluation_passes: int

    @property
    def name(self) -> str:
        return f"{self.label}+{self.reward_set}+{self.settings.seed}".replace(" ", "_").replace("/", "_")


def load_comparison(name: str, changes: Mapping[str, Any]) -> Comparison:
    """The bundled comparison `name`, or that of a YAML file, with `changes`. Raises SettingsError naming what is wrong."""
    known = sorted(module.name for module in pkgutil.iter_modules(comparisons.__path__))
    if name in known:
        values = importlib.import_module(f"{comparisons.__name__}.{name}").comparison()
    elif Path(name).is_file():
        try:
            values = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SettingsError(f"{name}: not readable as YAML: {error}") from None
        if not isinstance(values, dict):
            raise SettingsError(
                f"{name}: not a comparison; write a line `key: value` for each of {', '.join(Comparison.model_fields)}"
            )
    else:
        near = difflib.get_close_matches(name, known, n=1)
        raise SettingsError(
            f"COMPARISON={name}: there is none; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
        )
    try:
        return Comparison(**{**values, **changes, "common": {**values.get("common", {}), **changes.get("common", {})}})
    except ValidationError as error:
        raise SettingsError(
            "; ".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors())
        ) from None


def method_names(text: str) -> dict[str, dict[str, Any]]:
    """Methods as they are written on the command line, g2rpo,mixgrpo. Raises SettingsError for an unknown or a repeated one."""
    chosen: dict[str, dict[str, Any]] = {}
    for word in text.split(","):
        name = canonical(word.strip())
        if name not in PAPER:
            near = difflib.get_close_matches(name, PAPER, n=1, cutoff=0.5)
            raise SettingsError(
                f"--methods {word}: no such method; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PAPER)}")
            )
        if name in chosen:
            raise SettingsError(f"--methods {text}: {name} stands there twice; two runs cannot have one name")
        chosen[name] = {}
    return chosen


def entries(c: Comparison) -> list[Entry]:
    """Every run of the comparison, priced by its plan. Raises SettingsError for settings that cannot be, two runs of one name,
    or a budget that does not pay for one rollout."""
    variants = {label: {"method": label, **own} for label, own in c.methods.items()}
    if c.learning_rates:
        variants = {
            f"{label} lr={rate:g}": {**own, "learning_rate": rate} for label, own in variants.items() for rate in c.learning_rates
        }
    found = []
    # Seeds outermost: a comparison that is stopped early has all methods on the first seeds.
    for seed, (reward_set, rewards), (label, own) in itertools.product(c.seeds, c.rewards.items(), variants.items()):
        try:
            s = settings(
                {
                    "eval_rewards": ("oracle", "towers", "preference"),
                    "threads": 1,
                    **c.common,
                    **own,
                    "rewards": rewards,
                    "seed": seed,
                }
            )
        except SettingsError as error:
            raise SettingsError(f"{label}: {error}") from error
        found.append(_priced(c, label, reward_set, s))
    names = [entry.name for entry in found]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"two runs are named {name}; give methods, reward sets and seeds that differ")
    return found


def _priced(c: Comparison, label: str, reward_set: str, s: Settings) -> Entry:
    """`s` with the number of steps that the budget pays for, and what they cost."""
    method = build(s)
    units = passes = 0.0
    if s.noise == "calibrated_sde" and s.psi is None and s.calibration_rounds:
        one = s.model_copy(update={"group_size": 1})
        calibration = cost(plan_tree(densegrpo(one), one), len(s.rewards))
        units += calibration.units * s.calibration_samples * s.calibration_rounds
        passes += calibration.forward_passes * s.calibration_samples * s.calibration_rounds
    steps, updates, each = 0, 0, 0.0
    prices: dict[bytes, Any] = {}
    while steps < s.max_steps if c.unit == "seconds" else True:
        tree = plan_tree(method, s, steps + 1)
        key = tree.parent.tobytes() + tree.trained.tobytes()
        if key not in prices:
            prices[key] = price(method, s, steps + 1)
        each = prices[key].units * s.prompts_per_step
        spent = {"passes": units + each, "updates": updates + _updates(s), "seconds": 0}[c.unit]
        if spent > c.budget:
            break
        steps, units, updates = steps + 1, units + each, updates + _updates(s)
        p = prices[key]
        passes += (p.forward_passes + 3 * p.train_forward_passes + p.frozen_forward_passes) * s.prompts_per_step
    if steps == 0:
        needed = units + each if c.unit == "passes" else _updates(s)
        raise SettingsError(f"budget={c.budget:g}: too small for one rollout of {label}; it needs {needed:,.0f} {c.unit}")
    values = {"max_steps": _MANY, "max_seconds": c.budget} if c.unit == "seconds" else {"max_steps": steps}
    every = max(1, steps // c.curve_points) if c.curve_points else 0
    s = settings({**s.model_dump(), **values, "name": "run", "eval_every": every, "checkpoint_every": max(1, steps // 4)})
    evaluation = s.eval_prompts * s.eval_num_steps * (c.curve_points + 1) + c.eval_prompts * c.images_per_prompt * sum(c.eval_steps)
    return Entry(label, reward_set, s, units, passes, evaluation)


def _updates(s: Settings) -> int:
    """Optimizer steps of one rollout."""
    return len(s.sde_steps or range(s.num_steps // 2)) if s.updates_per_rollout == "per_step" else int(s.updates_per_rollout)


# ---------------------------------------------------------------------- running


@dataclass
class Progress:
    """Where a comparison stands: runs done and in all, the names of the last ones, and those that stopped with their reason."""

    total: int
    done: int = 0
    stopped: dict[str, str] = field(default_factory=dict)


def run_comparison(c: Comparison, folder: Path, jobs: int = 1, progress: Callable[[Progress, str], None] | None = None) -> Progress:
    """Runs what is not finished yet, `jobs` at a time, and leaves a result.json in each run's folder.

    Raises SettingsError if `folder` holds another comparison, Interrupted on SIGINT or SIGTERM; the same call goes on from there.
    """
    todo = entries(c)
    _claim(c, folder)
    state = Progress(len(todo) + 1)
    pending = []
    for job in [("base", c, folder), *((entry, c, folder) for entry in todo)]:
        if _result_file(folder, job[0]).exists():
            state.done += 1
        else:
            pending.append(job)
    if jobs == 1:
        for job in pending:
            _note(state, *_run_one(job), progress)
        return state
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            for finished in concurrent.futures.as_completed([pool.submit(_run_one, job) for job in pending]):
                _note(state, *finished.result(), progress)
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)
            raise Interrupted(f"{state.done} of {state.total} runs are done; the same command goes on from here") from None
        except Interrupted:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return state


def _note(state: Progress, name: str, stopped: str | None, progress: Callable[[Progress, str], None] | None) -> None:
    state.done += 1
    if stopped:
        state.stopped[name] = stopped
    if progress is not None:
        progress(state, name)


def _claim(c: Comparison, folder: Path) -> None:
    """Makes `folder` that of this comparison. Raises SettingsError if it is another's already."""
    file, saved = folder / "comparison.yaml", c.model_dump(mode="json")
    if file.exists():
        before = yaml.safe_load(file.read_text(encoding="utf-8"))["comparison"]
        changed = [key for key in saved if before.get(key) != saved[key]]
        if changed:
            raise SettingsError(
                f"{folder} holds a comparison with other {', '.join(changed)}; give another --out, or those it was begun with"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, yaml.safe_dump({"comparison": saved, **describe_environment()}, sort_keys=False))


def _result_file(folder: Path, entry: Entry | str) -> Path:
    return folder / "runs" / (entry if isinstance(entry, str) else entry.name) / "result.json"


def _run_one(job: tuple[Entry | str, Comparison, Path]) -> tuple[str, str | None]:
    """Trains one run to its end, or goes on with it, and measures it. Returns its name and, if it stopped early, the reason."""
    keep_memory()
    quieten()
    entry, c, folder = job
    out = _result_file(folder, entry).parent
    first = entry if isinstance(entry, Entry) else entries(c)[0]
    run = Run(first.settings, out)
    stopped = None
    if isinstance(entry, Entry):
        run.resume()
        try:
            run.train()
        except Interrupted:
            raise
        except RunStopped as error:
            stopped = str(error)
    else:
        out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    result: dict[str, Any] = {"label": BASE, "reward_set": None, "seed": None, "stopped": stopped, "steps": {}}
    result["prompts"] = run.eval_prompts[:SHOWN]
    if isinstance(entry, Entry):
        lines = [line for line in run.record.read() if line["step"] > 0]
        result |= {
            "label": entry.label,
            "reward_set": entry.reward_set,
            "seed": entry.settings.seed,
            "learning_rate": entry.settings.learning_rate,
            "units": entry.units,
            "rollouts": len(lines),
            "updates": sum(line["updates"] for line in lines),
            "seconds": sum(line["seconds"] for line in lines),
        }
    for num_steps in c.eval_steps:
        result["steps"][str(num_steps)] = measure(
            run, num_steps, c.eval_prompts, c.images_per_prompt, out / f"pictures-{num_steps}.png"
        )
    result["seconds/measure"] = time.perf_counter() - begin
    write_atomically(out / "result.json", json.dumps(result))
    return out.name, stopped


def measure(run: Run, num_steps: int, prompts: int, per_prompt: int, pictures: Path) -> dict[str, float]:
    """Every metric of the run's model at `num_steps`, `per_prompt` images for each of `prompts`, and the first as a picture."""
    prompts = min(prompts, len(run.eval_prompts))
    chosen = run.eval_prompts[:prompts] * per_prompt
    found = run.evaluate(num_steps, prompts=chosen)
    contact_sheet(to_pixels(found.images[:SHOWN]), SHOWN).save(pictures)
    values = found.means() | {f"failures/{kind}": share for kind, share in found.failures.items()}
    if run.settings.model == "shapes":
        of_image = features(found.images)
        truth = true_features(found.prompts)
        together = of_image.reshape(per_prompt, prompts, -1).swapaxes(0, 1).reshape(len(of_image), -1)
        values |= {"frechet": frechet(of_image, truth), "diversity": diversity(together, per_prompt)}
    return values


# ---------------------------------------------------------------------- estimating


def machine_speed(s: Settings) -> dict[str, float]:
    """Forward passes a second of the bundled model, and images decoded and scored a second, on one thread of this machine."""
    before = torch.get_num_threads()
    run = Run(s.model_copy(update={"threads": 1}))
    try:
        noise = torch.randn(s.rows_per_pass, *run.backbone.latent_shape, device=run.device)
        cond = run.policy.encode([run.prompts[0]] * s.rows_per_pass)
        sigma = torch.full((s.rows_per_pass,), 0.5, device=run.device)

        def rate(work: Callable[[], Any]) -> float:
            work()
            begin, count = time.perf_counter(), 0
            while time.perf_counter() - begin < 1.0:
                work()
                count += 1
            return count * s.rows_per_pass / (time.perf_counter() - begin)

        images = run.backbone.decode(noise)
        prompts = [run.prompts[0]] * len(images)
        return {
            "passes": rate(lambda: run.policy.sample_velocity(noise, sigma, cond, s.guidance_scale)),
            "decodes": rate(lambda: run.backbone.decode(noise)),
            "scores": rate(lambda: [reward(images.cpu(), prompts) for reward in run.rewards.values()]),
        }
    finally:
        torch.set_num_threads(before)


def estimated_seconds(entry: Entry, speed: Mapping[str, float]) -> float:
    """How long one run takes on one thread by its plan: passes, decodes and scores, of training and of measuring."""
    s = entry.settings
    if s.max_seconds is not None:
        return s.max_seconds + entry.evaluation_passes / speed["passes"]
    images = (entry.units - entry.passes) / (1 + len(s.rewards))
    return (entry.passes + entry.evaluation_passes) / speed["passes"] + images / speed["decodes"] + images / speed["scores"]


# ---------------------------------------------------------------------- results


def results(folder: Path) -> list[dict[str, Any]]:
    """The results of all finished runs in `folder`, the base model's among them."""
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*/result.json"))]


def cpu_jobs() -> int:
    """One process a core."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def by_seed(found: Iterable[Mapping[str, Any]], label: str, reward_set: str, num_steps: int, metric: str) -> dict[int, float]:
    """A metric of one method and reward set, by seed."""
    return {
        r["seed"]: float(r["steps"][str(num_steps)].get(metric, np.nan))
        for r in found
        if r["label"] == label and r["reward_set"] == reward_set
    }
