"""A long run under injected faults: it must end as the undisturbed one, to the bit, and no fault may pass in silence.

    python scripts/soak.py --minutes 60 [--processes 2] [--seed 0] [--out runs/soak]          (or: make soak)

The bundled model, scored by a reward server, is trained twice with the same settings: once in peace, and once while a seeded
schedule kills the run or one of its processes (SIGKILL), stops it (SIGTERM), makes its reward raise, give NaN or stall, kills
the reward server and starts it again, lets the run's files hit a size limit as on a full disk, and cuts its last checkpoint short.
Then curves and weights are compared, and the memory of the processes over their steps.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers.training_utils  # noqa: F401  this and the next are imported before the fork, and not after each
import psutil
import torch
from safetensors.torch import load_file

import flowgrain.models.shapes  # noqa: F401
from flowgrain.training import checkpoint
from flowgrain import Run
from flowgrain.distributed.process import keep_memory, quieten
from flowgrain.rewards import RewardSource
from flowgrain.rewards.service import Remote, service
from flowgrain.rewards.shapes import Oracle
from flowgrain.config.schema import Settings, settings
from flowgrain.training.trainer import Interrupted, RunStopped

FAULTS = ("kill", "rank", "stop", "raise", "nan", "stall", "server", "disk", "truncate")
SMALL = {
    "num_steps": 6, "granularities": (1, 2), "group_size": 4, "prompts_per_step": 4, "checkpoint_every": 1, "keep_checkpoints": 3,
    "eval_rewards": (), "eval_prompts": 8, "eval_every": 5, "ema_decay": 0.9, "learning_rate": 1e-4, "threads": 1,
    "max_failed_rewards": 0.0,
}  # fmt: skip
PEACE, STOPPED, INTERRUPTED = 0, 3, 4
EXPECTED = {
    "none": (PEACE,), "stall": (PEACE,), "kill": (-signal.SIGKILL,), "rank": (-signal.SIGKILL,), "truncate": (-signal.SIGKILL,),
    "stop": (INTERRUPTED,), "raise": (STOPPED,), "nan": (STOPPED,), "disk": (STOPPED, 1), "server": (INTERRUPTED, STOPPED),
}  # fmt: skip
"""How the struck process may end. A server may be back before its client gives up; of several processes with full disks the first
tells, and the others find it gone."""


def free_port() -> int:
    """A port that nobody has, below those that the system hands out: it must still be free when it is bound."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise OSError("none of 100 ports is free")


def serve(port: int) -> None:
    """The reward server's process."""
    import uvicorn

    torch.set_num_threads(1)
    uvicorn.run(service({"oracle": Oracle()}), host="127.0.0.1", port=port, log_level="error")


class Server:
    """A reward server that can be killed and started again at the same address."""

    def __init__(self, context: Any) -> None:
        self.context, self.port = context, free_port()
        self.start()
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.1)
        raise OSError("the reward server does not start")

    def start(self) -> None:
        self.process = self.context.Process(target=serve, args=(self.port,), daemon=True)
        self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class Faulty:
    """The oracle, in training as a service and with a fault at call number `when`; every call notes the process's memory.

    What fails in an evaluation is only missing there, and stops nothing: evaluations are spared.
    """

    def __init__(self, port: int, fault: str, when: int, memory: Path) -> None:
        self.here, self.served = Oracle(), Remote(RewardSource(f"http://127.0.0.1:{port}#oracle"), batch=256)
        self.fault, self.when, self.memory, self.calls = fault, when, memory, 0

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> Any:
        evaluating = len(images) <= SMALL["eval_prompts"]
        self.calls += not evaluating
        with self.memory.open("a") as file:
            file.write(f"{os.getpid()} {psutil.Process().memory_info().rss}\n")
        if evaluating:
            return self.here(images, prompts)
        if self.calls == self.when and self.fault == "raise":
            raise OSError("the reward's server is gone")
        if self.calls == self.when and self.fault == "stall":
            time.sleep(1.0)
        scores = self.served(images, prompts)
        return [float("nan"), *scores[1:]] if self.calls == self.when and self.fault == "nan" else scores


def work(folder: Path, s: Settings, port: int, fault: str, when: int, place: dict[str, str]) -> None:
    """A process of the run: from its last checkpoint on, with one fault. place: what torchrun tells each of several."""
    os.environ |= place
    keep_memory()
    quieten()
    if fault == "disk":  # writing beyond this many bytes of a file fails, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 + 10_000 * when, resource.RLIM_INFINITY))
    run = Run(s, folder, rewards={"oracle": Faulty(port, fault, when, folder.with_suffix(".memory"))})
    try:
        run.resume()
        run.train(report=False)
    except Interrupted:
        os._exit(INTERRUPTED)
    except (RunStopped, checkpoint.CheckpointError) as error:
        folder.with_suffix(".told").open("a").write(f"{error}\n")
        os._exit(STOPPED)
    os._exit(PEACE)


class Job:
    """The processes of one run, of which one has a fault. When one has ended for a reason of its own, the others are ended too, as
    torchrun does."""

    def __init__(self, context: Any, folder: Path, s: Settings, port: int, size: int, fault: str, when: int, struck: int) -> None:
        meeting = {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        self.struck = struck
        self.processes = []
        for rank in range(size):
            place = {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
            own = fault if rank == struck or fault == "disk" else "none"
            self.processes.append(context.Process(target=work, args=(folder, s, port, own, when, place)))
            self.processes[-1].start()

    def alive(self) -> bool:
        return self.processes[self.struck].is_alive()

    def signal(self, number: int, everybody: bool) -> None:
        for process in self.processes if everybody else [self.processes[self.struck]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def ended(self) -> int:
        """How the struck process ended; nobody is left."""
        while all(process.is_alive() for process in self.processes):
            time.sleep(0.05)
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
        return self.processes[self.struck].exitcode


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without times; nothing yet is an empty list."""
    if not (folder / "metrics.jsonl").exists():
        return []
    found = []
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            found.append({k: v for k, v in json.loads(text).items() if not k.startswith("seconds")})
        except json.JSONDecodeError:
            break
    return found


def saved(folder: Path) -> list[Path]:
    return checkpoint.checkpoints(folder / "checkpoints")


def disturb(
    job: Callable[..., Job], folder: Path, until: int, fault: str, chance: random.Random, server: Server, steps: int
) -> str:
    """Runs one job until `fault` ends it, within about `steps` steps; what came of it. AssertionError if it was silent."""
    left = until - max((line["step"] for line in lines(folder)), default=0)
    when, told = chance.randint(1, 1 + steps), folder.with_suffix(".told")
    said = told.stat().st_size if told.exists() else 0
    running = job(fault=fault, when=when, struck=chance.random())
    before, after, too_late = len(lines(folder)), chance.randint(0, steps), left < (1 if fault == "disk" else when)
    if fault in ("kill", "rank", "stop", "truncate", "server"):
        spare = fault != "truncate"  # which needs an older checkpoint to fall back on
        while running.alive() and (len(lines(folder)) <= before + after or not (spare or len(saved(folder)) > 1)):
            time.sleep(0.01)
        time.sleep(chance.random() * 0.5)
        too_late = not running.alive()
        if fault == "server":
            server.kill()
            time.sleep(chance.random() * 6)  # longer than the client's patience, or shorter
            server.start()
            now = len(lines(folder))
            while running.alive() and len(lines(folder)) <= now + 2:  # it goes on, and is stopped for the next fault to come
                time.sleep(0.01)
            too_late = not running.alive() or max(line["step"] for line in lines(folder)) == until
        gently = fault in ("stop", "server")
        running.signal(signal.SIGTERM if gently else signal.SIGKILL, everybody=fault in ("kill", "truncate"))
    code = running.ended()
    if fault == "truncate" and len(saved(folder)) > 1:
        file = next(saved(folder)[-1].glob("*.safetensors"))
        os.truncate(file, file.stat().st_size // 2)
    assert code in EXPECTED[fault] or (code in (PEACE, -signal.SIGTERM) and too_late), f"{fault}: ended with {code}"
    assert code not in (STOPPED, 1) or told.stat().st_size > said, f"{fault}: nothing was told"
    return "ran to its end" if code == PEACE else "stopped"


def soak(folder: Path, steps: int, seed: int, faults: int, processes: int = 1) -> dict[str, Any]:
    """The undisturbed run, the disturbed one with `faults` faults, and whether they are the same. Raises AssertionError if not."""
    s = settings({**SMALL, "max_steps": steps, "seed": seed})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "flowgrain.models.shapes", "diffusers.training_utils", "uvicorn", "fastapi"])
    chance = random.Random(seed)
    whole, cut = folder / "whole", folder / "cut"
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(context)

    def job(folder: Path, s: Settings = s, fault: str = "none", when: int = 0, struck: float = 0.0) -> Job:
        return Job(context, folder, s, server.port, processes, fault, when, int(struck * processes))

    assert job(whole).ended() == PEACE
    possible = [fault for fault in FAULTS if fault != "rank" or processes > 1]
    schedule = [*possible, *(chance.choice(possible) for _ in range(faults))][:faults]
    chance.shuffle(schedule)
    came: list[tuple[str, str]] = []
    for fault in schedule:
        if fault == "stall":  # it ends nothing: the run would go on to its end, and no fault be left for it
            aside, few = folder / "stalled", s.model_copy(update={"max_steps": 2})
            came.append((fault, disturb(partial(job, aside, few), aside, few.max_steps, fault, chance, server, 0)))
            continue
        came.append((fault, disturb(partial(job, cut), cut, steps, fault, chance, server, max(1, steps // faults))))
        print(f"{fault}: {came[-1][1]} after {len(lines(cut))} lines", flush=True)
    assert job(cut).ended() == PEACE
    server.kill()
    assert lines(cut) == lines(whole), "the curves differ"
    a, b = (saved(one)[-1] for one in (whole, cut))
    files = [{(f.name, name): v for f in path.glob("*.safetensors") for name, v in load_file(f).items()} for path in (a, b)]
    assert files[0].keys() == files[1].keys()
    for name, value in files[0].items():
        assert torch.equal(value, files[1][name]), f"{name} differs by {(value - files[1][name]).abs().max()}"
    memory = [int(line.split()[1]) for line in whole.with_suffix(".memory").read_text().splitlines()]
    third = max(len(memory) // 3, 1)
    growth = max(memory[-third:]) / max(memory[third : 2 * third] or memory)
    return {"steps": steps, "faults": came, "memory_growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--processes", type=int, default=1, help="of the run; one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    given = parser.parse_args()
    steps = max(10, int(given.minutes * 60 / 2 / 0.9))  # half of the time in peace, at about 0.9 s a step
    begin = time.perf_counter()
    found = soak(given.out, steps, given.seed, max(len(FAULTS), int(given.minutes)), given.processes)
    stopped = sum(what == "stopped" for _, what in found["faults"])
    took = time.perf_counter() - begin
    print(f"{found['steps']} steps, {len(found['faults'])} faults ({stopped} ended the process), {took:.0f} s: the same to the bit")
    print(f"memory of the last third of the steps, over that of the middle third: {found['memory_growth']:.3f}")


if __name__ == "__main__":
    main()
