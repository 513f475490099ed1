"""Several methods on one model at equal budget: planned, priced, run resumably, and measured alike.

Letters: R runs (method x reward set x seed), S seeds, P prompts.
"""

import concurrent.futures
import contextlib
import difflib
import fcntl
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flowgrain.studies import comparisons
from flowgrain.methods.algorithms import build, changes_with_step, plan_tree, price
from flowgrain.methods.calibration import calibration_price
from flowgrain.training.checkpoint import write_atomically
from flowgrain.studies.comparisons import full
from flowgrain.distributed.process import keep_memory, quieten
from flowgrain.training.recorder import contact_sheet, describe_environment, to_pixels
from flowgrain.training.rollout_batch import Metrics
from flowgrain.config.schema import PAPER, IntList, Settings, SettingsError, canonical, settings
from flowgrain.shapes.features import diversity, features, frechet, true_features
from flowgrain.training.trainer import Diverged, Interrupted, Run, RunStopped
from flowgrain.core.tree import Cost, Tree, split_updates

BASE = "base"
RESERVED = {"name", "method", "seed", "rewards", "max_steps", "max_seconds", "eval_every", "checkpoint_every"}
SHOWN = 8  # pictures kept of a run
_MANY = 10**6


class Comparison(BaseModel):
    """What is compared: methods x reward sets x seeds. A run has `common` settings, its method's own, and `override`.

    baselines says for a method which other its differences are taken to; for the rest it is the first.

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
    override: dict[str, Any] = {}
    baselines: dict[str, str] = {}
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
        return Comparison(**{**values, **changes})
    except ValidationError as error:
        raise SettingsError(
            "; ".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors())
        ) from None


def method_names(text: str, comparison: str) -> dict[str, dict[str, Any]]:
    """Methods as they are written on the command line, g2rpo,mixgrpo, with what `comparison` sets for them.

    Raises SettingsError for an unknown or a repeated one.
    """
    own = load_comparison(comparison, {}).methods
    own = {**full.METHODS, **own} if comparison in ("quick", "sweep") else own
    chosen: dict[str, dict[str, Any]] = {}
    for word in text.split(","):
        name = word.strip() if word.strip() in own else canonical(word.strip())
        if name not in PAPER and name not in own:
            near = difflib.get_close_matches(name, [*PAPER, *own], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PAPER)}"
            raise SettingsError(f"--methods {word}: no such method; {hint}")
        if name in chosen:
            raise SettingsError(f"--methods {text}: {name} stands there twice; two runs cannot have one name")
        chosen[name] = own.get(name, {})
    return chosen


def entries(c: Comparison) -> list[Entry]:
    """Every run of the comparison, priced by its plan. Raises SettingsError for settings that cannot be, two runs of one name,
    or a budget that does not pay for one rollout."""
    for key in c.override.keys() & RESERVED:
        raise SettingsError(
            f"{key}={c.override[key]}: a comparison sets this for each run; use --methods, --rewards, --seeds or --budget"
        )
    variants = {label: {"method": label, **own} for label, own in c.methods.items()}
    if c.learning_rates:
        variants = {
            f"{label} lr={rate:g}": {**own, "learning_rate": rate} for label, own in variants.items() for rate in c.learning_rates
        }
    found = []
    # Seeds outermost: a comparison that is stopped early has all methods on the first seeds.
    for seed, (reward_set, rewards), (label, own) in itertools.product(c.seeds, c.rewards.items(), variants.items()):
        try:
            usual = {"eval_rewards": ("oracle", "towers", "preference"), "threads": 1}
            s = settings({**usual, **c.common, **own, **c.override, "rewards": rewards, "seed": seed})
        except SettingsError as error:
            raise SettingsError(f"{label}: {error}") from error
        found.append(_priced(c, label, reward_set, s))
    name, times = Counter(entry.name for entry in found).most_common(1)[0]
    if times > 1:
        raise SettingsError(f"two runs are named {name}; give methods, reward sets and seeds that differ")
    return found


def _priced(c: Comparison, label: str, reward_set: str, s: Settings) -> Entry:
    """`s` with the number of steps that the budget pays for, and what they cost."""
    method, before = build(s), calibration_price(s)
    units, passes = before.units, float(before.forward_passes)
    steps = updates = 0
    prices: dict[Tree, tuple[Cost, int]] = {}
    while c.unit != "seconds" or steps < s.max_steps:
        if not steps or changes_with_step(s):
            tree = plan_tree(method, s, steps + 1)
        if tree not in prices:
            shares = (
                int(s.updates_per_rollout)
                if method.forward_process
                else len(split_updates(tree.repeat(s.prompts_per_step), s.updates_per_rollout))
            )
            prices[tree] = price(method, s, steps + 1), shares
        found, of_step = prices[tree]
        each = found.units * s.prompts_per_step
        spent = {"passes": units + each, "updates": updates + of_step, "seconds": 0}[c.unit]
        if spent > c.budget:
            if not steps:
                needed = spent if c.unit == "passes" else of_step
                raise SettingsError(f"budget={c.budget:g}: too small for one rollout of {label}; it needs {needed:,.0f} {c.unit}")
            break
        steps, units, updates = steps + 1, units + each, updates + of_step
        passes += found.passes * s.prompts_per_step
    values = {"max_steps": _MANY, "max_seconds": c.budget} if c.unit == "seconds" else {"max_steps": steps}
    every = max(1, steps // c.curve_points) if c.curve_points else 0
    s = settings({**s.model_dump(), **values, "name": "run", "eval_every": every, "checkpoint_every": max(1, steps // 4)})
    evaluations = 1 + -(-steps // every) if every else 0
    evaluation = s.eval_prompts * s.eval_num_steps * evaluations + c.eval_prompts * c.images_per_prompt * sum(c.eval_steps)
    return Entry(label, reward_set, s, units, passes, evaluation)


# ---------------------------------------------------------------------- running

Job = tuple[Entry | str, Comparison, Path]


@dataclass
class Progress:
    """Where a comparison stands: runs done and in all, the names of the last ones, and those that stopped with their reason."""

    total: int
    done: int = 0
    stopped: dict[str, str] = field(default_factory=dict)


def run_comparison(c: Comparison, folder: Path, jobs: int = 1, progress: Callable[[Progress, str], None] | None = None) -> Progress:
    """Runs what is not finished yet, `jobs` at a time, and leaves a result.json in each run's folder.

    Raises SettingsError if `folder` holds another comparison or another process works on it, Interrupted on SIGINT or SIGTERM,
    RunStopped at the end if runs could not go on (a broken reward, a full disk). The same call goes on from there.
    """
    todo = entries(c)
    _claim(c, folder)
    state, failed = Progress(len(todo) + 1), dict[str, str]()
    pending = []
    for job in [(BASE, c, folder), *((entry, c, folder) for entry in todo)]:
        if _result_file(folder, job[0]).exists():
            state.done += 1
        else:
            pending.append(job)

    def note(name: str, stopped: str | None, failure: str | None) -> None:
        if failure is not None:
            failed[name] = failure
            return
        state.done += 1
        if stopped:
            state.stopped[name] = stopped
        if progress is not None:
            progress(state, name)

    with _alone(folder):
        try:
            if jobs == 1:
                for job in pending:
                    note(*_run_one(job))
            else:
                _run_in_processes(pending, jobs, note)
        except (Interrupted, KeyboardInterrupt):
            raise Interrupted(f"{state.done} of {state.total} runs are done; the same command goes on from here") from None
    if failed:
        told = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise RunStopped(f"{len(failed)} of {state.total} runs could not go on; the same command tries them again. {told}")
    return state


def _run_in_processes(pending: list[Job], jobs: int, note: Callable[[str, str | None, str | None], None]) -> None:
    """Works through `pending`, `jobs` at a time. Raises KeyboardInterrupt once every process has saved and stopped."""
    context = multiprocessing.get_context("forkserver")  # torch's threads do not survive a fork of this process
    # What takes seconds to import is imported once.
    context.set_forkserver_preload([__name__, "flowgrain.models.shapes", "diffusers.training_utils"])
    stop = context.Event()

    def ask(*_: object) -> None:
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker, initargs=(stop,)) as pool:
            queue, running = list(pending), set[concurrent.futures.Future[tuple[str, str | None, str | None]]]()
            while (queue and not stop.is_set()) or running:
                while queue and len(running) < jobs and not stop.is_set():
                    running.add(pool.submit(_run_one, queue.pop(0)))
                finished, running = concurrent.futures.wait(running, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in finished:
                    try:
                        note(*future.result())
                    except Interrupted:
                        stop.set()
                    except concurrent.futures.BrokenExecutor as error:
                        raise RunStopped(
                            f"a process of the comparison died ({error}); the same command goes on from here"
                        ) from error
                    except BaseException:
                        stop.set()
                        raise
        if stop.is_set():
            raise KeyboardInterrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_stop: Any = None
_parent = 0


def _begin_worker(stop: Any) -> None:
    global _stop, _parent
    _stop, _parent = stop, os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop


def _watch() -> Callable[[Metrics], None]:
    """To be called after every training step: stops the run, once, if the comparison is stopping or is no longer there."""
    asked = False

    def stop_if_asked(_metrics: Metrics) -> None:
        nonlocal asked
        if not asked and _stop is not None and (_stop.is_set() or os.getppid() != _parent):
            asked = True  # a second signal would end the process before it has saved
            os.kill(os.getpid(), signal.SIGTERM)

    return stop_if_asked


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process works on `folder`. Raises SettingsError if one does."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SettingsError(f"{folder}: another process works on this comparison; wait for it, or give another --out") from None
        yield


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


def _run_one(job: Job) -> tuple[str, str | None, str | None]:
    """Trains one run to its end, or goes on with it, and measures it.

    Returns its name, the reason if its training diverged (which is a result), and the reason if it could not be finished.
    """
    keep_memory()
    quieten()
    entry, c, folder = job
    out = _result_file(folder, entry).parent
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    result: dict[str, Any] = {"label": BASE, "reward_set": None, "seed": None, "stopped": None, "steps": {}}
    if isinstance(entry, Entry):
        run = Run(entry.settings, out)
        run.resume()
        diverged = out / "diverged.txt"
        try:
            if not diverged.exists():
                run.train(_watch(), report=False)
        except Interrupted:
            raise
        except Diverged as error:
            write_atomically(diverged, str(error))
        except RunStopped as error:
            return out.name, None, str(error)
        begin = time.perf_counter()
        lines = [line for line in run.record.read() if line["step"] > 0]
        before = calibration_price(entry.settings)
        result |= {
            "label": entry.label,
            "reward_set": entry.reward_set,
            "seed": entry.settings.seed,
            "stopped": diverged.read_text() if diverged.exists() else None,
            "learning_rate": entry.settings.learning_rate,
            "units": before.units + sum(units_of_step(line, len(entry.settings.rewards)) for line in lines),
            "rollouts": len(lines),
            "updates": sum(line["updates"] for line in lines),
            "seconds": sum(line["seconds"] for line in lines),
        }
    else:
        run = Run(entries(c)[0].settings, out)
    result["prompts"] = run.eval_prompts[:SHOWN]
    for num_steps in c.eval_steps:
        found = measure(run, num_steps, c.eval_prompts, c.images_per_prompt, out / f"pictures-{num_steps}.png")
        result["steps"][str(num_steps)] = found
    result["seconds/measure"] = time.perf_counter() - begin
    write_atomically(out / "result.json", json.dumps(result))
    return out.name, result["stopped"], None


def units_of_step(line: Mapping[str, Any], rewards: int) -> float:
    """What a line of metrics.jsonl cost, in the units of tree.Cost."""
    made = {name: line[name] for name in ("forward_passes", "train_forward_passes", "decodes", "frozen_forward_passes")}
    return float(Cost(**made, reward_calls=line["decodes"] * rewards, trained_edges=0).units)


def measure(run: Run, num_steps: int, prompts: int, per_prompt: int, pictures: Path) -> dict[str, float]:
    """Every metric of the run's model at `num_steps`, `per_prompt` images for each of `prompts`, and the first as a picture."""
    prompts = min(prompts, len(run.eval_prompts))
    chosen = run.eval_prompts[:prompts] * per_prompt
    found = run.evaluate(num_steps, prompts=chosen)
    contact_sheet(to_pixels(found.images[:SHOWN]), SHOWN).save(pictures)
    values = found.means() | found.part_means()
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


def by_seed(found: Iterable[Mapping[str, Any]], label: str, reward_set: str, num_steps: int, metric: str) -> dict[int, float]:
    """A metric of one method and reward set, by seed."""
    return {
        r["seed"]: float(r["steps"][str(num_steps)].get(metric, np.nan))
        for r in found
        if r["label"] == label and r["reward_set"] == reward_set
    }
