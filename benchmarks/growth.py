"""How a step grows: with the group, the noise steps, the granularities, T, the prompts and the processes.

    python benchmarks/growth.py [--rounds 3] [--processes 1,2]

Each row: passes of a step as planned, seconds of its sampling (median), and microseconds a pass; for processes, seconds of a whole
step of the same run under torchrun, a thread each.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from flowgrain import recipe
from flowgrain.methods.algorithms import build, price
from flowgrain.distributed.process import keep_memory
from flowgrain.training.trainer import Run

BASE = {
    "num_steps": 16, "group_size": 12, "granularities": (1, 2, 3), "prompts_per_step": 2, "rewards": "oracle", "eval_rewards": (),
    "rows_per_pass": 128,
}  # fmt: skip
AXES = {
    "G": [{"group_size": n} for n in (4, 8, 12, 24)],
    "|M|": [{"sde_steps": tuple(range(n))} for n in (1, 2, 4, 8)],
    "|Lambda|": [{"granularities": tuple(range(1, n + 1))} for n in (1, 2, 3, 4)],
    "T": [{"num_steps": n} for n in (8, 16, 24, 32)],
    "prompts": [{"prompts_per_step": n} for n in (1, 2, 4, 8)],
}


def measure(changes: dict, rounds: int) -> tuple[int, float]:
    """Passes and median seconds of the sampling of a step."""
    s = recipe("g2rpo", **{**BASE, **changes})
    run = Run(s, "/tmp/flowgrain-growth")
    seconds = []
    for number in range(rounds + 1):
        run._spent.clear()
        run.sample_tree(number + 1)
        seconds.append(run._spent["seconds/sample"])
    return s.prompts_per_step * price(build(s), s).forward_passes, statistics.median(seconds[1:])


def with_processes(count: int, rounds: int) -> float:
    """Median seconds of a step of `count` processes."""
    out = Path(f"/tmp/flowgrain-growth-{count}")
    shutil.rmtree(out, ignore_errors=True)
    words = [f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in BASE.items() if k != "eval_rewards"]
    words += ["eval_rewards=oracle", "prompts_per_step=4", f"max_steps={rounds + 1}", "threads=1", "eval_every=0"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "flowgrain", "train", "g2rpo", "--out", str(out), *words]
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds"] for line in lines[-rounds:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", default="1,2")
    given = parser.parse_args()
    keep_memory()
    print("| what | passes | s | us a pass |\n|---|---|---|---|")
    for axis, points in AXES.items():
        for changes in points:
            passes, seconds = measure(changes, given.rounds)
            value = next(iter(changes.values()))
            shown = len(value) if isinstance(value, tuple) else value
            print(f"| {axis} = {shown} | {passes:,} | {seconds:.2f} | {1e6 * seconds / passes:.0f} |", flush=True)
    for count in map(int, given.processes.split(",")):
        print(f"| processes = {count}, whole step of 4 prompts | | {with_processes(count, given.rounds):.2f} | |", flush=True)


if __name__ == "__main__":
    main()
