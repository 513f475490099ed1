"""Measure how a step grows with the group, noise steps, granularities, T, prompts and processes.

    python benchmarks/growth.py [--rounds 3] [--processes 1,2]

Each row has the planned forward passes of a step, the median seconds of its sampling, and
microseconds per pass. For processes: seconds of a whole step under torchrun, one thread each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from flowgrain.config import load_config
from flowgrain.planning.plan import prompt_cost
from flowgrain.training import Trainer

SETTINGS: dict[str, Any] = {
    "sampling.num_steps": 16,
    "sampling.batch_size": 128,
    "method.group_size": 12,
    "method.granularities": [1, 2, 3],
    "training.prompts_per_step": 2,
    "rewards": ["oracle"],
    "evaluation.rewards": [],
}
AXES: dict[str, tuple[str, dict[int, Any]]] = {  # title: (setting, value by number)
    "group size": ("method.group_size", {n: n for n in (4, 8, 12, 24)}),
    "noise steps": ("method.sde_steps", {n: list(range(n)) for n in (1, 2, 4, 8)}),
    "granularities": ("method.granularities", {n: list(range(1, n + 1)) for n in (1, 2, 3, 4)}),
    "T": ("sampling.num_steps", {n: n for n in (8, 16, 24, 32)}),
    "prompts": ("training.prompts_per_step", {n: n for n in (1, 2, 4, 8)}),
}


def measure(changes: dict[str, Any], rounds: int) -> tuple[int, float]:
    """Forward passes of a step, and the median seconds of its sampling."""
    config = load_config("g2rpo", {**SETTINGS, **changes})
    trainer = Trainer(config, tempfile.mkdtemp())
    seconds = []
    for step in range(1, rounds + 2):
        trainer.timer.reset()
        trainer.collector.collect(step)
        seconds.append(trainer.timer.seconds["seconds/sample"])
    passes = config.training.prompts_per_step * prompt_cost(config).forward_passes
    return passes, statistics.median(seconds[1:])  # the first step is a warm-up


def measure_processes(count: int, rounds: int) -> float:
    """Median seconds of a step with `count` processes."""
    out = Path(tempfile.mkdtemp()) / "run"
    settings = {**SETTINGS, "training.prompts_per_step": 4, "training.max_steps": rounds + 1}
    settings |= {"runtime.threads": 1, "evaluation.every": 0}
    words = [f"{path}={json.dumps(value)}" for path, value in settings.items()]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "flowgrain", "train", "g2rpo", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *words], check=True, capture_output=True, env=environment)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds"] for line in lines[-rounds:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", default="1,2")
    args = parser.parse_args()
    print("| | Forward passes | Seconds | Microseconds per pass |\n| --- | --- | --- | --- |")
    for title, (setting, values) in AXES.items():
        for number, value in values.items():
            passes, seconds = measure({setting: value}, args.rounds)
            cells = f"{passes:,} | {seconds:.2f} | {1e6 * seconds / passes:.0f}"
            print(f"| {title} = {number} | {cells} |", flush=True)
    for count in map(int, args.processes.split(",")):
        seconds = measure_processes(count, args.rounds)
        print(f"| processes = {count}, whole step of 4 prompts | | {seconds:.2f} | |", flush=True)


if __name__ == "__main__":
    main()
