"""Measure a training step with and without training.graph_memory=all.

    python benchmarks/graph_reuse.py [--rounds 7] [--methods flow_grpo] [--prompts 4]

Both sides run in turn in one process, and the first side alternates. For a full fine-tune and a
LoRA, the script prints median seconds of the rollout (with decoding and rewards), of the update and
of both, and median ratios of the rounds, as wall time and as CPU time of the process. It also
prints forward passes, and the largest number of bytes that are saved for a backward pass at once:
of all graphs of a rollout, or of a micro-batch.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from flowgrain.config import load_config
from flowgrain.heap import retain_freed_memory
from flowgrain.training import Trainer
from flowgrain.training.graphs import graph_bytes
from flowgrain.training.policy_gradient import PolicyGradientLoss
from flowgrain.training.step import update

SETTINGS = {
    "method.updates_per_rollout": 1,
    "rewards": ["oracle"],
    "evaluation.rewards": [],
    "watch.action": "off",
}
PARTS = ("rollout", "update", "both")


def timed(trainer: Trainer, work: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of `work`, its wall time, and the CPU time of the process."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def take_step(trainer: Trainer, step: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The metrics of a step, and wall time and CPU time of its parts."""
    batch, *rollout = timed(trainer, lambda: trainer.collector.collect(step))
    parts = (trainer.method, trainer.policy, trainer.optimizer)
    metrics, *updated = timed(
        trainer, lambda: update(trainer.config, *parts, batch, trainer.sigmas)
    )
    both = [a + b for a, b in zip(rollout, updated, strict=True)]
    metrics["forward_passes"] = batch.rollout.forward_passes
    return metrics, {"rollout": rollout, "update": updated, "both": both}


def saved_bytes(trainer: Trainer) -> int:
    """The largest number of bytes that a step saves for a backward pass at once."""
    batch = trainer.collector.collect(1)
    if trainer.config.training.graph_memory:

        def collect() -> torch.Tensor:
            return torch.zeros(len(trainer.collector.collect(1).rollout.graphs))

        return graph_bytes(trainer.policy.model, collect)
    losses = PolicyGradientLoss(
        trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas
    )
    losses.prepare()
    places = range(len(losses.updates[0].micro_batches))
    return max(
        graph_bytes(trainer.policy.model, lambda place=place: losses.terms(0, place)["loss"])
        for place in places
    )


def compare(method: str, rank: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides of a method, with full fine-tuning (rank 0) or a LoRA."""
    settings = {**SETTINGS, "lora.rank": rank, "runtime.device": args.device}
    settings["training.prompts_per_step"] = args.prompts
    sides = {
        memory: Trainer(
            load_config(method, {**settings, "training.graph_memory": memory}), tempfile.mkdtemp()
        )
        for memory in ("all", 0.0)
    }
    times: dict[Any, list[dict[str, list[float]]]] = {memory: [] for memory in sides}
    passes = {}
    for step in range(1, args.rounds + 2):
        for memory in sides if step % 2 else reversed(sides):
            passes[memory], found = take_step(sides[memory], step)
            if step > 1:  # the first step is a warm-up
                times[memory].append(found)
    result: dict[str, Any] = {"method": method, "lora.rank": rank, "rounds": args.rounds}
    for kind, number in (("wall", 0), ("cpu", 1)):
        for part in PARTS:
            ours, plain = ([t[part][number] for t in times[memory]] for memory in ("all", 0.0))
            result[f"{kind}/{part}"] = {
                "reused": round(statistics.median(ours), 3),
                "plain": round(statistics.median(plain), 3),
                "ratio": round(
                    statistics.median(a / b for a, b in zip(ours, plain, strict=True)), 3
                ),
            }
    names = ("forward_passes", "train_forward_passes", "reused_forward_passes")
    result["passes"] = {
        str(memory): [passes[memory].get(name, 0) for name in names] for memory in sides
    }
    result["saved_megabytes"] = {
        str(memory): round(saved_bytes(trainer) / 1e6, 1) for memory, trainer in sides.items()
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", default="flow_grpo,mixgrpo,g2rpo")
    parser.add_argument("--ranks", default="0,32", help="ranks of the LoRA. 0: full fine-tune")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a step")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    retain_freed_memory()  # as in `flowgrain train`
    for method in args.methods.split(","):
        for rank in map(int, args.ranks.split(",")):
            print(json.dumps(compare(method, rank, args)), flush=True)
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
