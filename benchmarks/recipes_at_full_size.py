"""Rehearse recipes at full size, by default all of them, and write a table.

    python benchmarks/recipes_at_full_size.py [RECIPE ...] [--gpus 8] [--gpu h100] [--out FILE]

The results are saved after every recipe. A recipe with a result is not rehearsed again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from flowgrain.config import load_config
from flowgrain.config.load import recipe_names
from flowgrain.models.quiet import quiet_libraries
from flowgrain.planning.forecast import forecast
from flowgrain.planning.gpus import gpu_named
from flowgrain.planning.rehearse import RehearsalError, Rehearser


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--out", type=Path, default=Path("recipes.json"))
    args = parser.parse_args()
    quiet_libraries()
    card = gpu_named(args.gpu)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    with Rehearser() as process:
        for recipe in args.recipes or recipe_names():
            if recipe in found:
                continue
            config = load_config(recipe)
            try:
                rehearsal = process.rehearse(config, args.gpus, card)
            except RehearsalError as error:
                found[recipe] = {"error": str(error)}
            else:
                phase, peak = rehearsal.peak
                expected = forecast(rehearsal, card)
                found[recipe] = {
                    "lora": config.lora.rank,
                    "peak": peak.total,
                    "phase": phase,
                    "fits": rehearsal.fits(card.memory),
                    "forecast": expected.total,
                    "moved": sum(expected.moved.values()),
                    "checkpoint": rehearsal.measured.checkpoint,
                    "syncs": sum(rehearsal.measured.syncs.values()),
                    "seconds": rehearsal.seconds,
                }
            args.out.write_text(json.dumps(found, indent=1))
            print(recipe, found[recipe], flush=True)
    columns = (
        f"Recipe, on {args.gpus} x {args.gpu}",
        *("Trains", "GB on a GPU", "in the phase", "Fits", "Forecast of a step"),
        *("GB received", "Time of the rehearsal"),
    )
    print(f"| {' | '.join(columns)} |")
    print(f"| {' | '.join('---' for _ in columns)} |")
    for recipe, values in found.items():
        print(f"| `{recipe}` | {' | '.join(_cells(values))} |")


def _cells(values: dict[str, Any]) -> list[str]:
    """The result of a recipe."""
    if "error" in values:
        return [values["error"]]
    return [
        f"LoRA {values['lora']}" if values["lora"] else "full",
        f"{values['peak'] / 1e9:.{1 if values['peak'] >= 1e9 else 2}f}",
        values["phase"],
        "yes" if values["fits"] else "no",
        f"{values['forecast']:.0f} s" if values["forecast"] >= 1 else "less than 1 s",
        f"{values['moved'] / 1e9:,.{0 if values['moved'] >= 10e9 else 2}f}",
        f"{values['seconds']:.0f} s",
    ]


if __name__ == "__main__":
    main()
