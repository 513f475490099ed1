"""A rehearsal of the first training step at full size, without GPUs and without weights.

The step runs in another process on fake tensors, see `flowgrain.planning.rehearsal`.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flowgrain.config.rollout import without_workers
from flowgrain.config.schema import Config
from flowgrain.distributed.threads import available_cores
from flowgrain.distributed.world import GPUS_PER_MACHINE
from flowgrain.models.published import required_config
from flowgrain.planning.gpus import Gpu
from flowgrain.planning.rehearsal.depth import Depth, combine
from flowgrain.planning.rehearsal.ledger import Peak
from flowgrain.planning.rehearsal.step import FIRST, LATER, OPTIMIZER, Measurement
from flowgrain.settings import SettingsError
from flowgrain.training.copies import REPLICA_SHARE
from flowgrain.training.memory import USABLE_SHARE
from flowgrain.training.sizes import size_before_loading

_PROCESSES = 2
"""Largest number of processes that share the transformers of a rehearsal."""
PHASES = ("rewards", "encode", "sample", "decode", "score", "update", FIRST, LATER, OPTIMIZER)
"""Phases of a step, in order. A rehearsal also has a start, in which it builds all parts."""


class RehearsalError(RuntimeError):
    """The training step raised an error.

    Attributes:
        details: the traceback.
    """

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message)
        self.details = details


@dataclass(frozen=True)
class Rehearsal:
    """The first training step on one of several GPUs.

    Attributes:
        config: settings that were rehearsed.
        compiled: whether the run compiles its blocks. The rehearsal does not.
        gpus: number of GPUs.
        measured: memory, FLOPs and traffic of a rank.
        seconds: how long the rehearsal took.
    """

    config: Config
    compiled: bool
    gpus: int
    measured: Measurement
    seconds: float

    @property
    def phases(self) -> dict[str, Peak]:
        """The peak of every phase of the step, in order."""
        peaks = self.measured.peaks
        names = sorted(set(peaks) - {"start"}, key=PHASES.index)
        return {name: peaks[name] for name in names}

    @property
    def peak(self) -> tuple[str, Peak]:
        """The phase that needs most memory, and its peak."""
        return max(self.phases.items(), key=lambda item: item[1].total)

    @property
    def batch_of_peak(self) -> tuple[str, int] | None:
        """The setting that determines the batch of the peak, and its value. None if none does."""
        config, sampling = self.config, self.config.sampling
        rows = ("training.micro_batch_size", config.micro_batch_size)
        batches = {
            "sample": ("sampling.batch_size", sampling.batch_size),
            "decode": (
                "sampling.decode_batch_size",
                sampling.decode_batch_size or sampling.batch_size,
            ),
            FIRST: rows,
            LATER: rows,
        }
        return batches.get(self.peak[0])

    @property
    def peak_if_encoded(self) -> float:
        """Bytes at the peak of a run that loads no text encoders, because all prompts are encoded.

        `flowgrain encode` does this before the run.
        """
        return max(
            peak.total - peak.kinds.get("text encoders", 0.0)
            for name, peak in self.phases.items()
            if name != "encode"
        )

    def fits(self, memory: float) -> bool:
        """Whether the step leaves 10% of `memory` bytes for fragmentation and libraries."""
        return self.peak[1].total <= USABLE_SHARE * memory

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, in bytes and FLOPs."""
        phase, peak = self.peak
        batch = self.batch_of_peak
        of_step = asdict(self.measured)
        return {
            "gpus": self.gpus,
            "peak": {
                "phase": phase,
                "batch": dict([batch]) if batch else {},
                "total": peak.total,
                "kinds": peak.kinds,
            },
            "peak_if_encoded": self.peak_if_encoded,
            "phases": {name: found.kinds for name, found in self.phases.items()},
            **{name: of_step[name] for name in of_step if name != "peaks"},
            "seconds": self.seconds,
        }


class _Worker:
    """A process that measures steps, see `rehearsal.worker`."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile(  # noqa: SIM115  (closed in `close`)
            "w+", encoding="utf-8", errors="replace"
        )
        # The same package as in this process, whatever the working directory.
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flowgrain.planning.rehearsal.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "OMP_NUM_THREADS": "1",
            },
        )

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def send(self, request: dict[str, Any]) -> None:
        """Send a request. The process works on it."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `receive` then reports the reason
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for the answer to the request.

        Raises:
            SettingsError: this configuration cannot be rehearsed.
            RehearsalError: the step raised an error, or the process ended.
        """
        stdout = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise RehearsalError(
                f"the process of the rehearsal ended with exit code {code}, for example because "
                "the memory was not sufficient",
                self._errors.read(),
            )
        answer: dict[str, Any] = json.loads(line)
        if "settings_error" in answer:
            raise SettingsError(answer["settings_error"])
        if "error" in answer:
            raise RehearsalError(answer["error"], answer["traceback"])
        return answer


class Rehearser:
    """Processes for rehearsals. Starting one takes seconds, so that rehearsals can share them.

    Use it as a context manager.
    """

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Rehearser":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def rehearse(self, config: Config, gpus: int, gpu: Gpu, depth: Depth = "lines") -> Rehearsal:
        """Rehearse the first training step of `config` on `gpus` GPUs.

        Args:
            config: settings of the run.
            gpus: number of GPUs.
            gpu: kind of the GPUs. Only runtime.rollout_weights=auto depends on it.
            depth: which transformers are measured. All blocks ("full") take minutes.

        Raises:
            SettingsError: this configuration cannot be rehearsed.
            RehearsalError: the step raised an error.
        """
        begin = time.perf_counter()
        compiled, config = config.runtime.compile is not None, prepared(config, gpus, gpu)
        count = min(_PROCESSES, available_cores()) if depth == "lines" else 1
        while len(self._workers) < count:
            self._workers.append(_Worker())
        request = {"config": config.to_dict(), "gpus": gpus, "depth": depth, "of": count}
        try:
            for number, worker in enumerate(self._workers[:count]):
                worker.send({**request, "share": number})
            answers = [worker.receive() for worker in self._workers[:count]]
        except (SettingsError, RehearsalError):
            self._close()  # others may still work on the request
            raise
        parts = sorted((part for answer in answers for part in answer["parts"]), key=_number)
        measured = combine(
            [_measurement(part["measurement"]) for part in parts],
            [part["factor"] for part in parts],
        )
        return Rehearsal(config, compiled, gpus, measured, time.perf_counter() - begin)


def _number(part: dict[str, Any]) -> int:
    """The number of a transformer among those that are measured."""
    number: int = part["number"]
    return number


def _measurement(values: dict[str, Any]) -> Measurement:
    peaks = {name: Peak(peak["kinds"]) for name, peak in values["peaks"].items()}
    return Measurement(**{**values, "peaks": peaks})


def rehearse(config: Config, gpus: int, gpu: Gpu, depth: Depth = "lines") -> Rehearsal:
    """Rehearse the first training step of `config` on `gpus` GPUs.

    Arguments and errors are those of `Rehearser.rehearse`.
    """
    with Rehearser() as process:
        return process.rehearse(config, gpus, gpu, depth)


def _nearest(gpus: int, degree: int) -> list[int]:
    """The numbers of GPUs next to `gpus` that groups of `degree` ranks and machines divide."""
    whole = math.lcm(degree, GPUS_PER_MACHINE)
    valid = [
        *range(degree, GPUS_PER_MACHINE + 1, degree),  # within a machine
        *range(whole, gpus + whole + 1, whole),  # whole machines
    ]
    below, above = ([n for n in valid if n < gpus], [n for n in valid if n > gpus])
    return [*below[-1:], *above[:1]]


def prepared(config: Config, gpus: int, gpu: Gpu) -> Config:
    """`config` as it is rehearsed: on a GPU, without compilation, prompts or trackers.

    Raises:
        SettingsError: a setting or the number of GPUs cannot be rehearsed, or the size of the model
            is not known.
    """
    if gpus > GPUS_PER_MACHINE and gpus % GPUS_PER_MACHINE:
        raise SettingsError(
            f"--gpus {gpus}: a rehearsal assumes machines with {GPUS_PER_MACHINE} GPUs. Use at "
            f"most {GPUS_PER_MACHINE}, or a multiple of {GPUS_PER_MACHINE}."
        )
    degree = config.runtime.context_parallel
    if gpus % degree:
        raise SettingsError(
            f"--gpus {gpus}: runtime.context_parallel={degree} needs a multiple of {degree}. Use "
            f"--gpus {' or '.join(map(str, _nearest(gpus, degree)))}."
        )
    for name, section in (
        ("sampling", config.sampling),
        ("sampling.explore", config.sampling.explore),
    ):
        for setting, exact in (("tail_weights", "same"), ("tail_cache", "none")):
            value = getattr(section, setting)
            if value != exact:
                raise SettingsError(
                    f"{name}.{setting}={value}: approximate steps cannot be rehearsed. Use "
                    f"{name}.{setting}={exact} for the rehearsal."
                )
    required_config(config.model, "transformer")  # raises an error before processes are started
    changes: dict[str, Any] = {"runtime.compile": None, "runtime.trackers": []}
    dtype = "bfloat16" if config.runtime.dtype == "auto" else config.runtime.dtype
    changes["runtime.dtype"] = dtype
    if config.runtime.rollout_weights == "auto" and gpus > 1:
        size = size_before_loading(config)
        if size is None:
            raise SettingsError(
                f"model.path={config.model.path}: the size of this model is not known. Give a "
                "local directory of a diffusers pipeline."
            )
        fits = getattr(torch, dtype).itemsize * size.transformer < REPLICA_SHARE * gpu.memory
        changes["runtime.rollout_weights"] = "replica" if fits else "sharded"
    return without_workers(config).with_changes(changes)
