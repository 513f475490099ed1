"""Measure what recording the groups of a training step costs.

    python benchmarks/recording.py [section.key=VALUE ...] [--rounds 5] [--steps 2] [--size 512]

The demo is trained with and without training.record, in turn in this process. A round is a few
steps and the wait for the last record. Prints medians over the rounds:

    seconds       seconds of a step without and with recording, and the median ratio of the rounds
    cpu           the same for the CPU time of all threads, which another program does not change
    megabytes     size of the record of a step

--size enlarges the images, whose rewards are then their brightness. The bundled model is much
faster than a model of such images: compare the difference of the CPU times with a step of it.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from flowgrain.config import load_config
from flowgrain.training import Trainer


def brightness(images, prompts):  # noqa: ARG001
    return images.mean((1, 2, 3))


def make(overrides: list[str], size: int | None, recorded: bool) -> Trainer:
    """A run in a temporary directory."""
    prompts = [] if recorded else ["training.record.prompts=0"]
    config = load_config("demo", [*overrides, "evaluation.every=0", *prompts])
    rewards = {"brightness": brightness} if size else None
    trainer = Trainer(config, tempfile.mkdtemp(), rewards=rewards)
    if size:
        decode = trainer.backbone.decode
        trainer.backbone.decode = lambda latents: F.interpolate(decode(latents), (size, size))
    return trainer


def round_of(trainer: Trainer, first: int, steps: int) -> tuple[float, float]:
    """Seconds and CPU seconds of a step, over `steps` steps and the wait for their records."""
    begin, cpu = time.perf_counter(), time.process_time()
    for step in range(first, first + steps):
        trainer.step(step)
    trainer.recorder.finish()
    return (time.perf_counter() - begin) / steps, (time.process_time() - cpu) / steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=None)
    args = parser.parse_args()
    off, on = (make(args.overrides, args.size, recorded) for recorded in (False, True))
    for trainer in (off, on):
        trainer.step(1)  # warm up
        trainer.recorder.finish()
    rounds = []
    for number in range(args.rounds):
        order = (off, on) if number % 2 == 0 else (on, off)
        first = 2 + number * args.steps
        of = {trainer is on: round_of(trainer, first, args.steps) for trainer in order}
        rounds.append((of[False], of[True]))
    result = {}
    for place, name in enumerate(("seconds", "cpu")):
        without, with_ = ([r[side][place] for r in rounds] for side in (0, 1))
        result[name] = {
            "off": round(statistics.median(without), 3),
            "on": round(statistics.median(with_), 3),
            "ratio": round(
                statistics.median(b / a for a, b in zip(without, with_, strict=True)), 4
            ),
        }
    files = [file.stat().st_size for file in (Path(on.out) / "groups").glob("*.zip")]
    result["megabytes"] = round(statistics.median(files) / 1e6, 3)
    result["images"] = args.size or 32
    result["threads"] = torch.get_num_threads()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
