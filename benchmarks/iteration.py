"""Measure a training step by stage, and compare it with the loop of published code.

    python benchmarks/iteration.py [section.key=VALUE ...] [--rounds 5] [--source g2rpo]
    python benchmarks/iteration.py ... --against section.key=VALUE ...
    python benchmarks/iteration.py ... --memory

Without --against, the other side is the loop of published code for G2RPO, with one prompt. With
--against, it is the same step with other settings, such as runtime.compile=inductor. Both sides run
in turn in one process. Median seconds per prompt are printed, and the median ratio of the rounds.
--memory prints the largest additional memory of every stage instead.

rewards=[iteration:delayed] simulates the latency of a remote reward.
"""

import argparse
import ctypes
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from published import PublishedLoop
from torch import Tensor

from flowgrain.config import load_config
from flowgrain.data import Prompt
from flowgrain.training import Trainer
from flowgrain.training.timer import StageTimer

STAGES = ("sample", "decode", "score", "update")
G2RPO = [
    "sampling.num_steps=16",
    "method.granularities=[1,2,3]",
    "method.group_size=12",
    "training.prompts_per_step=4",
    "rewards=[towers]",
    "evaluation.rewards=[]",
]


def delayed(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # noqa: ARG001
    """The mean brightness, after a delay of 3 ms per image."""
    time.sleep(0.003 * len(images))
    return images.mean((1, 2, 3))


def published_step(loop: PublishedLoop) -> dict[str, float]:
    """Seconds of the stages of the published loop."""
    timer = StageTimer(loop.trainer.device)
    with timer.measure("sample"):
        fans = loop.sample()
    with timer.measure("decode"):
        images = loop.decode(fans)
    with timer.measure("score"):
        advantages = loop.score(fans, images)
    with timer.measure("update"):
        loop.update(fans, advantages)
    return {stage: timer.seconds[f"seconds/{stage}"] for stage in STAGES}


def own_step(trainer: Trainer, step: int) -> dict[str, float]:
    """Seconds per prompt of the stages of a training step."""
    metrics = trainer.step(step)
    count = trainer.config.training.prompts_per_step
    return {stage: metrics[f"seconds/{stage}"] / count for stage in STAGES}


class PeakMemory:
    """The largest memory inside a context, in bytes beyond the memory before it.

    On a GPU it is the memory of torch's allocator, on a CPU the resident memory of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self._stop, self._largest = threading.Event(), 0

    def _current(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return psutil.Process().memory_info().rss

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._largest = max(self._largest, self._current())

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._before = self._current()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self._largest, self._current()) - self._before


class MemoryTimer(StageTimer):
    """A stage timer that also measures the memory of every stage, in megabytes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.megabytes: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        with PeakMemory(self.device) as peak, super().measure(stage):
            yield
        self.megabytes[stage] = max(self.megabytes.get(stage, 0), peak.bytes / 1e6)


def stage_memory(trainer: Trainer) -> dict[str, float]:
    """Largest additional memory of each stage of a step in megabytes. Runs two steps."""
    trainer.step(1)
    timer = MemoryTimer(trainer.device)
    trainer.collector.timer = timer
    trainer.step(2)
    trainer.collector.timer = trainer.timer
    return {stage: round(timer.megabytes[stage], 1) for stage in STAGES}


def other_side(trainer: Trainer, args: argparse.Namespace, words: list[str]) -> Callable:
    """A function of the round that returns the seconds of the other side's stages."""
    if args.against is None:
        loop = PublishedLoop(trainer)
        return lambda _step: published_step(loop)
    config = load_config(args.source, [*words, *args.against])
    rival = Trainer(config, tempfile.mkdtemp())
    return lambda step: own_step(rival, step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--source", default="g2rpo", help="recipe, method, file or run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", nargs="*", help="settings of the other side")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_intermixed_args()
    words = [*(G2RPO if args.source == "g2rpo" else ()), *args.settings]
    trainer = Trainer(load_config(args.source, words), tempfile.mkdtemp())
    if args.memory:
        print(json.dumps({"megabytes": stage_memory(trainer)}))
        return
    other = other_side(trainer, args, words)
    ours, theirs = [], []
    for step in range(1, args.rounds + 2):
        ours.append(own_step(trainer, step))
        theirs.append(other(step))
        sums = sum(ours[-1].values()), sum(theirs[-1].values())
        print(f"{sums[0]:.2f} s per prompt, other side {sums[1]:.2f} s", flush=True)
    for side in (ours, theirs):
        del side[0]  # a warm-up
        for seconds in side:
            seconds["total"] = sum(seconds.values())
    for stage in (*STAGES, "total"):
        a, b = ([seconds[stage] for seconds in side] for side in (ours, theirs))
        ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
        medians = f"{statistics.median(a):8.3f} s {statistics.median(b):8.3f} s"
        print(f"{stage:8} {medians}   ratio {ratio:.2f}")
    threads = torch.get_num_threads()
    print(json.dumps({"rounds": args.rounds, "threads": threads, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
