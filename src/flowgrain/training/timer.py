"""Time per stage of a training step."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageTimer:
    """Seconds by stage, under the names that metrics use ("seconds/sample")."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def reset(self) -> None:
        """Remove the times of the previous step."""
        self.seconds.clear()

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time inside this context to `stage`.

        On a GPU, wait until the work that was started inside is finished.
        """
        begin = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[f"seconds/{stage}"] += time.perf_counter() - begin
