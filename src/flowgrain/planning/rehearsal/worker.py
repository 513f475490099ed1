"""The process of rehearsals. It reads requests from stdin and writes answers to stdout, as JSON.

A process of its own, because it registers a device and a process group that no other code should
see.
"""

import json
import os
import sys
import sysconfig
import traceback
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowgrain.config.load import validate
from flowgrain.config.schema import Config
from flowgrain.models.published import required_config
from flowgrain.models.quiet import quiet_libraries
from flowgrain.planning.rehearsal import accelerator
from flowgrain.planning.rehearsal.depth import Depth, depths
from flowgrain.planning.rehearsal.model import build_backbone
from flowgrain.planning.rehearsal.step import measure
from flowgrain.registry import load_plugin
from flowgrain.settings import SettingsError
from flowgrain.training.load import load_dtypes

_PACKAGE = Path(__file__).parents[2]


def run(
    config: Config, gpus: int, depth: Depth = "lines", share: int = 0, of: int = 1
) -> list[dict[str, Any]]:
    """Measure the first training step of `config` on one of `gpus` ranks.

    Args:
        config: settings, see `rehearse.prepared`.
        gpus: number of ranks.
        depth: which transformers are measured, see `Depth`.
        share: measure every `of`-th transformer, from this one.
        of: number of processes that share the transformers.

    Returns:
        Number, factor and measurement of each transformer.
    """
    device = accelerator.register()
    dtypes = load_dtypes(config, device=torch.device("cuda"))
    chosen = depths(required_config(config.model, "transformer"), depth)
    parts = []
    for number in range(share, len(chosen.configs), of):
        build = partial(build_backbone, config.model, dtypes, chosen.configs[number])
        found = asdict(measure(config, build, gpus, device))
        parts.append({"number": number, "factor": chosen.factors[number], "measurement": found})
    return parts


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The measurements for a request, or the error that the step raises."""
    try:
        for plugin in request["config"]["runtime"]["plugins"]:
            load_plugin(plugin)
        config = validate(request["config"])
        work = (request["gpus"], request["depth"], request["share"], request["of"])
        return {"parts": run(config, *work)}
    except SettingsError as error:
        return {"settings_error": str(error)}
    except Exception as error:  # any error of a first step on a GPU
        return {"error": _message(error), "traceback": traceback.format_exc()}


def _message(error: Exception) -> str:
    """The error, and the last place that leads to it, outside of libraries and rehearsals."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_own(Path(frame.filename))]
    place = (own or frames)[-1]
    path = Path(place.filename)
    name = path.relative_to(_PACKAGE) if path.is_relative_to(_PACKAGE) else path
    return f"{type(error).__name__} in {name}:{place.lineno} ({place.name}): {error}"


def _is_own(path: Path) -> bool:
    """Whether a file belongs to this package or to a plugin."""
    if path.is_relative_to(_PACKAGE):
        return not path.is_relative_to(Path(__file__).parent)
    libraries = (Path(folder) for folder in sysconfig.get_paths().values())
    return path.is_file() and not any(path.is_relative_to(folder) for folder in libraries)


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    with redirect_stdout(sys.stderr):
        quiet_libraries()
        for line in sys.stdin:
            answers.write(json.dumps(answer(json.loads(line))) + "\n")
            answers.flush()
    sys.stderr.flush()
    os._exit(0)  # a process with a registered device may abort at a normal exit


if __name__ == "__main__":
    main()
