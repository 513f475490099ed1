"""How fast the pages of `flowgrain view` are, in headless Chromium with generated runs.

    python benchmarks/view_pages.py [DIRECTORY]

200 runs with 1,000 steps and 100,000 thumbnails, and one group of 4,000 images. Prints the time to
the first table, the time to the first images of a group, and the times between frames while a group
scrolls. DIRECTORY keeps the generated runs.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from records.fake_runs import write_run, write_runs
from view.browser import Watched, browser, missing, serve

RUNS, STEPS, GROUPS, IMAGES = 200, 1000, 10, 25  # two prompts in every group
PROMPTS, LEAVES = 4, 1000  # of the large group
SCROLL = """async () => {
  const times = [];
  let last = performance.now();
  const end = last + 5000;
  while (last < end) {
    scrollBy(0, 240);
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    times.push(now - last);
    last = now;
  }
  return times.sort((a, b) => a - b);
}"""


def generate(folder: Path) -> None:
    """Write the runs, unless they exist."""
    if not (folder / "runs").exists():
        write_runs(folder / "runs", RUNS, steps=STEPS, group_steps=GROUPS, leaves=IMAGES)
    if not (folder / "large").exists():
        large = folder / "large"
        write_run(large, steps=1, group_steps=1, prompts=PROMPTS, leaves=LEAVES, evaluations=1)


def seconds(page: Watched, route: str, selector: str) -> float:
    """Time from the request of a page to its first content."""
    page.tab.goto("about:blank")
    start = time.perf_counter()
    page.tab.goto(f"{page.address}#/{route}")
    page.tab.wait_for_selector(selector)
    return time.perf_counter() - start


def measure(page: Watched) -> dict[str, Any]:
    """All numbers."""
    page.tab.set_default_timeout(120_000)
    small = ("group/run-007/1000/0", "img.picture.pixels")
    large = ("group/large/1/all", "img.picture.pixels")
    found: dict[str, Any] = {
        "first table, server has read nothing (s)": seconds(page, "runs", "tbody tr"),
        "first table, again (s)": seconds(page, "runs", "tbody tr"),
        "first images of a group (s)": seconds(page, *small),
        "first images of the large group (s)": seconds(page, *large),
    }
    assert page.tab.locator("main [role=status]").inner_text().startswith(f"{PROMPTS * LEAVES} of")
    frames = page.tab.evaluate(SCROLL)
    found["frames while scrolling"] = len(frames)
    for share in (50, 95, 99):
        found[f"frame time, {share}th percentile (ms)"] = frames[len(frames) * share // 100]
    found["images in the document"] = page.tab.locator(".shot").count()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    folder = parser.parse_args().folder
    if missing():
        sys.exit(missing())
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        generate(folder)
        with serve([folder]) as address, browser() as chromium:
            page = Watched(chromium, address, viewport={"width": 1440, "height": 900})
            for name, value in measure(page).items():
                print(f"{name:44} {value:8.3g}" if value < 1000 else f"{name:44} {value:8}")


if __name__ == "__main__":
    main()
