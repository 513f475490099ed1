"""Settings that fit on a number of GPUs: `flowgrain rehearse --search`.

Layouts are tried in a fixed order, usually the fastest first, until one fits.

Memory grows with the rows of a call by the same amount for every row. Rehearsals with one and two
rows give a line, and the line gives the largest number of rows that fits.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flowgrain.config.schema import Config
from flowgrain.planning.forecast import forecast
from flowgrain.planning.gpus import Gpu
from flowgrain.planning.plan import prompt_cost
from flowgrain.planning.rehearsal.step import FIRST, LATER
from flowgrain.planning.rehearse import Rehearsal, RehearsalError, Rehearser
from flowgrain.training.memory import USABLE_SHARE

NUMBERS = (1, 2, 4, 8, 16)
"""Numbers of GPUs that are searched."""
_LORA = {"lora.rank": 32, "optimizer.learning_rate": 1e-4}
_MOST_ROWS = 64
"""Largest batch that is proposed. Larger ones are rarely faster."""


@dataclass(frozen=True)
class Proposal:
    """Settings for a number of GPUs.

    Attributes:
        gpus: number of GPUs.
        fits: whether anything fits. Otherwise the settings are those that need least memory.
        settings: overrides "section.key=value".
        memory: largest need of a GPU in bytes.
        seconds: forecast of a step, without rewards.
        images_per_second: images of a step over all GPUs, divided by its seconds.
    """

    gpus: int
    fits: bool
    settings: list[str]
    memory: float
    seconds: float
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def proposals(
    config: Config,
    gpu: Gpu,
    numbers: tuple[int, ...] = NUMBERS,
    progress: Callable[[str], None] | None = None,
) -> list[Proposal]:
    """Settings for each number of GPUs: the first layout that fits, with the largest batches.

    A full fine-tune is proposed as LoRA where it does not fit. Settings whose step raises an error
    are left out.

    Args:
        config: settings of the run.
        gpu: kind of the GPUs.
        numbers: numbers of GPUs.
        progress: called with a line of text before every rehearsal, and for every error.

    Raises:
        SettingsError: this configuration cannot be rehearsed.
        RehearsalError: all settings raise an error for a number of GPUs. The error is the last one.
    """
    note = progress or (lambda _: None)
    with Rehearser() as process:
        return [_first_that_fits(process, config, gpu, gpus, note) for gpus in numbers]


def _first_that_fits(
    process: Rehearser, config: Config, gpu: Gpu, gpus: int, progress: Callable[[str], None]
) -> Proposal:
    """The first candidate that fits on `gpus` GPUs, or the one that needs least memory."""
    tried: list[Proposal] = []
    failure: RehearsalError | None = None
    for changes in _candidates(config, gpus):
        label = f"{gpus} GPUs: {' '.join(_written(changes))}"
        progress(label)
        try:
            tried.append(_largest(process, config, changes, gpus, gpu))
        except RehearsalError as error:
            progress(f"{label}: {error}")
            failure = error
            continue
        if tried[-1].fits:
            return tried[-1]
    if failure is not None and not tried:
        raise failure
    return min(tried, key=lambda proposal: proposal.memory)


def _candidates(config: Config, gpus: int) -> Iterator[dict[str, Any]]:
    """Changes of `config`, usually the fastest first."""
    lora = [{}] if config.lora.rank else [{}, _LORA]
    replicas: list[dict[str, Any]] = [{}]
    if gpus > 1:
        replicas = [{"runtime.rollout_weights": w} for w in ("replica", "sharded")]
    for kind, layout, checkpointing in itertools.product(lora, replicas, (False, True)):
        reduction = (
            {} if config.lora.rank or kind else {"runtime.gradient_reduction": "micro_batch"}
        )
        yield {**kind, **layout, "model.gradient_checkpointing": checkpointing, **reduction}


def _largest(
    process: Rehearser, config: Config, changes: dict[str, Any], gpus: int, gpu: Gpu
) -> Proposal:
    """The proposal with as many rows as fit, for one layout."""

    def rehearsed(*rows: int) -> Rehearsal:
        return process.rehearse(config.with_changes(changes | _rows(*rows)), gpus, gpu)

    rows, final = (1, 1, 1), rehearsed(1, 1, 1)
    if final.fits(gpu.memory):
        two, usable = rehearsed(2, 2, 2), USABLE_SHARE * gpu.memory
        phases = (("sample",), (FIRST, LATER), ("decode",))
        sampling, training, decoding = (_most(final, two, of, usable) for of in phases)
        rows = (sampling, training, decoding)
        final = rehearsed(*rows)
    changes = changes | _rows(*rows)
    seconds = forecast(final, gpu).total
    # Repeated prompts, if they do not divide evenly among the GPUs, do not count.
    images = config.training.prompts_per_step * prompt_cost(config).decodes
    fits = final.fits(gpu.memory)
    memory = final.peak[1].total
    return Proposal(gpus, fits, _written(changes), memory, seconds, images / max(seconds, 1e-9))


def _most(one: Rehearsal, two: Rehearsal, phases: tuple[str, ...], usable: float) -> int:
    """The largest number of rows with which `phases` fit into `usable` bytes. One row fits."""
    totals = [
        max((found.phases[p].total for p in phases if p in found.phases), default=0.0)
        for found in (one, two)
    ]
    each = totals[1] - totals[0]
    return _MOST_ROWS if each <= 0 else min(_MOST_ROWS, 1 + int((usable - totals[0]) / each))


def _rows(sampling: int, training: int, decoding: int) -> dict[str, int]:
    return {
        "sampling.batch_size": sampling,
        "training.micro_batch_size": training,
        "sampling.decode_batch_size": decoding,
    }


def _written(changes: dict[str, Any]) -> list[str]:
    return [f"{path}={str(value).lower()}" for path, value in changes.items()]
