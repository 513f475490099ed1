"""Take the pictures of the pages of `flowgrain view`, from runs of the demo.

    make view-images                                    # trains the demo with two seeds first
    python scripts/view_screenshots.py RUN [RUN ...]    # uses existing runs

Writes docs/images/view-PAGE.png, at most 250 KB each. Needs playwright and Chromium.
"""

import argparse
import io
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from view.browser import Watched, browser, missing, serve, until

from flowgrain.records import load_run

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SIZE = {"width": 1280, "height": 760}
LARGEST = 250_000
READY = """document.querySelector("main").innerText.length > 100
  && !document.querySelector("main").innerText.includes("Loading ")
  && [...document.images].every((image) => image.complete)"""


def train_demo(seed: int) -> Path:
    """Train the demo with a seed, unless it is finished."""
    out = Path("runs") / f"view-demo-{seed}"
    if not (out / "run.yaml").exists() or load_run(out).status != "finished":
        start = ["--resume", str(out)] if (out / "run.yaml").exists() else ["--out", str(out)]
        settings = [] if start[0] == "--resume" else [f"runtime.seed={seed}", "evaluation.every=10"]
        subprocess.run([sys.executable, "-m", "flowgrain", "train", *settings, *start], check=True)
    return out


def routes(runs: list[Path]) -> dict[str, str]:
    """The address of every picture."""
    names = [quote(run.name, safe="") for run in runs]
    run = load_run(runs[0])
    first, last = run.evaluations[0].step, run.evaluations[-1].step
    step = run.groups.steps[-1]
    return {
        "runs": "runs",
        "curves": f"curves?runs={'%2C'.join(names)}",
        "group": f"group/{names[0]}/{step}/0",
        "tree": f"tree/{names[0]}/{step}/0",
        "compare": f"compare?a=run:{names[0]}@{first}&b=run:{names[0]}@{last}",
        "arena": f"arena?a=run:{names[0]}@{first}&b=run:{names[0]}@{last}",
        "config": f"config/{names[0]}" + (f"?diff={names[1]}" if len(names) > 1 else ""),
    }


def small_png(content: bytes) -> bytes:
    """A PNG of at most `LARGEST` bytes: with fewer colors, if it must be."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    for colors in (None, 256, 128, 64):
        target = io.BytesIO()
        (image.quantize(colors) if colors else image).save(target, "PNG", optimize=True)
        if target.tell() <= LARGEST:
            break
    return target.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path)
    runs = parser.parse_args().runs or [train_demo(0), train_demo(1)]
    if missing():
        sys.exit(missing())
    with serve(runs) as address, browser() as chromium:
        page = Watched(chromium, address, viewport=SIZE, color_scheme="light")
        page.tab.set_default_timeout(120_000)
        for name, route in routes(runs).items():
            tab = page.open(route)
            until(tab, READY, seconds=120)
            tab.wait_for_timeout(1000)  # curves are drawn
            content = small_png(tab.screenshot())
            (IMAGES / f"view-{name}.png").write_bytes(content)
            print(f"view-{name}.png: {len(content) / 1000:.0f} KB")
        if page.problems:
            sys.exit("\n".join(page.problems))


if __name__ == "__main__":
    main()
