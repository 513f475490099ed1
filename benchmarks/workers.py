"""Measure a training step with and without rollout workers.

    python benchmarks/workers.py [--rounds 5] [--steps 4] [--method flow_grpo]

The bundled model is trained with no worker, with one worker and latest parameters, and with one
worker and parameters that are one step older (rollout.max_staleness=1). Each is measured with a
cheap reward and with a reward that computes for a while on the CPU. All use one thread per process.

All sides run in turn in one process. In a round, every side takes --steps steps after a first step
that is not measured, and then its worker finishes, before the next side begins. Median seconds per
step are printed, and the median ratio of the rounds to the side without workers. Needs Ray.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from flowgrain import Prompt, load_config
from flowgrain.training import Trainer
from flowgrain.training.rollouts.checks import import_ray
from flowgrain.training.rollouts.cluster import ray_options

SETTINGS = {
    "sampling.num_steps": 8,
    "sampling.prompts_per_chunk": 1,
    "method.group_size": 8,
    "training.prompts_per_step": 4,
    "training.max_steps": 1_000_000,
    "training.record.prompts": 0,
    "evaluation.every": 0,
    "evaluation.rewards": [],
    "runtime.threads": 1,
}
SIDES = {
    "no workers": {},
    "1 worker, latest parameters": {"rollout.workers": 1},
    "1 worker, 1 step older": {"rollout.workers": 1, "rollout.max_staleness": 1},
}
REWARDS = {"cheap reward": "towers", "slow reward": "workers:laborious"}


def laborious(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # noqa: ARG001
    """The mean brightness, after matrix products that take about 40 ms of a core per image."""
    work = torch.eye(256)
    for _ in range(len(images) * 120):
        work = work @ torch.eye(256)
    return images.mean((1, 2, 3)) * work[0, 0]


def finish(trainer: Trainer) -> None:
    """Wait until the workers of `trainer` have sampled all steps that were sent to them."""
    source = trainer.collector.source
    for pending in getattr(source, "_pending", {}).values():
        source.cluster.results(pending.calls, lambda: None)


def measure(trainer: Trainer, first: int, count: int) -> dict[str, float]:
    """Mean seconds of `count` steps after step `first`, which is not measured, and of stages."""
    trainer.step(first)
    begin = time.perf_counter()
    lines = [trainer.step(first + 1 + i) for i in range(count)]
    seconds = (time.perf_counter() - begin) / count
    finish(trainer)
    stages = {
        name: statistics.mean(line.get(f"seconds/{name}", 0.0) for line in lines)
        for name in ("encode", "sample", "decode", "score", "update")
    }
    return {"step": seconds, **stages}


def compare(method: str, reward: str, rounds: int, steps: int, folder: Path) -> None:
    """Print one table."""
    trainers = {}
    for side, changes in SIDES.items():
        settings = {**SETTINGS, "rewards": [{"name": REWARDS[reward]}], **changes}
        trainers[side] = Trainer(load_config(method, settings), folder / f"{reward}-{side}")
        trainers[side].collector.source.start()
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side, trainer in trainers.items():
            found[side].append(measure(trainer, 1 + number * (steps + 1), steps))
    print(f"\n{method}, {reward}: seconds per step, median of {rounds} rounds of {steps} steps")
    for side, results in found.items():
        pairs = zip(results, found["no workers"], strict=True)
        ratios = [a["step"] / b["step"] for a, b in pairs]
        stages = "  ".join(
            f"{name} {statistics.median(r[name] for r in results):.2f}" for name in results[0]
        )
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{side:28} ratio {statistics.median(ratios):.2f} ({spread})  {stages}", flush=True)
    for trainer in trainers.values():
        trainer.collector.source.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--method", default="flow_grpo")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(arguments.method, {**SETTINGS, "rollout.workers": 1})
    ray = import_ray(config)
    ray.init(**{**ray_options(config), "num_cpus": 2})
    print(f"load average {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        for reward in REWARDS:
            parts = (arguments.method, reward, arguments.rounds, arguments.steps)
            compare(*parts, Path(folder))
    ray.shutdown()


if __name__ == "__main__":
    main()
