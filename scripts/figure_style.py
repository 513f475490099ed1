"""Colors, fonts and SVG output of the documentation's figures.

Every color is a CSS variable with a value for light pages and a value for dark pages. The browser
selects one by the color scheme of the page.
"""

import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLORS = {  # name: (light page, dark page)
    "ink": ("#1f2430", "#e9ecf2"),
    "muted": ("#667085", "#a3acbb"),
    "grid": ("#e4e7ed", "#39404d"),
    "ode": ("#929bab", "#8d97a8"),
    "noise": ("#2f6fde", "#6fa3ff"),
    "image1": ("#e2632c", "#f5814c"),
    "image2": ("#f0aa2e", "#f7bf57"),
    "image3": ("#b8478f", "#e07bbb"),
    "card": ("#f6f8fc", "#252b36"),
    "edge": ("#d3daea", "#465063"),
    "good": ("#1f9d6b", "#45c990"),
    "bad": ("#d1435b", "#f0758a"),
}
LIGHT = {name: light for name, (light, _) in COLORS.items()}
"""Matplotlib draws with the light colors; `save` replaces them by variables."""
SIGMA = "\N{GREEK SMALL LETTER SIGMA}"
MINUS = "\N{MINUS SIGN}"
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', monospace"

plt.rcParams |= {"svg.hashsalt": "flowgrain", "svg.fonttype": "none"}


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as SVG: transparent, with text as text, and colors that follow the page."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    plt.close(figure)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", SANS, svg)
    svg = re.sub(r"'DejaVu Sans Mono'[^;\"]*", MONO, svg)
    for name, light in LIGHT.items():
        svg = svg.replace(light, f"var(--{name})")
    path.write_text(svg.replace("<defs>", f"{_style()}\n <defs>", 1), encoding="utf-8")


def _style() -> str:
    light, dark = (
        " ".join(f"--{name}: {pair[scheme]};" for name, pair in COLORS.items()) for scheme in (0, 1)
    )
    dark_rule = f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    return f"<style>:root {{ {light} }}\n{dark_rule}</style>"
