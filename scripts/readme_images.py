"""Draw the figure of the README from a demo run: images before and after training, and scores.

    make readme-images                       # trains the demo first
    python scripts/readme_images.py RUN      # uses an existing run of the demo

Writes docs/images/demo.png and docs/images/demo.json, which holds the numbers of the README.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from flowgrain.statistics import confidence_interval
from flowgrain.training.recorder import EVALUATION_COLUMNS, EVALUATION_IMAGES
from flowgrain.training.run_files import read_metrics

IMAGES = Path(__file__).parents[1] / "docs" / "images"
INK, BLUE, GRAY = "#1f2733", "#2f6fde", "#8a94a6"
PAIRS = 6


def train_demo() -> Path:
    """Train the demo in a new directory."""
    out = Path("runs") / "readme-demo"
    resume = ["--resume", str(out)] if (out / "run.yaml").exists() else ["--out", str(out)]
    subprocess.run([sys.executable, "-m", "flowgrain", "train", *resume], check=True)
    return out


def evaluations(run: Path) -> list[dict]:
    """The evaluations of a run, in order."""
    return [
        json.loads(file.read_text()) for file in sorted((run / "evaluations").glob("step-*.json"))
    ]


def tiles(run: Path, step: int) -> list[Image.Image]:
    """The recorded images of an evaluation."""
    sheet = Image.open(run / "images" / f"evaluation-{step:06d}.png").convert("RGB")
    size = sheet.width // EVALUATION_COLUMNS
    boxes = [divmod(i, EVALUATION_COLUMNS) for i in range(EVALUATION_IMAGES)]
    return [sheet.crop((c * size, r * size, (c + 1) * size, (r + 1) * size)) for r, c in boxes]


def shown_prompts(first: dict, last: dict) -> list[int]:
    """Prompts to show: four whose score rose by more than 0.2, then the first of the others.

    The selection is not representative. The curve shows the mean over all prompts.
    """
    gain = np.array(last["scores"]["oracle"]) - np.array(first["scores"]["oracle"])
    rose = [i for i in range(EVALUATION_IMAGES) if gain[i] > 0.2]
    others = [i for i in range(EVALUATION_IMAGES) if i not in rose]
    return sorted([*rose[: PAIRS - 2], *others][:PAIRS])


def draw_images(figure: Figure, run: Path, first: dict, last: dict) -> None:
    """Images of the shown prompts in the first and the last evaluation."""
    pictures = figure.add_gridspec(
        2, PAIRS, left=0.035, right=0.645, top=0.765, bottom=0.03, wspace=0.06, hspace=0.06
    )
    old, new = tiles(run, first["step"]), tiles(run, last["step"])
    for column, i in enumerate(shown_prompts(first, last)):
        for row, image in enumerate((old[i], new[i])):
            axes = figure.add_subplot(pictures[row, column])
            axes.imshow(image, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(fill(first["prompts"][i], 16), fontsize=8.5, color=INK, pad=6)
            if column == 0:
                axes.set_ylabel(("before", "after")[row], fontsize=11, color=INK, labelpad=6)


def draw_curve(figure: Figure, found: list[dict]) -> None:
    """The score of every evaluation."""
    curve = figure.add_axes((0.71, 0.16, 0.275, 0.605))
    points = [confidence_interval(np.array(e["scores"]["oracle"])) for e in found]
    steps = [e["step"] for e in found]
    curve.fill_between(
        steps, [p.low for p in points], [p.high for p in points], color=BLUE, alpha=0.15, lw=0
    )
    curve.plot(steps, [p.mean for p in points], "o-", color=BLUE, lw=2, ms=5)
    for step, point, place in ((steps[0], points[0], (26, -8)), (steps[-1], points[-1], (-8, 12))):
        curve.annotate(
            f"{point.mean:.3f}",
            (step, point.mean),
            place,
            textcoords="offset points",
            ha="center",
            color=INK,
        )
    curve.set_xlabel("training step", color=INK)
    curve.set_title(
        f"Oracle score on {len(found[0]['prompts'])} held-out prompts,\n"
        "mean and 95% confidence interval",
        fontsize=9,
        color=INK,
    )
    curve.set_xlim(-2, steps[-1] + 2)
    curve.spines[["top", "right"]].set_visible(False)
    curve.tick_params(colors=GRAY)
    curve.grid(alpha=0.25)


def draw(run: Path) -> dict:
    """Draw the figure. Returns the numbers in it."""
    found = evaluations(run)
    first, last = found[0], found[-1]
    before, after = (np.array(e["scores"]["oracle"]) for e in (first, last))
    difference = confidence_interval(after - before)
    figure = plt.figure(figsize=(12, 3.9), dpi=160, facecolor="white")
    draw_images(figure, run, first, last)
    draw_curve(figure, found)
    figure.suptitle(
        "flowgrain demo: G2RPO on the bundled model",
        x=0.035,
        y=0.985,
        ha="left",
        fontsize=13,
        color=INK,
        weight="bold",
    )
    figure.savefig(IMAGES / "demo.png")
    lines = [line for line in read_metrics(run) if line["step"] > 0]
    return {
        "before": round(float(np.nanmean(before)), 3),
        "after": round(float(np.nanmean(after)), 3),
        "difference": [round(v, 3) for v in (difference.mean, difference.low, difference.high)],
        "prompts": len(before),
        "steps": lines[-1]["step"],
        "training_minutes": round(sum(line["seconds"] for line in lines) / 60, 1),
    }


def main() -> None:
    """Train the demo, unless a run is given, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="directory of a run of the demo")
    run = parser.parse_args().run or train_demo()
    numbers = draw(run)
    (IMAGES / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
