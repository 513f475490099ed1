"""Compare rehearsals with the memory of real training steps on the CPU, by phase and kind.

    python benchmarks/rehearsal.py [CASE ...] [--json FILE] [--list]
    python benchmarks/rehearsal.py --depth sd3-lora-1 flux-full-8
    python benchmarks/rehearsal.py --published

The first command runs a step of every case for real, see `real_memory`, and prints both peaks. With
--json, every finished case is added to FILE, and cases that it contains are not run again. The
second one compares lines through shallow models with rehearsals of all blocks, which takes minutes.
The third one compares numbers of parameters and FLOPs with published numbers.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rehearsal_cases import CASES, FLUX, GPU, SD3, compare
from torch.utils.flop_counter import FlopCounterMode

from flowgrain.config import load_config
from flowgrain.models import Dtypes, ModelConfig
from flowgrain.models.published import required_config
from flowgrain.planning.rehearsal.model import build_backbone
from flowgrain.planning.rehearse import Rehearser

SMALL = 0.01
"""Kinds below this share of the peak are not compared."""


def difference(pair: Sequence[float]) -> float:
    """Relative difference of a rehearsed number from a measured number."""
    rehearsed, measured = pair
    return rehearsed / measured - 1 if measured else math.inf


def totals(kinds: Mapping[str, Sequence[float]]) -> list[float]:
    """Rehearsed and measured bytes of all kinds."""
    return [sum(pair[i] for pair in kinds.values()) for i in (0, 1)]


def large_kinds(kinds: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The kinds that are at least `SMALL` of the peak."""
    limit = SMALL * max(totals(kinds))
    return {name: pair for name, pair in kinds.items() if max(pair) >= limit}


def megabytes(pair: Sequence[float]) -> str:
    return " / ".join(f"{value / 1e6:,.1f}" for value in pair)


def table(results: Mapping[str, Any]) -> str:
    """The totals of all phases, and the kind with the largest difference, as Markdown."""
    lines = [
        "| case | phase | total, MB: rehearsed / measured | difference | activations, MB | "
        "largest difference of another kind |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for phase, kinds in result["phases"].items():
            total = totals(kinds)
            named = {k: v for k, v in large_kinds(kinds).items() if k != "activations"}
            worst = max(named, key=lambda k: abs(difference(named[k])), default=None)
            other = f"{worst} {difference(named[worst]):+.1%}" if worst else "-"
            activations = megabytes(kinds.get("activations", (0.0, 0.0)))
            cells = (name, phase, megabytes(total), f"{difference(total):+.1%}", activations, other)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(results: Mapping[str, Any]) -> str:
    """The phase with most memory, and the largest differences of all phases, as Markdown."""
    lines = [
        "| case | peak phase | MB: rehearsed / measured | largest difference of a total | "
        "largest difference of a kind |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        phases = result["phases"]
        peak = max(phases, key=lambda phase: totals(phases[phase])[1])
        total = max((difference(totals(kinds)) for kinds in phases.values()), key=abs)
        kinds = [
            (difference(pair), kind, phase)
            for phase, of_phase in phases.items()
            for kind, pair in large_kinds(of_phase).items()
        ]
        off, kind, phase = max(kinds, key=lambda item: abs(item[0]))
        worst = f"{off:+.1%} ({kind}, {phase})"
        cells = (name, peak, megabytes(totals(phases[peak])), f"{total:+.1%}", worst)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


DEPTH = {
    "sd3-lora-1": ("sd3/flow_grpo", {"data.prompts": "x", "model.path": SD3}, 1),
    "flux-full-8": ("flux/g2rpo", {"data.prompts": "x", "model.path": FLUX}, 8),
}


def compare_depth(names: Sequence[str], process: Rehearser) -> None:
    """Print peaks by phase from lines and at full depth."""
    print("| run | phase | from lines, GB | full depth, GB | difference |\n|---|---|---|---|---|")
    for name in names:
        source, changes, gpus = DEPTH[name]
        config = load_config(source, changes)
        lines, full = (process.rehearse(config, gpus, GPU, depth) for depth in ("lines", "full"))
        for phase, peak in full.phases.items():
            pair = lines.phases[phase].total, peak.total
            numbers = f"{pair[0] / 1e9:.3f} | {pair[1] / 1e9:.3f} | {difference(pair):+.2%}"
            print(f"| {name} | {phase} | {numbers} |")
        flops = [sum(r.measured.flops.values()) for r in (lines, full)]
        numbers = f"{flops[0] / 1e15:.4f} | {flops[1] / 1e15:.4f} | {difference(flops):+.2%}"
        print(f"| {name} | PFLOP | {numbers} |")
        print(f"| {name} | seconds | {lines.seconds:.0f} | {full.seconds:.0f} | |", flush=True)


PARAMETERS = (
    (FLUX, "transformer", 11.9e9, "checkpoint"),
    (FLUX, "vae", 83.8e6, "checkpoint"),
    (FLUX, "text_encoder", 123.1e6, "CLIP ViT-L/14, text model"),
    (FLUX, "text_encoder_2", 4.762e9, "T5 v1.1 XXL, encoder"),
    (SD3, "transformer", 2.24e9, "checkpoint"),
    (SD3, "text_encoder_2", 694.7e6, "OpenCLIP ViT-bigG/14, text model"),
)
"""Model, part, published number of parameters, source."""
FLUX_FLOPS = 3726.87e12 / 50
"""FLOPs of a forward pass of FLUX.1-dev at 1024 x 1024. Source: the total of 50 steps in
bench/README.md of github.com/vipshop/cache-dit, counted with calflops.
"""


def compare_published() -> None:
    """Print numbers of parameters and FLOPs that rehearsals use, and published ones."""
    print("| model | part | here | published | difference | source |\n|---|---|---|---|---|---|")
    meta, kinds = torch.device("meta"), Dtypes(*[torch.bfloat16] * 3)
    for name, part, published, source in PARAMETERS:
        model = ModelConfig(name="flux" if name == FLUX else "sd3", path=name)
        backbone: Any = build_backbone(model, kinds, required_config(model, "transformer"), meta)
        count = sum(p.numel() for p in backbone.pipe.components[part].parameters())
        numbers = f"{count / 1e6:,.1f} M | {published / 1e6:,.1f} M"
        print(f"| {name} | {part} | {numbers} | {difference((count, published)):+.1%} | {source} |")
    model = ModelConfig(name="flux", path=FLUX, height=1024, width=1024, max_prompt_tokens=512)
    backbone = build_backbone(model, kinds, required_config(model, "transformer"), meta)
    shapes = {"embeds": (1, 512, 4096), "pooled": (1, 768), "guidance": (1,)}
    cond = {key: torch.empty(shape, device=meta) for key, shape in shapes.items()}
    x = torch.empty(1, *backbone.latent_shape, device=meta, dtype=torch.bfloat16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.velocity(backbone.transformer, x, torch.ones(1, device=meta), cond)
    pair = counter.get_total_flops(), FLUX_FLOPS
    numbers = f"{pair[0] / 1e12:.2f} TFLOP | {pair[1] / 1e12:.2f} TFLOP"
    print(f"| {FLUX} | forward pass, 1024 px | {numbers} | {difference(pair):+.1%} | cache-dit |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="names of cases. Default: all")
    parser.add_argument("--json", type=Path, help="file of the results")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--depth", nargs="+", choices=DEPTH, help="compare with full depth")
    parser.add_argument("--published", action="store_true", help="compare with published numbers")
    args = parser.parse_args()
    if args.list:
        print("\n".join(CASES))
        return
    if args.published:
        compare_published()
        return
    with Rehearser() as process:
        if args.depth:
            compare_depth(args.depth, process)
            return
        done = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
        for name in args.cases or CASES:
            if name not in done:
                done[name] = compare(CASES[name], process)
                print(table({name: done[name]}), flush=True)
                if args.json:
                    args.json.write_text(json.dumps(done, indent=1))
    print(summary(done))
    print(table(done))


if __name__ == "__main__":
    main()
