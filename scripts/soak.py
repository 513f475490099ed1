"""Train with injected faults, and check that the result equals an undisturbed run, bit for bit.

    python scripts/soak.py --minutes 60 [--processes 2] [--seed 0] [--out runs/soak]

The bundled model is trained twice with the same settings and a reward server: once undisturbed, and
once while a seeded schedule injects faults and hostile clients abuse the reward server. Every fault
must either have no effect or end the run with a message, and the run is then resumed. At the end,
metrics and checkpoints must be equal, and the memory of the run and of the server must not grow.

Faults:
    kill      SIGKILL to all processes of the run
    rank      SIGKILL to one of several processes
    stop      SIGTERM to one process
    raise     the reward raises an error
    nan       the reward returns NaN for an image
    stall     the reward takes a second longer
    server    the reward server is killed and started again
    peer      the reward server is replaced for seconds by one that hangs, drips or answers badly
    disk      files may not grow beyond a limit, as on a full disk
    truncate  SIGKILL, and the last checkpoint is truncated
    lock      a second resume in the same directory, which must be refused
    metrics   SIGKILL, and the last line of metrics.jsonl is truncated
"""

import argparse
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
from safetensors.torch import load_file
from soak_peers import hostile_clients, hostile_server
from soak_run import FINISHED, INTERRUPTED, REFUSED, SETTINGS, STOPPED, Processes, Run, Server
from torch import Tensor

from flowgrain.config import load_config

FAULTS = (
    *("kill", "rank", "stop", "raise", "nan", "stall", "server", "disk", "truncate"),
    *("lock", "metrics", "peer"),
)
KILLS = ("kill", "truncate", "lock", "metrics")
"""Faults that end with SIGKILL to all processes."""
PRELOAD = (
    "soak_run",
    "soak_peers",
    "flowgrain.models.shapes",
    "diffusers.training_utils",
    "uvicorn",
    "fastapi",
)
"""Slow imports that the fork server does once for all processes."""

EXPECTED = {
    "none": (FINISHED,),
    "stall": (FINISHED,),
    "kill": (-signal.SIGKILL,),
    "rank": (-signal.SIGKILL,),
    "truncate": (-signal.SIGKILL,),
    "lock": (-signal.SIGKILL,),
    "metrics": (-signal.SIGKILL,),
    "stop": (INTERRUPTED,),
    "raise": (STOPPED,),
    "nan": (STOPPED,),
    "disk": (STOPPED, 1),  # one process reports the full disk, the others report an error
    "server": (INTERRUPTED, STOPPED),  # STOPPED: the server was away longer than the client retries
    "peer": (INTERRUPTED, STOPPED),
}
"""Exit codes that each fault may cause."""


@dataclass
class Soak:
    """Where a soak runs: its processes, its reward server and its random numbers."""

    context: ForkServerContext
    server: Server
    chance: random.Random
    processes: int

    def finish(self, run: Run) -> int:
        """Run without a fault to the end. Returns the exit code."""
        return Processes(self.context, run, self.server.port, self.processes).wait()

    def inject(self, run: Run, fault: str, steps: int) -> str:
        """Run with `fault` within about `steps` steps. Returns "finished" or "stopped".

        Raises:
            AssertionError: the fault cannot cause this end of the run, or there is no message.
        """
        at_call = self.chance.randint(1, 1 + steps)
        before = run.messages.stat().st_size if run.messages.exists() else 0
        remaining = run.config.training.max_steps - run.last_step
        too_late = remaining < (1 if fault == "disk" else at_call)
        faulty = int(self.chance.random() * self.processes)
        port = self.server.port
        processes = Processes(self.context, run, port, self.processes, fault, at_call, faulty)
        if fault in (*KILLS, "rank", "stop", "server", "peer"):
            too_late = self._interrupt(run, fault, steps, processes)
        code = processes.wait()
        # SIGKILL has no other effect on a process than its end, unless it ended before.
        too_late |= fault in KILLS and code == FINISHED
        if fault == "truncate" and len(run.checkpoints()) > 1:
            file = next(run.checkpoints()[-1].glob("*.safetensors"))
            os.truncate(file, file.stat().st_size // 2)
        if fault == "metrics":
            run.cut_last_line()
        after = run.messages.stat().st_size if run.messages.exists() else 0
        check_exit(fault, code, too_late, after > before)
        return "finished" if code == FINISHED else "stopped"

    def _interrupt(self, run: Run, fault: str, steps: int, processes: Processes) -> bool:
        """Send a signal after up to `steps` steps. Returns whether the run ended before it."""
        target = len(run.metrics()) + self.chance.randint(0, steps)
        # Checkpoints to resume from, and to restore metrics from.
        needed = {"truncate": 2, "metrics": 1}.get(fault, 0)
        while processes.alive() and not (
            len(run.metrics()) > target and len(run.checkpoints()) >= needed
        ):
            time.sleep(0.01)
        time.sleep(self.chance.random() * 0.5)
        too_late = not processes.alive()
        if fault in ("server", "peer"):
            too_late = self._replace_server(run, processes, hostile=fault == "peer")
        if fault == "lock" and not too_late:
            self._second_resume(run)
            too_late = not processes.alive()
        gentle = fault in ("stop", "server", "peer")
        if gentle:  # the last step is finished, and so is the run
            too_late |= run.last_step >= run.config.training.max_steps - 1
        number = signal.SIGTERM if gentle else signal.SIGKILL
        processes.signal(number, everyone=fault in KILLS)
        return too_late

    def _second_resume(self, run: Run) -> None:
        """Resume the run while it trains.

        Raises:
            AssertionError: the second resume was not refused, although the run still trained.
        """
        second = Processes(self.context, run, self.server.port)
        code = second.wait()
        assert code == REFUSED or run.finished, f"lock: the second resume ended with {code}"

    def _replace_server(self, run: Run, processes: Processes, hostile: bool) -> bool:
        """Kill the server for up to 6 s, possibly longer than the client retries.

        Args:
            hostile: a hostile server takes its place.

        Returns whether the run ended before it could train two more steps.
        """
        self.server.kill()
        arguments = (self.server.port, self.chance.randrange(10**6))
        peer = self.context.Process(target=hostile_server, args=arguments, daemon=True)
        if hostile:
            peer.start()
        time.sleep(self.chance.random() * 6)
        if hostile:
            peer.kill()
            peer.join()
        self.server.start()
        target = len(run.metrics()) + 2
        while processes.alive() and len(run.metrics()) <= target:
            time.sleep(0.01)
        return not processes.alive() or run.last_step == run.config.training.max_steps


def check_exit(fault: str, code: int, too_late: bool, message: bool) -> None:
    """Check how a process with a fault ended.

    Args:
        fault: name of the fault.
        code: exit code of the process.
        too_late: the run ended before the fault could have an effect.
        message: the run wrote a message.

    Raises:
        AssertionError: the fault cannot cause this exit code, or a stop has no message.
    """
    harmless = too_late and code in (FINISHED, -signal.SIGTERM)
    assert code in EXPECTED[fault] or harmless, f"{fault}: ended with exit code {code}"
    assert code not in (STOPPED, 1) or message, f"{fault}: the run stopped without a message"


def check_equal(whole: Run, cut: Run) -> None:
    """Check that two runs have the same metrics and the same last checkpoint, to the bit.

    Raises:
        AssertionError: they differ.
    """
    assert cut.metrics() == whole.metrics(), "the metrics differ"
    a, b = (_tensors(run.checkpoints()[-1]) for run in (whole, cut))
    assert a.keys() == b.keys(), "the checkpoints have different tensors"
    for name, value in a.items():
        assert torch.equal(value, b[name]), f"the tensor {name} differs"


def _tensors(checkpoint: Path) -> dict[tuple[str, str], Tensor]:
    files = sorted(checkpoint.glob("*.safetensors"))
    return {(file.name, name): v for file in files for name, v in load_file(file).items()}


def memory_growth(run: Run) -> float:
    """The largest memory in the last third of the run, divided by that in the second third."""
    memory = [int(line) for line in run.memory.read_text().splitlines()]
    third = max(len(memory) // 3, 1)
    return max(memory[-third:]) / max(memory[third : 2 * third] or memory)


@dataclass(frozen=True)
class Report:
    """The result of a soak.

    Attributes:
        faults: (fault, outcome) of every fault.
        memory_growth: of the run without faults, see `memory_growth`.
        server_memory: resident memory of the abused reward server at the end, divided by that
            after its start.
    """

    faults: list[tuple[str, str]]
    memory_growth: float
    server_memory: float


def soak(folder: Path, steps: int, seed: int, faults: int, processes: int = 1) -> Report:
    """Train undisturbed, train with `faults` faults, and compare.

    Args:
        folder: directory for both runs.
        steps: training steps.
        seed: seed of the run and of the schedule.
        faults: number of faults. Every kind occurs before a kind repeats.
        processes: processes of the run.

    Raises:
        AssertionError: a fault had an unexpected effect, or the runs differ.
    """
    config = load_config("g2rpo", {**SETTINGS, "training.max_steps": steps, "runtime.seed": seed})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    place = Soak(context, Server(context), chance, processes)
    whole, cut = Run(folder / "whole", config), Run(folder / "cut", config)
    assert place.finish(whole) == FINISHED
    kinds = [fault for fault in FAULTS if fault != "rank" or processes > 1]
    schedule = [*kinds, *(chance.choice(kinds) for _ in range(faults))][:faults]
    chance.shuffle(schedule)
    arguments = (place.server.port, seed)
    clients = context.Process(target=hostile_clients, args=arguments, daemon=True)
    clients.start()
    outcomes = []
    for fault in schedule:
        if fault == "stall":  # would let the run finish before other faults
            short = config.with_changes({"training.max_steps": 2})
            outcomes.append((fault, place.inject(Run(folder / "stalled", short), fault, 0)))
        else:
            outcomes.append((fault, place.inject(cut, fault, max(1, steps // faults))))
        print(f"{fault}: {outcomes[-1][1]} at step {cut.last_step}", flush=True)
    place.server.kill()
    place.server.start()
    started = place.server.memory()
    assert place.finish(cut) == FINISHED
    clients.kill()
    growth = place.server.memory() / started
    place.server.kill()
    check_equal(whole, cut)
    return Report(outcomes, memory_growth(whole), growth)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--processes", type=int, default=1, help="processes of the run, a thread each"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    steps = max(10, int(args.minutes * 60 / 2 / 0.9))  # half of the time undisturbed, 0.9 s a step
    faults = max(len(FAULTS), int(args.minutes))
    begin = time.perf_counter()
    report = soak(args.out, steps, args.seed, faults, args.processes)
    seconds = time.perf_counter() - begin
    stopped = sum(outcome == "stopped" for _, outcome in report.faults)
    print(
        f"{steps} steps, {faults} faults ({stopped} stopped the run), {seconds:.0f} s: "
        "equal to the bit"
    )
    print(f"memory of the last third of the run / second third: {report.memory_growth:.3f}")
    print(f"memory of the abused server at the end / at the start: {report.server_memory:.3f}")


if __name__ == "__main__":
    main()
