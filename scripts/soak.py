"""A long run under injected faults: it must end as the undisturbed one, to the bit, and no fault may pass in silence.

    python scripts/soak.py --minutes 60 [--seed 0] [--out runs/soak]          (or: make soak)

The bundled model is trained twice with the same settings: once in peace, and once while a seeded schedule kills the process
(SIGKILL), asks it to stop (SIGTERM), makes its reward raise, give NaN or stall, lets its files hit a size limit as on a full disk,
and cuts its last checkpoint short. Then curves and weights are compared, and the memory of the process over its steps.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import diffusers.training_utils  # noqa: F401  this and the next are imported before the fork, and not after each
import psutil
import torch
from safetensors.torch import load_file

import flowgrain.backbones.shapes  # noqa: F401
from flowgrain import Run, checkpoint
from flowgrain.process import keep_memory, quieten
from flowgrain.rewards.shapes import Oracle
from flowgrain.settings import Settings, settings
from flowgrain.train import Interrupted, RunStopped

FAULTS = ("kill", "stop", "raise", "nan", "stall", "disk", "truncate")
SMALL = {
    "num_steps": 6, "granularities": (1, 2), "group_size": 4, "prompts_per_step": 4, "checkpoint_every": 1, "keep_checkpoints": 3,
    "eval_rewards": (), "eval_prompts": 8, "eval_every": 5, "ema_decay": 0.9, "learning_rate": 1e-4, "threads": 1,
    "max_failed_rewards": 0.0,
}  # fmt: skip
PEACE, STOPPED, INTERRUPTED = 0, 3, 4


class Faulty:
    """The oracle, with a fault at its call number `when` in training; every call notes the process's memory."""

    def __init__(self, fault: str, when: int, memory: Path) -> None:
        self.oracle, self.fault, self.when, self.memory, self.calls = Oracle(), fault, when, memory, 0

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> Any:
        self.calls += len(images) > SMALL["eval_prompts"]  # what fails in an evaluation is only missing there, and stops nothing
        with self.memory.open("a") as file:
            file.write(f"{os.getpid()} {psutil.Process().memory_info().rss}\n")
        if self.calls == self.when and self.fault == "raise":
            raise OSError("the reward's server is gone")
        if self.calls == self.when and self.fault == "stall":
            time.sleep(1.0)
        scores = self.oracle(images, prompts)
        return [float("nan"), *scores[1:]] if self.calls == self.when and self.fault == "nan" else scores


def work(folder: Path, s: Settings, fault: str, when: int) -> None:
    """A process of the run: from its last checkpoint on, with one fault."""
    keep_memory()
    quieten()
    if fault == "disk":  # writing beyond this many bytes of a file fails, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 + 10_000 * when, resource.RLIM_INFINITY))
    run = Run(s, folder, rewards={"oracle": Faulty(fault, when, folder.with_suffix(".memory"))})
    try:
        run.resume()
        run.train(report=False)
    except Interrupted:
        os._exit(INTERRUPTED)
    except (RunStopped, checkpoint.CheckpointError) as error:
        folder.with_suffix(".told").open("a").write(f"{error}\n")
        os._exit(STOPPED)


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


def disturb(folder: Path, s: Settings, fault: str, chance: random.Random, context: Any, steps: int) -> str:
    """Runs one process until `fault` ends it, within about `steps` steps; what came of it. AssertionError if it was silent."""
    process = context.Process(target=work, args=(folder, s, fault, chance.randint(1, 1 + steps)))
    before, after = len(lines(folder)), chance.randint(0, steps)
    process.start()
    if fault in ("kill", "stop", "truncate"):
        while process.is_alive() and len(lines(folder)) <= before + after:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.5)
        if process.is_alive():
            os.kill(process.pid, signal.SIGTERM if fault == "stop" else signal.SIGKILL)
    process.join()
    if fault == "truncate" and (newest := checkpoint.checkpoints(folder / "checkpoints")[-1:]):
        file = next(newest[0].glob("*.safetensors"))
        os.truncate(file, file.stat().st_size // 2)
    expected = {
        "kill": (-signal.SIGKILL, PEACE), "truncate": (-signal.SIGKILL, PEACE), "stop": (INTERRUPTED, PEACE), "stall": (PEACE,),
        "raise": (STOPPED, PEACE), "nan": (STOPPED, PEACE), "disk": (STOPPED, PEACE),
    }[fault]  # fmt: skip
    assert process.exitcode in expected, f"{fault}: ended with {process.exitcode}"
    return "ran to its end" if process.exitcode == PEACE else "stopped"


def soak(folder: Path, steps: int, seed: int, faults: int) -> dict[str, Any]:
    """The undisturbed run, the disturbed one with `faults` faults, and whether they are the same. Raises AssertionError if not."""
    s = settings({**SMALL, "max_steps": steps, "seed": seed})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "flowgrain.backbones.shapes", "diffusers.training_utils"])
    chance = random.Random(seed)
    whole, cut = folder / "whole", folder / "cut"
    folder.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=work, args=(whole, s, "none", 0))
    process.start()
    process.join()
    assert process.exitcode == PEACE
    schedule = [*FAULTS, *(chance.choice(FAULTS) for _ in range(faults))][:faults]
    chance.shuffle(schedule)
    came: list[tuple[str, str]] = []
    for fault in schedule:
        if fault == "stall":  # it ends nothing: the run would go on to its end, and no fault be left for it
            came.append((fault, disturb(folder / "stalled", s.model_copy(update={"max_steps": 2}), fault, chance, context, 0)))
            continue
        came.append((fault, disturb(cut, s, fault, chance, context, max(1, steps // faults))))
        print(f"{fault}: {came[-1][1]} after {len(lines(cut))} lines", flush=True)
    process = context.Process(target=work, args=(cut, s, "none", 0))
    process.start()
    process.join()
    assert process.exitcode == PEACE, process.exitcode
    assert lines(cut) == lines(whole), "the curves differ"
    a, b = (checkpoint.checkpoints(one / "checkpoints")[-1] for one in (whole, cut))
    one, other = ({name: v for f in path.glob("*.safetensors") for name, v in load_file(f).items()} for path in (a, b))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), f"{name} differs by {(value - other[name]).abs().max()}"
    memory = [int(line.split()[1]) for line in whole.with_suffix(".memory").read_text().splitlines()]
    third = max(len(memory) // 3, 1)
    growth = max(memory[-third:]) / max(memory[third : 2 * third] or memory)
    return {"steps": steps, "faults": came, "memory_growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    given = parser.parse_args()
    steps = max(10, int(given.minutes * 60 / 2 / 0.6))  # half of the time in peace, at about 0.6 s a step
    begin = time.perf_counter()
    found = soak(given.out, steps, given.seed, max(7, int(given.minutes)))
    stopped = sum(what == "stopped" for _, what in found["faults"])
    took = time.perf_counter() - begin
    print(f"{found['steps']} steps, {len(found['faults'])} faults ({stopped} ended the process), {took:.0f} s: the same to the bit")
    print(f"memory of the last third of the steps, over that of the middle third: {found['memory_growth']:.3f}")


if __name__ == "__main__":
    main()
