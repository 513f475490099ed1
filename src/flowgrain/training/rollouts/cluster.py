"""The Ray cluster on which rollout workers run. See `checks.import_ray`."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowgrain.settings import SettingsError, one_line
from flowgrain.training.errors import RunStopped
from flowgrain.training.rollouts.checks import import_ray
from flowgrain.training.rollouts.worker import RolloutRequest, RolloutWorker, worker_settings

if TYPE_CHECKING:
    from flowgrain.config.schema import Config
    from flowgrain.training.scored_tree import ScoredTree

log = logging.getLogger(__name__)

Call = Any
"""Reference to the future result of a worker."""

_RETRIES = 3
"""Times that a share is repeated on a restarted worker, before the run stops."""
_POLL_SECONDS = 0.25
"""Time between two checks for signals."""
_START_SECONDS = 60.0
"""Time after which a message says that workers have not started."""


class Cluster:
    """Rollout workers on Ray. Ray restarts a worker that died, and repeats its share.

    Args:
        config: settings of the run.
        device: device of the training process. On a GPU, every worker gets a GPU of its own.

    Attributes:
        processes: process numbers of the workers when they started.

    Raises:
        SettingsError: the cluster does not exist or is too small, or a worker cannot be started.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.ray = import_ray(config)
        self._owned = not self.ray.is_initialized()
        self.processes: list[int] = []
        gpus = int(device.type == "cuda")
        if self._owned:
            self._connect(config, gpus)
        elif config.rollout.address is not None:
            log.warning(
                "Ray is already initialized in this process, and the rollout workers run there. "
                "rollout.address=%s is not used.",
                config.rollout.address,
            )
        try:
            self._check_size(config, gpus)
            self.workers = self._start(config, gpus)
        except BaseException:
            self.close()
            raise

    def _connect(self, config: Config, gpus: int) -> None:
        rollout = config.rollout
        options, environment = ray_options(config), dict[str, str]()
        if gpus and rollout.address is None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            others = other_gpus(visible, torch.cuda.device_count())
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(others)
            options["num_gpus"] = len(others)
        try:
            with _kept_signals(), _environment(environment):
                self.ray.init(**options)
        except Exception as error:  # Ray also raises plain exceptions
            raise SettingsError(_not_reached(config, error)) from error

    def _check_size(self, config: Config, gpus: int) -> None:
        """Check that the cluster has a CPU, and if needed a GPU, for every worker."""
        workers, found = config.rollout.workers, self.ray.cluster_resources()
        for kind, needed in (("CPU", 1), ("GPU", gpus)):
            count = int(found.get(kind, 0))
            if needed and count < workers:
                place = "besides the GPU that trains" if kind == "GPU" else "in the cluster"
                raise SettingsError(
                    f"rollout.workers={workers}: every worker needs a {kind}, and Ray found "
                    f"{count} {place}. Use at most {count} workers, or a larger cluster "
                    "(rollout.address)."
                )

    def _start(self, config: Config, gpus: int) -> list[Any]:
        actor = self.ray.remote(RolloutWorker).options(
            num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=_RETRIES
        )
        settings, threads = worker_settings(config), torch.get_num_threads()
        workers = [actor.remote(settings, threads) for _ in range(config.rollout.workers)]
        processes = [worker.process.remote() for worker in workers]
        ready, missing = self.ray.wait(
            processes, num_returns=len(processes), timeout=_START_SECONDS
        )
        if missing:  # others may use the cluster
            log.warning(
                "%d of %d rollout workers have started. Waiting for the others. Free in the Ray "
                "cluster: %s.",
                *(len(ready), len(processes), _free(self.ray.available_resources())),
            )
        try:
            self.processes = self.ray.get(processes)
        except self.ray.exceptions.RayError as error:
            raise SettingsError(
                f"rollout.workers={config.rollout.workers}: a worker could not be started: "
                f"{_reason(error)}. A worker needs flowgrain, the plugins and the files of the "
                "model and the rewards on its machine."
            ) from error
        return workers

    def submit(
        self, requests: Sequence[RolloutRequest], parameters: Mapping[str, Tensor]
    ) -> list[Call]:
        """Start the sampling of `requests`, one for each worker, with `parameters` by name."""
        shared = self.ray.put(dict(parameters))  # one transfer to each machine
        pairs = zip(self.workers, requests, strict=False)
        return [worker.sample.remote(request, shared) for worker, request in pairs]

    def results(self, calls: list[Call], check: Callable[[], None]) -> list[tuple[ScoredTree, int]]:
        """Wait for `calls`. Calls `check` several times a second, which may raise an exception.

        Raises:
            RunStopped: a worker raised an error, or died more often than shares are repeated.
        """
        found: dict[Call, tuple[ScoredTree, int]] = {}
        while len(found) < len(calls):
            check()
            waiting = [call for call in calls if call not in found]
            ready, _ = self.ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_SECONDS)
            try:
                found |= zip(ready, self.ray.get(ready), strict=True)
            except self.ray.exceptions.RayError as error:
                raise RunStopped(f"a rollout worker failed: {_reason(error)}") from error
        return [found[call] for call in calls]

    def close(self) -> None:
        """End the workers, and Ray if this object started it."""
        for worker in getattr(self, "workers", []):
            self.ray.kill(worker)
        self.workers = []
        if self._owned and self.ray.is_initialized():
            with _kept_signals():
                self.ray.shutdown()


def ray_options(config: Config) -> dict[str, Any]:
    """Arguments of `ray.init`: the cluster of rollout.address, or a new one on this machine."""
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if config.rollout.address is not None:
        return options | {"address": config.rollout.address}
    # Without "local", Ray would connect to a cluster of RAY_ADDRESS or of this machine.
    local = {"address": "local", "num_cpus": config.rollout.workers, "include_dashboard": False}
    return options | local


def other_gpus(visible: str | None, count: int) -> list[str]:
    """The GPUs of this machine that do not train: all except the first.

    Args:
        visible: value of CUDA_VISIBLE_DEVICES, or None.
        count: number of visible GPUs.
    """
    numbers = [str(i) for i in range(count)] if visible is None else visible.split(",")[:count]
    return [number.strip() for number in numbers][1:]


def _free(resources: Mapping[str, float]) -> str:
    """Numbers of CPUs and GPUs, such as "2 CPUs and 0 GPUs"."""
    return " and ".join(f"{resources.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))


def _not_reached(config: Config, error: Exception) -> str:
    address = config.rollout.address
    if address is None:
        return (
            f"rollout.workers={config.rollout.workers}: Ray could not be started on this machine "
            f"({one_line(error)}). Repair this, or use rollout.workers=0."
        )
    return (
        f"rollout.address={address}: Ray does not answer ({one_line(error)}). Use the address that "
        "ray start --head prints on the first machine of the cluster."
    )


def _reason(error: Exception) -> str:
    """The last line of an error of Ray, which names the error in the worker."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return one_line(f"{type(cause).__name__}: {cause}")
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[-1] if lines else type(error).__name__)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside this context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Restore the signal handlers, which Ray replaces, after this context."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not the main thread
            for number, handler in before.items():
                signal.signal(number, handler)
