"""Peak memory of a training step by stage, and its comparison with the rehearsal."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from flowgrain.bench.record import Skipped
from flowgrain.config import Config
from flowgrain.planning.gpus import GPUS
from flowgrain.planning.rehearse import rehearse
from flowgrain.settings import SettingsError
from flowgrain.training.timer import StageTimer

MEMORY_LIMIT = 0.1
"""Largest relative difference of the predicted to the measured memory of a stage."""

_STAGES = ("sample", "decode", "score")
"""Phases of a rehearsal that are stages of a step. Other phases after them belong to the update."""
_BEFORE = ("start", "rewards", "encode")
_ABSENT = ("text encoders", "rewards")
"""Kinds of memory that the measured run does not have."""

Prediction = Callable[[Config], Mapping[str, float]]


def rehearsed_bytes(config: Config) -> Mapping[str, float]:
    """The memory that the rehearsal predicts: bytes on the GPU by stage, without text encoders.

    Raises:
        Skipped: the model cannot be rehearsed, such as the tiny models.
    """
    any_gpu = next(iter(GPUS.values()))  # matters for several GPUs only
    try:
        found = rehearse(config, 1, any_gpu)
    except SettingsError as error:
        raise Skipped(str(error)) from error
    predicted: dict[str, float] = {}
    for phase, peak in found.phases.items():
        if phase not in _BEFORE:
            stage = phase if phase in _STAGES else "update"
            size = sum(part for kind, part in peak.kinds.items() if kind not in _ABSENT)
            predicted[stage] = max(predicted.get(stage, 0.0), size)
    return predicted


def compare_memory(
    config: Config, measured: Mapping[str, float], predict: Prediction = rehearsed_bytes
) -> dict[str, Any]:
    """The largest relative difference of the predicted memory of a stage, as a check.

    Args:
        config: settings of the measured run.
        measured: largest bytes by stage.
        predict: the prediction.

    Raises:
        Skipped: nothing was measured, or there is no prediction.
    """
    if not measured:
        raise Skipped("no memory by stage was measured: this needs a GPU, and a step that fits")
    predicted = predict(config)
    errors = {
        stage: predicted[stage] / size - 1
        for stage, size in measured.items()
        if stage in predicted and size
    }
    if not errors:
        raise Skipped(f"the prediction has none of the stages {', '.join(measured)}")
    error = max(map(abs, errors.values()))
    values = {f"{stage}_relative_error": value for stage, value in errors.items()}
    return {"error": error, "limit": MEMORY_LIMIT, **values, "passed": error <= MEMORY_LIMIT}


class MemoryTimer(StageTimer):
    """A stage timer that also records the largest allocated bytes of every stage on a GPU.

    Attributes:
        peak: largest bytes of torch's allocator by stage, with everything that the run holds.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.peak: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """See `StageTimer.measure`."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        with super().measure(stage):
            yield
        if on_gpu:
            size = float(torch.cuda.max_memory_allocated(self.device))
            self.peak[stage] = max(self.peak.get(stage, 0.0), size)
