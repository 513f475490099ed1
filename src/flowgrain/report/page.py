"""Gathers what a run left in its folder into one page."""

import base64
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from matplotlib.axes import Axes
from PIL import Image

from flowgrain.training.checkpoint import write_atomically
from flowgrain.training.evaluate import interval
from flowgrain.training.recorder import Record, read_settings
from flowgrain.report.curves import PALETTE, picture
from flowgrain.config.schema import Settings

PAIRS_SHOWN = 16
STORIES = {
    "g2rpo": "From one anchor trajectory every stochastic step fans out into branches that differ in that step's noise alone; "
    "each branch is finished at every granularity and scored.",
    "tempflow_grpo": "From one trunk every step fans out into branches that differ in that step's noise alone.",
    "densegrpo": "Every state of a trajectory is finished without noise; a step earns what this look gained or lost. The image is "
    "the look after the step.",
    "branchgrpo": "The tree splits at several steps; an edge is worth the mean of the images below it.",
    "diffusionnft": "The images of a group are compared with each other; no step of the sampler is trained.",
    "flow_grpo": "The trajectories of a group are compared by their final images; every trained step of one has the same advantage "
    "and is shown once.",
}

Lines = list[dict[str, Any]]


def write_report(folder: Path) -> Path:
    """Writes `folder`/report.html from the run's own files. Raises SettingsError if the folder holds no run."""
    s = read_settings(folder)
    lines = Record(folder, s).read() if (folder / "metrics.jsonl").exists() else []
    evaluations = [json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("step-*.json"))]
    saved = yaml.safe_load((folder / "run.yaml").read_text())
    trees = [read_tree(path) for path in sorted((folder / "images").glob("tree-*.json"))]
    page = template("report.html").render(
        s=s,
        saved=saved,
        summary=summary(s, lines, evaluations),
        curves=curves(s, lines, evaluations) + calibration_curves(folder),
        pairs=pairs(folder, evaluations),
        parts=parts(evaluations),
        trees=trees,
        tree_story=STORIES.get(s.method, STORIES["flow_grpo"]),
        settings=s.model_dump(mode="json"),
        steps_done=lines[-1]["step"] if lines else 0,
    )
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def template(name: str) -> jinja2.Template:
    """A page's template."""
    loader = jinja2.PackageLoader("flowgrain.report")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(name)


@dataclass(frozen=True)
class Fact:
    """A number at the top of the page, and what it means."""

    value: str
    meaning: str


def summary(s: Settings, lines: Lines, evaluations: list[dict[str, Any]]) -> list[Fact]:
    """What was gained, with its paired interval, and what it cost."""
    facts = []
    trained = [line for line in lines if line["step"] > 0]
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        for name in _common(evaluations, s.rewards):
            before, after = (
                np.array(e["scores"][name])[: min(len(e["scores"][name]) for e in (first, last))] for e in (first, last)
            )
            mean, low, high = interval(after - before)
            facts.append(
                Fact(
                    f"{np.nanmean(before):.3f} → {np.nanmean(after):.3f}",
                    f"held-out {name} at {last['num_steps']} ODE steps, {len(after)} images; paired difference {mean:+.3f}, "
                    f"95% interval {low:+.3f} to {high:+.3f}",
                )
            )
    if trained:
        passes = sum(line["forward_passes"] for line in trained)
        seconds = sum(line["seconds"] for line in trained)
        gradient = sum(line["train_forward_passes"] for line in trained)
        facts.append(Fact(f"{passes:,}", f"sampling forward passes, and {gradient:,} with gradient"))
        facts.append(
            Fact(f"{seconds / 60:.1f} min", f"of training in {len(trained)} steps, {passes / seconds:,.0f} passes a second")
        )
        failed = sum(value for line in trained for key, value in line.items() if key.startswith("failed/"))
        skipped = sum(line["updates/skipped"] for line in trained)
        if failed or skipped:
            facts.append(Fact(f"{failed} / {skipped}", "rewards that failed and were masked / updates skipped as non-finite"))
    return facts


def curves(s: Settings, lines: Lines, evaluations: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Training reward, held-out scores with intervals, and the health of the update."""
    trained = [line for line in lines if line["step"] > 0]
    drawn: list[tuple[str, str]] = []

    def rewards(axes: Axes) -> None:
        for name in s.rewards:
            lines_with_it = [line for line in trained if f"reward/{name}" in line]
            values = np.array([line[f"reward/{name}"] for line in lines_with_it])
            steps = [line["step"] for line in lines_with_it]
            (faint,) = axes.plot(steps, values, alpha=0.3, lw=1)
            axes.plot(steps, _smooth(values), color=faint.get_color(), lw=2, label=name)
        axes.set(xlabel="step", ylabel="mean reward of the step's images")
        axes.legend()

    def held_out(axes: Axes) -> None:
        for name in _common(evaluations, s.rewards):
            points = [interval(np.array(e["scores"][name])) for e in evaluations]
            steps = [e["step"] for e in evaluations]
            (line,) = axes.plot(steps, [p[0] for p in points], "o-", lw=2, ms=4, label=name)
            axes.fill_between(steps, [p[1] for p in points], [p[2] for p in points], color=line.get_color(), alpha=0.18)
        axes.set(xlabel="step", ylabel="held-out score, 95% interval")
        axes.legend()

    def others(axes: Axes) -> None:
        for name in (n for n in _common(evaluations, evaluations[0]["scores"]) if n not in s.rewards):
            points = np.array([interval(np.array(e["scores"][name])) for e in evaluations])
            spread = np.nanstd(np.array(evaluations[0]["scores"][name])) or 1
            axes.plot([e["step"] for e in evaluations], (points[:, 0] - points[0, 0]) / spread, "o-", lw=2, ms=4, label=name)
        axes.set(xlabel="step", ylabel="change (std at the start)")
        axes.legend()

    def health(axes: Axes) -> None:
        axes.plot([line["step"] for line in trained], [line["grad_norm"] for line in trained], lw=1.5)
        axes.set(xlabel="step", ylabel="gradient norm", yscale="log")

    def held_back(axes: Axes) -> None:
        for key, name in (("clip_fraction", "all updates"), ("clip_fraction/later_updates", "off-policy updates")):
            having = [line for line in trained if key in line]
            if having:
                axes.plot([line["step"] for line in having], [line[key] for line in having], lw=1.5, label=name)
        axes.set(xlabel="step", ylabel="share of edges held by the clip", ylim=(0, 1))
        axes.legend()

    def distance(axes: Axes) -> None:
        axes.plot([line["step"] for line in trained], [line["kl"] for line in trained], lw=1.5)
        axes.set(xlabel="step", ylabel="KL to the reference, per dimension")

    if trained:
        drawn.append(("Reward while training", picture(rewards)))
    if evaluations:
        drawn.append(("Held-out prompts", picture(held_out)))
        if set(evaluations[0]["scores"]) - set(s.rewards) and len(evaluations) > 1:
            drawn.append(("Rewards that were not trained", picture(others)))
    if trained and any(line["grad_norm"] > 0 for line in trained):
        drawn.append(("Gradient", picture(health)))
    if any(line.get("clip_fraction", 0) > 0 for line in trained):
        drawn.append(("Clip", picture(held_back)))
    if trained and all("kl" in line for line in trained):
        drawn.append(("Distance", picture(distance)))
    return drawn


def calibration_curves(folder: Path) -> list[tuple[str, str]]:
    """Where the run calibrated its noise: psi before and after, and how the shares of gains and losses moved."""
    if not (folder / "calibration.json").exists():
        return []
    found = json.loads((folder / "calibration.json").read_text())
    first, last = found["rounds"][0], found["rounds"][-1]

    def psi(axes: Axes) -> None:
        axes.plot(first["psi"], "o--", lw=1.5, ms=4, label="before (Flow-SDE)")
        axes.plot(found["psi"], "o-", lw=2, ms=4, label="calibrated")
        axes.set(xlabel="step of the grid", ylabel="noise strength psi", yscale="log")
        axes.legend()

    def balance(axes: Axes) -> None:
        for when, style in ((first, "--"), (last, "-")):
            name = "first round" if when is first else "last round"
            axes.plot(when["gained"], style, color=PALETTE[2], lw=2, label=f"gained, {name}")
            axes.plot(when["lost"], style, color=PALETTE[4], lw=2, label=f"lost, {name}")
        axes.set(xlabel="step of the grid", ylabel="share of trajectories", ylim=(0, 1))
        axes.legend(fontsize=8)

    rounds = len(found["rounds"])
    return [(f"Calibrated noise, {rounds} rounds", picture(psi)), ("Reward gained or lost at each step", picture(balance))]


def _smooth(values: np.ndarray, window: int = 9) -> np.ndarray:
    """Centred mean over up to `window` neighbours."""
    half = min(window, len(values)) // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


@dataclass(frozen=True)
class Pair:
    """One held-out prompt before and after training, from the same noise: two PNGs as data URIs and their scores."""

    prompt: str
    before: str
    after: str
    scores: list[tuple[str, float, float]]


def pairs(folder: Path, evaluations: list[dict[str, Any]]) -> list[Pair]:
    """Before and after of the first held-out prompts."""
    if len(evaluations) < 2:
        return []
    first, last = evaluations[0], evaluations[-1]
    sheets = [tiles(folder / "images" / f"evaluation-{e['step']:06d}.png", 8) for e in (first, last)]
    shown = min(PAIRS_SHOWN, *(len(e["prompts"]) for e in (first, last)), *map(len, sheets))
    return [
        Pair(
            first["prompts"][i],
            data_uri(sheets[0][i]),
            data_uri(sheets[1][i]),
            [(name, first["scores"][name][i], last["scores"][name][i]) for name in _common([first, last], first["scores"])],
        )
        for i in range(shown)
    ]


def parts(evaluations: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Parts of the metrics (for the oracle: kinds of failure): mean over held-out images before and after."""
    if len(evaluations) < 2:
        return []
    first, last = evaluations[0]["parts"], evaluations[-1]["parts"]
    return [(name, first[name], last[name]) for name in first if name in last]


def _common(evaluations: list[dict[str, Any]], names: Iterable[str]) -> list[str]:
    """Those of `names` that every evaluation has: a resumed run may have been given other rewards."""
    return [name for name in names if all(name in e["scores"] for e in evaluations)]


@dataclass(frozen=True)
class Shot:
    """An image of the tree: PNG as data URI, its reward under each model."""

    image: str
    rewards: list[tuple[str, float]]


@dataclass(frozen=True)
class Branch:
    """A trained edge: its advantage, and its images by channel (granularity)."""

    advantage: float
    shots: list[tuple[int, Shot]]


@dataclass(frozen=True)
class StepOfTree:
    """The branches that were compared with each other at one grid step, best first."""

    index: int
    branches: list[Branch]


@dataclass(frozen=True)
class TreePicture:
    """The tree of one prompt at one training step."""

    step: int
    prompt: str
    anchor: Shot | None
    steps: list[StepOfTree]
    largest: float
    granular: bool


def read_tree(path: Path) -> TreePicture:
    """The kept tree at `path`, arranged for the eye: for each grid step the branches with images, rewards and advantage."""
    table = json.loads(path.read_text())
    sheet = tiles(path.with_suffix(".png"), 16)
    leaves, parent, level = table["leaves"], table["parent"], table["level"]
    shot = {
        leaf: Shot(data_uri(sheet[i]), [(name, values[i]) for name, values in table["rewards"].items()])
        for i, leaf in enumerate(leaves)
    }
    trained = set(table["edges"])
    above: dict[int, list[int]] = {}  # leaf -> trained edges on its way
    for leaf in leaves:
        row, edges = leaf, []
        while row != -1:
            if row in trained:
                edges.append(row)
            row = parent[row]
        above[leaf] = edges
    shots: dict[int, list[tuple[int, Shot]]] = {edge: [] for edge in table["edges"]}
    anchor = None
    for leaf, channel in zip(table["image"], table["channel"], strict=True):
        for edge in above[leaf]:
            shots[edge].append((channel, shot[leaf]))
        if not above[leaf] and channel == 0 and table["num_steps"] not in table["channel"]:
            anchor = shot[leaf]
    looks = any(channel > 0 and channel == table["num_steps"] for channel in table["channel"])  # a channel a level: DenseGRPO
    steps: dict[int, list[Branch]] = {}
    for edge, advantage in zip(table["edges"], table["advantage"], strict=True):
        below = [pair for pair in shots[edge] if not looks or pair[0] == level[edge]]
        steps.setdefault(level[parent[edge]], []).append(Branch(advantage, sorted(below, key=lambda pair: pair[0])))
    told: set[tuple[tuple[float, tuple[str, ...]], ...]] = set()
    for index, branches in sorted(steps.items()):
        story = tuple(sorted((b.advantage, tuple(shot.image for _, shot in b.shots)) for b in branches))
        if story in told:  # the steps of plain trajectories all say the same
            del steps[index]
        told.add(story)
    return TreePicture(
        step=table["step"],
        prompt=table["prompt"],
        anchor=anchor,
        steps=[StepOfTree(i, sorted(b, key=lambda branch: -branch.advantage)) for i, b in sorted(steps.items())],
        largest=max((abs(a) for a in table["advantage"]), default=0) or 1.0,
        granular=max(table["channel"], default=0) > 0,
    )


def tiles(path: Path, columns: int) -> list[Image.Image]:
    """The square tiles of a contact sheet, row by row."""
    sheet = Image.open(path).convert("RGB")
    size = sheet.width // columns
    rows = math.ceil(sheet.height / size)
    return [sheet.crop((c * size, r * size, (c + 1) * size, (r + 1) * size)) for r in range(rows) for c in range(columns)]


def data_uri(image: Image.Image) -> str:
    """An image as a PNG that the page carries in itself."""
    file = io.BytesIO()
    image.save(file, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
