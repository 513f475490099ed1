"""Runs of a small model by several processes on gloo: what each process of a test does."""

import os
import signal
import sys
from pathlib import Path

import diffusers.training_utils  # noqa: F401  imported before the fork, and not after each
import torch
from diffusers.loaders import PeftAdapterMixin
from torch import nn
from toy import PROMPTS, Toy, red

from flowgrain import Run, RunStopped
from flowgrain.distributed.mesh import leave, whole
from flowgrain.config.schema import PAPER, SettingsError, settings

THREE = [*PROMPTS, "zero", "two"]  # six prompts on four processes: two of them do work that counts for nothing


class Net(nn.Module, PeftAdapterMixin):
    """ToyNet of layers that take LoRA and can be sharded one by one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.into, self.out = nn.Linear(8, 16), nn.Linear(16, 6)

    def forward(self, x, sigma, number):
        into = torch.cat([x.flatten(1), sigma[:, None].to(x), number[:, None].to(x) / 4], 1)
        return self.out(torch.tanh(self.into(into))).reshape(x.shape)


class Small(Toy):
    lora_targets = ["into", "out"]

    def __init__(self):
        self.transformer = Net()

    @property
    def blocks(self):
        return [self.transformer.into]


def make(folder, method="g2rpo", **changes):
    """A run of six prompts a step; what a method needs beyond that is set here."""
    own = {
        "branchgrpo": {"split_steps": (0, 1), "group_size": 4},
        "densegrpo": {"calibration_rounds": 1, "calibration_samples": 3},
    }.get(method, {"window_size": 2} if "window_size" in PAPER[method] else {})
    values = {
        "method": method, "num_steps": 4, "group_size": 3, "prompts_per_step": 6, "max_steps": 3, "learning_rate": 1e-2,
        "eval_rewards": (), "eval_prompts": 5, "eval_num_steps": 3, "rows_per_pass": 7, "train_rows_per_pass": 3, "threads": 1,
        **own, **changes,
    }  # fmt: skip
    run = Run(settings(values), folder, backbone=Small(), prompts=THREE, eval_prompts=PROMPTS, rewards={"red": red})
    run.report = run.export = lambda: Path(folder)  # both are tested on the bundled model
    return run


def three_steps(folder, method, **changes):
    """Images, advantages, weights and metrics of three updates, whole."""
    run = make(folder, method, **changes)
    found = {"metrics": [], "advantage": [], "images": []}
    for number in (1, 2, 3):
        if not run._calibrated:
            run.calibrate()
        sampled = run.sample_tree(number)
        found["advantage"].append(sampled.advantage)
        images = [part.reshape(-(-6 // run.group.size), -1) for part in run.group.collect(sampled.images)]
        found["images"].append(run.group.undeal(images, 6))
        process = run.method.forward_process
        found["metrics"].append(run.update(sampled) if process is None else run._contrast(sampled, process))
    found["weights"] = {name: whole(p.detach()) for name, p in run.policy.trained.items()}
    found["sharded"] = any(type(p).__name__ == "DTensor" for p in run.policy.trained.values())
    return found


def as_rank(rank, size, here, port, work, out, arguments):
    """Does `work(*arguments)` as one of `size` processes, `here` on a machine; the first one keeps what comes of it in `out`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % here), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(here)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found = work(*arguments)
    if rank == 0:
        torch.save(found, out)
    leave()
    os._exit(0)


def every_method(folder, cases):
    """`three_steps` of every case (name -> method and settings)."""
    return {name: three_steps(Path(folder) / name, method, **changes) for name, (method, changes) in cases.items()}


def held(folder, cases):
    """For each case (name -> settings) the bytes that all processes hold after a step, by part; all weights, and trained ones."""
    found = {}
    for case, changes in cases.items():
        run = make(Path(folder) / case, **changes)
        run.step(1)
        policy = run.policy
        parts = {
            "transformer": policy.transformer.parameters(),
            "AdamW": [v for state in run.optimizer.state.values() for name, v in state.items() if name != "step"],
            "EMA": policy.ema.shadow_params if policy.ema else [],
            "reference": policy.frozen.parameters() if policy.frozen else [],
            "sampling copy": policy.sampler.parameters() if policy.sampler is not policy.transformer else [],
            "old": policy.old.parameters() if policy.old else [],
        }
        counted, mine = set(), {}
        for name, tensors in parts.items():
            local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
            mine[name] = sum(one.numel() * one.element_size() for one in local if one.data_ptr() not in counted)
            counted |= {one.data_ptr() for one in local}
        every = run.group.collect(mine)
        total = {name: sum(one[name] for one in every) for name in mine}
        found[case] = (
            total,
            sum(p.numel() for p in policy.transformer.parameters()),
            sum(p.numel() for p in policy.trained.values()),
        )
    return found


def cheap_tails(folder, aside):
    """The bundled model's second step with each kind of cheaper tail: advantages with a cache, images with int8 weights.

    Several processes also return the messages where such tails are impossible.
    """
    sys.path.insert(0, aside)
    base = {
        "num_steps": 5, "sde_steps": (0,), "granularities": (1,), "group_size": 3, "prompts_per_step": 2, "eval_rewards": (),
        "rollout_weights": "replica", "threads": 1, "learning_rate": 1e-3,
    }  # fmt: skip
    found = {}
    for name, changes in (("cache", {"tail_cache": "taylorseer:2"}), ("weights", {"tail_weights": "int8"})):
        run = Run(settings({**base, **changes}), Path(folder) / name)
        run.step(1)
        sampled = run.sample_tree(2)
        found[name] = sampled.advantage if name == "cache" else torch.cat(run.group.collect(sampled.images))
    if run.group.size > 1:
        del base["sde_steps"], base["granularities"]
        for changes in ({"method": "g2rpo", "rollout_weights": "sharded"}, {"method": "diffusionnft"}):
            try:
                Run(settings({**base, **changes, "tail_weights": "int8"}), Path(folder) / "refused")
            except SettingsError as error:
                found[changes["method"]] = str(error)
    return found


def export_shapes(folder):
    """A step of the bundled model and its export; the whole weights."""
    values = {
        "num_steps": 3,
        "group_size": 2,
        "prompts_per_step": 2,
        "eval_rewards": (),
        "granularities": (1, 2),
        "rollout_weights": "sharded",
    }
    run = Run(settings(values), folder)
    run.step(1)
    run.export()
    return {name: whole(value.detach()) for name, value in run.policy.transformer.state_dict().items()}


def train(folder, changes):
    """A whole run, resumed if the folder has one already; its metrics without times, and its weights."""
    run = make(folder, **changes)
    run.resume()
    run.train()
    kept = run.record.read() if run.group.first else []
    lines = [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in kept]
    return {"lines": lines, "weights": {name: whole(p.detach()) for name, p in run.policy.trained.items()}}


def stopped(folder, how):
    """What ends a run of which only the second process has a reason, and after which step; the same in all of them."""
    run = make(folder, checkpoint_every=1, max_steps=5)
    calls = []

    def troubled(images, prompts):
        calls.append(1)
        if len(calls) == 2 and run.group.rank == 1:
            if how == "reward":
                raise OSError("gone")
            os.kill(os.getpid(), signal.SIGTERM)
        return red(images, prompts)

    run.rewards["red"] = troubled
    try:
        run.train()
    except RunStopped as error:
        return run.group.collect((type(error).__name__, run.steps_done, str(error)))
    return None


if __name__ == "__main__":  # under torchrun: a run that is slow enough to be killed
    import time

    torch.set_num_threads(1)
    slow = make(sys.argv[1], checkpoint_every=1, max_steps=60)
    slow.rewards["red"] = lambda images, prompts: (time.sleep(0.05), red(images, prompts))[1]
    slow.resume()
    Path(f"{sys.argv[1]}-{slow.group.rank}.pid").write_text(str(os.getpid()))
    slow.train()
    leave()
