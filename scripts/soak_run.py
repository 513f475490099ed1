"""The run of the soak: its settings, its faulty reward and reward server, and its processes."""

import contextlib
import json
import os
import random
import resource
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from flowgrain.config import Config
from flowgrain.data import Prompt
from flowgrain.models.quiet import quiet_libraries
from flowgrain.rewards.remote import Remote
from flowgrain.rewards.server import reward_app
from flowgrain.rewards.shapes import Oracle
from flowgrain.settings import SettingsError
from flowgrain.training import Interrupted, RunStopped, Trainer
from flowgrain.training.checkpoint import CheckpointError, checkpoints

NUM_EVALUATED = 8
SETTINGS = {
    "sampling.num_steps": 6,
    "method.granularities": [1, 2],
    "method.group_size": 4,
    "optimizer.learning_rate": 1e-4,
    "training.prompts_per_step": 4,
    "training.checkpoint_every": 1,
    "training.keep_checkpoints": 3,
    "training.ema_decay": 0.9,
    "training.max_failed_rewards": 0.0,
    "evaluation.every": 5,
    "evaluation.num_prompts": NUM_EVALUATED,
    "evaluation.rewards": [],
    "runtime.threads": 1,
}
FINISHED, STOPPED, INTERRUPTED, REFUSED = 0, 3, 4, 5
"""Exit codes of a process of the run."""


def free_port() -> int:
    """A free port below the range from which the system assigns ports, so that it stays free."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port
    raise OSError("none of 100 ports is free")


def serve(port: int) -> None:
    """Run the reward server, in a separate process."""
    import uvicorn

    torch.set_num_threads(1)
    app = reward_app({"oracle": Oracle()})
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


class Server:
    """A reward server that can be killed and started again at the same address."""

    def __init__(self, context: ForkServerContext) -> None:
        self.context, self.port = context, free_port()
        self.start()
        self.wait()

    def wait(self) -> None:
        """Wait until the server accepts connections.

        Raises:
            OSError: it does not start within a minute.
        """
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.1)
        raise OSError("the reward server does not start")

    def start(self) -> None:
        self.process = self.context.Process(target=serve, args=(self.port,), daemon=True)
        self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def memory(self) -> int:
        """Resident memory in bytes, once it accepts connections."""
        self.wait()
        return int(psutil.Process(self.process.pid).memory_info().rss)


class FaultyReward:
    """The oracle behind a reward server, with a fault at one call.

    Evaluations use a local oracle, because a failed evaluation does not stop a run. Every call
    writes the memory of the process to a file.

    Args:
        port: port of the reward server.
        fault: name of a fault. Only raise, nan and stall have an effect here.
        at_call: number of the call with the fault, from 1.
        memory: file for the resident memory in bytes.
    """

    def __init__(self, port: int, fault: str, at_call: int, memory: Path) -> None:
        self.local = Oracle()
        self.remote = Remote(f"http://127.0.0.1:{port}", "oracle", request_size=256)
        self.fault, self.at_call, self.memory, self.calls = fault, at_call, memory, 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        with self.memory.open("a") as file:
            file.write(f"{psutil.Process().memory_info().rss}\n")
        if len(images) <= NUM_EVALUATED:
            return self.local(images, prompts)
        self.calls += 1
        fault = self.fault if self.calls == self.at_call else "none"
        if fault == "raise":
            raise OSError("the reward raises")
        if fault == "stall":
            time.sleep(1.0)
        scores = self.remote(images, prompts)
        if fault == "nan":
            scores[0] = float("nan")
        return scores


@dataclass(frozen=True)
class Run:
    """A run on disk. Its messages and its memory are in files next to its directory."""

    folder: Path
    config: Config

    @property
    def messages(self) -> Path:
        return self.folder.with_suffix(".messages")

    @property
    def memory(self) -> Path:
        return self.folder.with_suffix(".memory")

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics without times. A line that is still being written is left out."""
        file = self.folder / "metrics.jsonl"
        lines: list[dict[str, Any]] = []
        for text in file.read_text().splitlines() if file.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                values = json.loads(text)
                lines.append({k: v for k, v in values.items() if not k.startswith("seconds")})
        return lines

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.metrics()), default=0)

    @property
    def finished(self) -> bool:
        """Whether the last step was trained and saved."""
        last = self.config.training.max_steps
        return any(path.name == f"step-{last:06d}" for path in self.checkpoints())

    def cut_last_line(self) -> None:
        """Remove the second half of the last line of metrics.jsonl."""
        file = self.folder / "metrics.jsonl"
        content = file.read_bytes() if file.exists() else b""
        start = content.rstrip(b"\n").rfind(b"\n") + 1
        if content:
            os.truncate(file, start + (len(content) - start) // 2)

    def checkpoints(self) -> list[Path]:
        return checkpoints(self.folder / "checkpoints")


def train(run: Run, port: int, fault: str, at_call: int, environment: dict[str, str]) -> None:
    """Train from the last checkpoint. This is a process of the run.

    Args:
        run: the run.
        port: port of the reward server.
        fault: the fault of this process.
        at_call: number of the reward call with the fault; for "disk" it determines the limit.
        environment: variables that torchrun would set.
    """
    os.environ |= environment
    quiet_libraries()
    if fault == "disk":  # writing beyond the limit fails, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = 100_000 + 10_000 * at_call
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    reward = FaultyReward(port, fault, at_call, run.memory)
    trainer = Trainer(run.config, run.folder, rewards={"oracle": reward})
    try:
        trainer.resume()
        trainer.train()
    except SettingsError as error:
        locked = "another process trains in this directory" in str(error)
        os._exit(REFUSED if locked else 1)
    except Interrupted:
        os._exit(INTERRUPTED)
    except (RunStopped, CheckpointError) as error:
        with run.messages.open("a") as file:
            file.write(f"{error}\n")
        os._exit(STOPPED)
    os._exit(FINISHED)


class Processes:
    """The processes of a run. If one process ends, the others are ended too, as with torchrun.

    Args:
        context: starts the processes.
        run: the run.
        port: port of the reward server.
        size: number of processes.
        fault: fault of the process `faulty`. "disk" is a fault of all processes.
        at_call: see `train`.
        faulty: rank of the process with the fault.
    """

    def __init__(
        self,
        context: ForkServerContext,
        run: Run,
        port: int,
        size: int = 1,
        fault: str = "none",
        at_call: int = 0,
        faulty: int = 0,
    ) -> None:
        self.faulty, self.all = faulty, []
        group = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(size):
            environment = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
            own = fault if rank == faulty or fault == "disk" else "none"
            arguments = (run, port, own, at_call, environment)
            self.all.append(context.Process(target=train, args=arguments))
            self.all[-1].start()

    def alive(self) -> bool:
        """Whether the faulty process is alive."""
        return self.all[self.faulty].is_alive()

    def signal(self, number: int, everyone: bool) -> None:
        """Send a signal to all processes, or to the faulty one."""
        for process in self.all if everyone else [self.all[self.faulty]]:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self) -> int:
        """Wait until all processes have ended. Returns the exit code of the faulty one."""
        while all(process.is_alive() for process in self.all):
            time.sleep(0.05)
        for process in self.all:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
        code = self.all[self.faulty].exitcode
        assert code is not None
        return code
