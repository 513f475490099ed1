"""The pages in a browser: no horizontal scrolling, no broken images."""

import json
import shutil
import subprocess

import pytest

from flowgrain.evaluation import make_table
from flowgrain.report import write_comparison, write_report, write_side_by_side

PROBE = """<script>addEventListener('load', () => {
  for (const image of document.images) image.loading = 'eager';
  const broken = [...document.images].filter(image => image.complete && !image.naturalWidth).length;
  const width = document.documentElement.scrollWidth;
  const images = document.images.length;
  document.title = JSON.stringify({width, visible: innerWidth, broken, images});
})</script>"""


def measured(page, width):
    """Widths and image counts of a page in a window of `width` pixels."""
    probe = page.with_name(f"probe-{width}.html")
    probe.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    size = f"--window-size={width},900"
    command = ["chromium", *flags, size, "--dump-dom", probe.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    title = result.stdout.split("<title>")[1].split("</title>")[0]
    return json.loads(title.replace("&quot;", '"'))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [420])
def test_pages_fit_the_window(run, comparison, evaluation, width):
    request, folder = evaluation
    pages = {
        write_report(run): 36,
        write_comparison(comparison[1]): 24,
        write_side_by_side(folder, make_table(folder), request.seeds): 20,
    }
    for page, images in pages.items():
        seen = measured(page, width)
        assert seen["images"] >= images
        assert seen["broken"] == 0
        assert seen["width"] <= seen["visible"]
