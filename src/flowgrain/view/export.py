"""Static exports: the pages of runs in one HTML file, or in a directory with the images.

An export needs neither a server nor the internet. It contains the answers of the API that
`answers` lists, and the pages read them in place of a server.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flowgrain.records.files import write_atomically
from flowgrain.records.images import LOSSLESS
from flowgrain.settings import SettingsError
from flowgrain.view import evaluations, groups, runs, sources
from flowgrain.view.assets import Assets
from flowgrain.view.catalog import Catalog, Entry
from flowgrain.view.json_values import to_json
from flowgrain.view.readable import readable

MEGABYTES = 64
"""Size of all images of an export. Further images are left out."""
POINTS = 1000
"""Points of a curve in the export of one run."""
ALL_POINTS = 20_000
"""Points of a curve of all runs together."""
_PREFIX = "/assets/"
_SCRIPT = "text/javascript"
_STYLESHEET = re.compile(r'<link rel="stylesheet" href="/assets/([^"]+)">')
_IMPORT_MAP = re.compile(r'<script type="importmap">(.*?)</script>', re.DOTALL)
_MODULE = re.compile(r'<script type="module" src="/assets/([^"]+)"></script>')


@dataclass(frozen=True)
class Exported:
    """What an export contains.

    Attributes:
        path: the HTML file.
        runs: number of runs.
        images: number of images.
        left_out: number of images that did not fit or could not be read.
        damaged: what could not be read.
    """

    path: Path
    runs: int
    images: int
    left_out: int
    damaged: list[str]


def export(catalog: Catalog, out: Path) -> Exported:
    """Write the pages of all runs in `catalog`.

    Args:
        catalog: the directories.
        out: an .html file for everything, or a directory for index.html and the images.

    Raises:
        SettingsError: there is no run, or the directory contains something else.
        OSError: a file cannot be written.
    """
    single = out.suffix.lower() in (".html", ".htm")
    page = out if single else out / "index.html"
    if not single and out.exists() and not page.exists() and (out.is_file() or any(out.iterdir())):
        raise SettingsError(f"--export {out}: contains other files. Use a new directory.")
    entries = catalog.entries("run")
    if not entries:
        raise SettingsError(
            f"--export {out}: there is no run to export in {', '.join(map(str, catalog.roots))}."
        )
    damaged: list[str] = []
    found = dict(answers(catalog, entries, damaged))
    data: dict[str, Any] = {
        name: _without_folders(answer, catalog.roots) for name, answer in found.items()
    }
    size, images, left_out = 0, 0, 0
    page.parent.mkdir(parents=True, exist_ok=True)
    for name, read in list(_pictures(entries, data)):
        content = readable(damaged, read)
        if content is None or size + len(content) > MEGABYTES * 2**20:
            left_out += 1
            continue
        size += len(content)
        if single:
            data[name] = _data_uri(content, "image/webp")
        else:
            data[name] = f"images/{images:06d}.webp"
            (out / "images").mkdir(exist_ok=True)
            (out / data[name]).write_bytes(content)
        images += 1
    write_atomically(page, render(Assets(), data))
    return Exported(page, len(entries), images, left_out, damaged)


def _without_folders(answer: Mapping[str, Any], roots: Sequence[Path]) -> dict[str, Any]:
    """An answer without the directories of this computer. An export may be sent to others."""
    shown = {name: value for name, value in answer.items() if name != "folder"}
    if "runs" in shown:
        shown["runs"] = [_without_folders(row, roots) for row in shown["runs"]]
    if "damaged" in shown:
        shown["damaged"] = [_relative(note, roots) for note in shown["damaged"]]
    return shown


def _relative(note: str, roots: Sequence[Path]) -> str:
    """A note with paths below `roots` in place of absolute ones."""
    folders = {form(root) for root in roots for form in (os.path.abspath, os.path.realpath)}
    for folder in sorted(folders - {os.sep}, key=len, reverse=True):
        note = note.replace(folder, os.path.basename(folder))
    return note


def answers(
    catalog: Catalog, entries: Sequence[Entry], damaged: list[str]
) -> Iterator[tuple[str, Any]]:
    """Addresses and answers of the API in an export.

    Of every run: its settings, its curves, the means of all evaluations, the scores of the first,
    the best and the last evaluation, and the last recorded groups.
    """
    overview = runs.overview(catalog)
    yield "/api/runs", {**overview, "evaluations": []}
    points = max(50, min(POINTS, ALL_POINTS // len(entries)))
    rows = []
    for entry in entries:
        details = readable(damaged, runs.details, entry)
        if details is None:
            continue
        steps = _chosen_evaluations(details)
        last_groups = details["group_steps"][-1:]
        yield address(entry), {**details, "group_steps": last_groups, "evaluation_steps": steps}
        yield address(entry, "metrics"), runs.curves_of(entry).sample(None, points)
        yield address(entry, "evaluations"), evaluations.means(entry)
        for step in steps:
            content = readable(damaged, evaluations.content, entry, step)
            source = readable(damaged, sources.content, catalog, f"run:{entry.id}@{step}")
            if content and source:
                yield address(entry, "evaluations", step), content
                yield _address("sources", source["id"]), source
                rows.append(source)
        for step in last_groups:
            content = readable(damaged, groups.content, entry, step)
            if content:
                yield address(entry, "groups", step), content
                yield address(entry, "groups", step, "summary"), groups.summary(entry, step)
    shown = [{k: v for k, v in row.items() if k not in ("prompts", "scores")} for row in rows]
    yield "/api/sources", {"sources": [row for row in shown if row["images"]], "damaged": []}


def _chosen_evaluations(details: Mapping[str, Any]) -> list[int]:
    """The steps of the first, the best and the last evaluation."""
    steps = details["evaluation_steps"]
    best = [found["step"] for found in details["best"].values()][:1]
    return sorted({*steps[:1], *steps[-1:], *(step for step in best if step in steps)})


def _pictures(
    entries: Sequence[Entry], data: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Addresses of the images of the answers in `data`, and functions that read them as WebP."""
    for entry in entries:
        details = data.get(address(entry), {"evaluation_steps": [], "group_steps": []})
        for step in details["evaluation_steps"]:
            name = f"run:{entry.id}@{step}"
            source = data.get(_address("sources", name), {"images": 0})
            for place in range(source["images"]):
                read = partial(evaluations.image, entry, step, place)
                yield _address("sources", name, f"{place}.webp"), read
        for step in details["group_steps"]:
            group = data.get(address(entry, "groups", step), {"prompts": []})
            for number, prompt in enumerate(group["prompts"]):
                for place in range(len(group["tree"]["leaves"])) if prompt["recorded"] else ():
                    name = address(entry, "groups", step, number, f"{place}.webp")
                    yield name, partial(groups.image, entry, step, number, place)
                    if place in prompt["full"] and max(group["image_size"]) > LOSSLESS:
                        read = partial(groups.image, entry, step, number, place, True)
                        yield f"{name}?full=1", read


def render(assets: Assets, data: Mapping[str, Any]) -> str:
    """The page index.html with its scripts, its styles and `data` inside.

    Args:
        assets: the files of the pages.
        data: answers and images by address.
    """
    page, imports = assets.text("index.html"), dict[str, str]()
    digests: dict[str, list[str]] = {"script": [], "style": []}

    def inline(kind: str, tag: str, content: str) -> str:
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        digests[kind].append(f"'sha256-{digest}'")
        return f"<{tag}>{content}</{kind}>"

    def style(match: re.Match[str]) -> str:
        return inline("style", "style", assets.text(match[1]))

    def import_map(match: re.Match[str]) -> str:
        imports.update(_modules(assets, json.loads(match[1])["imports"]))
        uris = {name: _data_uri(assets.text(f).encode(), _SCRIPT) for name, f in imports.items()}
        return inline("script", 'script type="importmap"', json.dumps({"imports": uris}))

    def module(match: re.Match[str]) -> str:
        name = next(key for key, target in imports.items() if target == match[1])
        return inline("script", 'script type="module"', f"import {json.dumps(name)};")

    page = _IMPORT_MAP.sub(import_map, _STYLESHEET.sub(style, page))
    page = _MODULE.sub(module, page)
    policy = (
        f"default-src 'none'; script-src data: {' '.join(digests['script'])}; "
        f"style-src {' '.join(digests['style'])}; img-src 'self' data: file:"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    text = to_json(data).replace("<", "\\u003c")  # a text never ends the script
    embedded = f'<script type="application/json" id="data">{text}</script>'
    return page.replace("<head>", f"<head>\n{meta}", 1).replace("</body>", f"{embedded}\n</body>")


def _modules(assets: Assets, imports: Mapping[str, str]) -> dict[str, str]:
    """The file of every module by its name in the import map. A name may be that of a folder."""
    single = {target: name for name, target in imports.items() if not name.endswith("/")}
    folders = {target: name for name, target in imports.items() if name.endswith("/")}
    found = {}
    for file in (name for name in assets.names if name.endswith(".js")):
        place = f"{_PREFIX}{file}"
        if place in single:
            found[single[place]] = file
            continue
        for target, name in folders.items():
            if place.startswith(target):
                found[name + place.removeprefix(target)] = file
    return found


def address(entry: Entry, *parts: object) -> str:
    """The address of an answer about a run, as the pages write it."""
    return _address("runs", entry.id, *parts)


def _address(*parts: object) -> str:
    return "/api/" + "/".join(quote(str(part), safe="!~*'()") for part in parts)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
