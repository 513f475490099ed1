"""A whole training step by stage, beside the same step as published code writes it; and what each stage holds at most.

    python benchmarks/iteration.py [key=value ...] [--rounds 5] [--against key=value ...] [--memory] [--recipe demo]

Without --against the other side is the published loop (G2RPO alone), of one prompt; with it, the same step under other settings
(compile=inductor, say). Both run by turns in one process; seconds a prompt, medians, and the ratio within each round.
rewards=iteration:distant is a reward that waits, as one behind a network does.
"""

import argparse
import ctypes
import json
import statistics
import threading
import time

import psutil
import torch
from published import Published

from flowgrain import recipe
from flowgrain.distributed.process import keep_memory
from flowgrain.training.trainer import Run

STAGES = ("sample", "decode", "score", "update")
USUAL = {
    "granularities": "1,2,3",
    "num_steps": 16,
    "group_size": 12,
    "prompts_per_step": 4,
    "rewards": "towers",
    "eval_rewards": (),
}


def distant(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:  # noqa: ARG001
    """The mean brightness, after a wait of 3 ms an image."""
    time.sleep(0.003 * len(images))
    return images.mean((1, 2, 3))


def published_step(loop: Published) -> dict[str, float]:
    """Seconds of its stages."""
    times, spent = [time.perf_counter()], {}

    def done(stage: str) -> None:
        if loop.run.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        spent[stage] = times[-1] - times[-2]

    found = loop.sample()
    done("sample")
    images = loop.decode(found)
    done("decode")
    advantage = loop.score(found, images)
    done("score")
    loop.update(found, advantage)
    done("update")
    return spent


def own_step(run: Run, number: int) -> dict[str, float]:
    metrics = run.step(number)
    return {stage: metrics[f"seconds/{stage}"] / run.settings.prompts_per_step for stage in STAGES}


class Peak:
    """The most memory held inside, in bytes beyond what was held before: the allocator's on a GPU, resident pages on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def _held(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else psutil.Process().memory_info().rss

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before, self.most, self.over = self._held(), 0, threading.Event()

        def watch() -> None:
            while not self.over.wait(0.002):
                self.most = max(self.most, self._held())

        self.thread = threading.Thread(target=watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.bytes = max(self.most, self._held()) - self.before


def peaks(run: Run) -> dict[str, float]:
    """Megabytes that each stage of a step holds at most, beyond what was there when it began."""
    from contextlib import contextmanager

    run.step(1)
    found: dict[str, float] = {}
    timed = run._timed

    @contextmanager
    def weighed(stage: str):
        with Peak(run.device) as peak, timed(stage):
            yield
        found[stage] = max(found.get(stage, 0), peak.bytes / 1e6)

    run._timed = weighed
    run.step(2)
    return {stage: found[stage] for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--recipe", default="g2rpo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", nargs="*")
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_intermixed_args()

    def values(words: list[str]) -> dict[str, str]:
        return dict(word.split("=", 1) for word in words)

    usual = USUAL if given.recipe == "g2rpo" else {}
    run = Run(recipe(given.recipe, **{**usual, **values(given.settings)}), "/tmp/flowgrain-iteration")
    if given.memory:
        print(json.dumps({"megabytes": {k: round(v, 1) for k, v in peaks(run).items()}}))
        return
    keep_memory()
    if given.against is None:
        loop = Published(run)
        other = lambda _: published_step(loop)  # noqa: E731
    else:
        rival = Run(recipe(given.recipe, **{**usual, **values(given.settings), **values(given.against)}), "/tmp/flowgrain-rival")
        other = lambda number: own_step(rival, number)  # noqa: E731
    ours, theirs = [], []
    for number in range(1, given.rounds + 2):
        ours.append(own_step(run, number))
        theirs.append(other(number))
        print(f"{sum(ours[-1].values()):.2f} s a prompt, the other side {sum(theirs[-1].values()):.2f}", flush=True)
    ours, theirs = ours[1:], theirs[1:]  # the first round warms up
    for stage in (*STAGES, "all"):
        a, b = ([sum(one.values()) if stage == "all" else one[stage] for one in side] for side in (ours, theirs))
        ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
        print(f"{stage:8} {statistics.median(a):8.3f} s {statistics.median(b):8.3f} s   ratio {ratio:.2f}")
    print(json.dumps({"rounds": given.rounds, "threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
