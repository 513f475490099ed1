"""The page of a run: report.html in its directory."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from flowgrain.records.group_files import group_files
from flowgrain.report.image_pairs import image_pairs, part_changes
from flowgrain.report.render import write_page
from flowgrain.report.run_curves import run_figures
from flowgrain.report.run_data import RunData, read_run_data, undamaged
from flowgrain.report.run_watch import alarm_messages, monitor_rows
from flowgrain.report.tree_picture import read_tree_picture
from flowgrain.statistics import confidence_interval
from flowgrain.units import duration

MAX_TREES = 8
"""Trees that a page shows."""


@dataclass(frozen=True)
class Fact:
    """A number at the top of the page, and its meaning."""

    value: str
    meaning: str


def write_report(folder: Path) -> Path:
    """Write report.html into the directory of a run, finished or not. Returns its path.

    Raises:
        SettingsError: the directory contains no run.
    """
    run = read_run_data(folder)
    method, versions = run.config.method, run.record.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    trees = [undamaged(path, read_tree_picture) for path in _shown_groups(run)]
    software = [f"{name} {versions[name]}" for name in ("flowgrain", "torch") if name in versions]
    revision = run.record.get("git_revision")
    values = {
        "config": run.config,
        "method": method.title or method.name,
        "software": [*software, *([f"commit {str(revision)[:10]}"] if revision else [])],
        "steps_done": run.steps[-1]["step"] if run.steps else 0,
        "facts": [*evaluation_facts(run), *best_fact(run), *training_facts(run)],
        "alarms": alarm_messages(run),
        "monitors": monitor_rows(run),
        "figures_drawn": run_figures(run),
        "pairs": image_pairs(run),
        "parts": part_changes(run),
        "tree_summary": method.summary,
        "trees": [tree for tree in trees if tree is not None],
        "settings": yaml.safe_dump(run.config.to_dict(), sort_keys=False, allow_unicode=True),
    }
    return write_page(folder / "report.html", "run.html", values)


def _shown_groups(run: RunData) -> list[Path]:
    """The groups that the page shows: the first, the last and evaluated steps, at most `MAX_TREES`.

    A page with all recorded steps would have thousands of images.
    """
    files = group_files(run.folder / "groups")
    evaluated = {evaluation.step for evaluation in run.evaluations}
    steps = sorted(files)
    shown = [s for s in steps if s in evaluated or s in (steps[0], steps[-1])]
    places = {round(place) for place in np.linspace(0, len(shown) - 1, MAX_TREES)} if shown else ()
    return [files[shown[place]] for place in sorted(places)]


def evaluation_facts(run: RunData) -> list[Fact]:
    """Held-out scores before and after training, with the interval of the paired difference."""
    if len(run.evaluations) < 2:
        return []
    first, last = run.evaluations[0], run.evaluations[-1]
    facts = []
    for name in run.trained_rewards:
        if name not in run.evaluated_rewards:
            continue
        count = min(len(first.scores[name]), len(last.scores[name]))
        before, after = (np.array(e.scores[name][:count], dtype=float) for e in (first, last))
        difference = confidence_interval(after - before)
        facts.append(
            Fact(
                f"{np.nanmean(before):.3f} → {np.nanmean(after):.3f}",
                f"{name} on {count} held-out images, {last.num_steps} ODE steps. "
                f"Paired difference {difference.mean:+.3f}, 95% confidence interval "
                f"[{difference.low:+.3f}, {difference.high:+.3f}]",
            )
        )
    return facts


def best_fact(run: RunData) -> list[Fact]:
    """The best checkpoint and the rule that chose it."""
    if run.best is None:
        return []
    exported = (
        " Its weights are in export/best" if (run.folder / "export" / "best").exists() else ""
    )
    score = f", {run.best['score']:.3f}" if isinstance(run.best.get("score"), float) else ""
    meaning = f"best checkpoint: {run.best.get('rule')}{score}.{exported}"
    return [Fact(f"step {run.best['step']}", meaning)]


def training_facts(run: RunData) -> list[Fact]:
    """Forward passes, time, and failures."""
    if not run.steps:
        return []
    total = {
        name: sum(line.get(name, 0) for line in run.steps)
        for name in ("forward_passes", "train_forward_passes", "seconds", "updates/skipped")
    }
    passes, seconds = total["forward_passes"], total["seconds"]
    facts = [
        Fact(
            f"{passes:,}",
            f"sampling forward passes, and {total['train_forward_passes']:,} with gradient",
        ),
        Fact(
            duration(seconds),
            f"training time of {len(run.steps)} steps, "
            f"{passes / max(seconds, 1e-9):,.0f} sampling forward passes per second",
        ),
    ]
    failed = sum(
        value for line in run.steps for key, value in line.items() if key.startswith("failed/")
    )
    if failed:
        facts.append(
            Fact(f"{failed:,}", "images without a score. They were left out of the update")
        )
    if total["updates/skipped"]:
        facts.append(
            Fact(
                f"{total['updates/skipped']:,}",
                "skipped updates, because the loss or the gradient was not finite",
            )
        )
    return facts
