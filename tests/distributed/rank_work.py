"""What each rank does in the tests of several processes on gloo: runs of a small model."""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import diffusers.training_utils  # noqa: F401  imported once before the fork, not after each
import torch
from diffusers.loaders import PeftAdapterMixin
from PIL import Image
from torch import nn
from toy import PROMPTS, Toy, red

from flowgrain import METHODS, PolicyGradient, RunStopped, SettingsError, Trainer, load_config
from flowgrain.distributed import destroy_process_group
from flowgrain.distributed.sharding import full_tensor
from flowgrain.image_data import COLUMNS
from flowgrain.rewards import differentiable
from flowgrain.training.step import update

# Six prompts on four ranks: two ranks do work whose result is discarded.
SIX = [*PROMPTS, "zero", "two"]

SETTINGS = {
    "sampling.num_steps": 4,
    "sampling.batch_size": 7,
    "method.group_size": 3,
    "training.prompts_per_step": 6,
    "training.micro_batch_size": 3,
    "training.max_steps": 3,
    "optimizer.learning_rate": 1e-2,
    "evaluation.rewards": [],
    "evaluation.num_prompts": 5,
    "evaluation.num_steps": 3,
    "runtime.threads": 1,
}
OF_METHOD = {
    "branchgrpo": {"method.split_steps": [0, 1], "method.group_size": 4},
    "ddpo": {"method.min_count": 5, "method.updates_per_rollout": 2},
    "e_grpo": {"method.sde_steps": [0, 1], "method.merged_steps": [1, 2]},
    "densegrpo": {"method.calibration.rounds": 1, "method.calibration.samples": 3},
    "mend": {"method.tau": 1.0},  # accepts candidates in every step
}


class Net(nn.Module, PeftAdapterMixin):
    """ToyNet of layers that take LoRA and can be sharded one by one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.into, self.out = nn.Linear(8, 16), nn.Linear(16, 6)

    def forward(self, x, sigma, number):
        into = torch.cat([x.flatten(1), sigma[:, None].to(x), number[:, None].to(x) / 4], 1)
        return self.out(torch.tanh(self.into(into))).reshape(x.shape)

    def save_pretrained(self, folder):
        torch.save(self.state_dict(), folder / "weights.pt")


class Small(Toy):
    """The toy backbone with LoRA and one block."""

    lora_targets = ["into", "out"]

    def __init__(self):
        self.transformer = Net()
        self.transformer.to_json_string = lambda: "{}"  # a sharded export needs it

    @property
    def blocks(self):
        return [self.transformer.into]

    def encode_images(self, images):
        return torch.stack([images[:, :, 0, 0], images[:, :, -1, -1]], 1)


def write_images(kind):
    """A data set with a row for every toy prompt, in a directory of this process."""
    folder, columns = Path(tempfile.mkdtemp()), COLUMNS[kind]
    rows = []
    for number, text in enumerate(PROMPTS):
        names = {name: f"{name}-{number}.png" for name in columns}
        for place, name in enumerate(names.values()):
            color = (50 * number, 40 + 90 * place, 200 - 30 * number)
            Image.new("RGB", (8, 8), color).save(folder / name)
        rows.append(json.dumps({"prompt": text, **names}))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return str(folder / "rows.jsonl")


class WithoutExport(Trainer):
    """A trainer whose export is empty. Exports are tested on the bundled model."""

    def export(self, folder=None):
        return self.out


def make(folder, changes=None, method="g2rpo"):
    """A run of six prompts per step."""
    of_method = OF_METHOD.get(method, {})
    settings, changes, prompts = dict(SETTINGS), dict(changes or {}), SIX
    for kind in ("pairs", "images"):
        if f"data.{kind}" in changes:
            changes[f"data.{kind}"], prompts = write_images(kind), None
            del settings["method.group_size"]  # nothing is sampled
    if "window_size" in METHODS.get(method).model_fields:
        of_method = {"method.window_size": 2}
    config = load_config(method, {**settings, **of_method, **changes})
    return WithoutExport(
        config,
        folder,
        backbone=Small(),
        prompts=prompts,
        eval_prompts=PROMPTS,
        rewards=None if "rewards" in changes else {"red": red},
    )


def weights_of(trainer):
    """The whole trained parameters by name."""
    return {name: full_tensor(p.detach()) for name, p in trainer.policy.parameters.items()}


def three_steps(folder, method, changes):
    """Whole images, advantages, parameters and metrics of three steps."""
    trainer = make(folder, changes, method)
    method, world, policy = trainer.method, trainer.world, trainer.policy
    found = {"metrics": [], "advantage": [], "images": []}
    for step in (1, 2, 3):
        if isinstance(method, PolicyGradient) and method.needs_calibration:
            trainer.calibrate()
        batch = trainer.collector.collect(step)
        found["advantage"].append(batch.advantage)
        of_ranks = [
            images.reshape(-(-6 // world.size), -1) for images in world.gather(batch.images)
        ]
        found["images"].append(world.interleave(of_ranks, 6))
        metrics = update(trainer.config, method, policy, trainer.optimizer, batch, trainer.sigmas)
        found["metrics"].append(metrics)
    found["weights"] = weights_of(trainer)
    found["sharded"] = any(type(p).__name__ == "DTensor" for p in policy.parameters.values())
    return found


def every_case(folder, cases):
    """`three_steps` of every case (name -> method and settings)."""
    return {name: three_steps(Path(folder) / name, *case) for name, case in cases.items()}


def held_bytes(folder, cases):
    """The bytes that all ranks hold after a step, by case and part.

    Args:
        folder: directory of the runs.
        cases: method and settings by name.

    Returns:
        For every case the bytes by part, the number of parameters, and of trained ones.
    """
    found = {}
    for case, (method, changes) in cases.items():
        trainer = make(Path(folder) / case, changes, method)
        trainer.step(1)
        policy, states = trainer.policy, trainer.optimizer.adamw.state.values()
        own_sampler = policy.sampler is not policy.model
        parts = {
            "transformer": policy.model.parameters(),
            "AdamW": [v for state in states for name, v in state.items() if name != "step"],
            "EMA": policy.ema.shadow_params if policy.ema else [],
            "reference": policy.reference.parameters() if policy.reference else [],
            "sampling copy": policy.sampler.parameters() if own_sampler else [],
            "old": policy.old.parameters() if policy.old else [],
        }
        counted, mine = set(), {}
        for name, tensors in parts.items():
            local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
            new = [tensor for tensor in local if tensor.data_ptr() not in counted]
            mine[name] = sum(tensor.numel() * tensor.element_size() for tensor in new)
            counted |= {tensor.data_ptr() for tensor in local}
        ranks = trainer.world.gather(mine)
        total = {name: sum(rank[name] for rank in ranks) for name in mine}
        whole = sum(p.numel() for p in policy.model.parameters())
        found[case] = (total, whole, sum(p.numel() for p in policy.parameters.values()))
    return found


def approximate_tails(folder, torchao):
    """The bundled model's second step with approximate tails.

    Args:
        folder: directory of the runs.
        torchao: directory in which torchao is installed.

    Returns:
        Advantages with a cache, images with int8 weights, and from several ranks the message where
        such tails are impossible.
    """
    sys.path.insert(0, torchao)
    shared = {
        "sampling.num_steps": 5,
        "method.group_size": 3,
        "training.prompts_per_step": 2,
        "evaluation.rewards": [],
        "runtime.rollout_weights": "replica",
        "runtime.threads": 1,
        "optimizer.learning_rate": 1e-3,
    }
    one_step = {"method.sde_steps": [0], "method.granularities": [1]}
    found = {}
    for name, setting, value in (
        ("cache", "sampling.tail_cache", "taylorseer:2"),
        ("weights", "sampling.tail_weights", "int8"),
    ):
        config = load_config("g2rpo", {**shared, **one_step, setting: value})
        trainer = Trainer(config, Path(folder) / name)
        trainer.step(1)
        batch = trainer.collector.collect(2)
        gathered = torch.cat(trainer.world.gather(batch.images))
        found[name] = batch.advantage if name == "cache" else gathered
    if trainer.world.size > 1:
        sharded = {"runtime.rollout_weights": "sharded", "sampling.tail_weights": "int8"}
        try:
            Trainer(load_config("g2rpo", {**shared, **sharded}), Path(folder) / "refused")
        except SettingsError as error:
            found["refused"] = str(error)
    sys.path.remove(torchao)
    return found


def reused_graphs(folder, memory):
    """Three steps of a LoRA with `memory` GB for graphs.

    Returns:
        Reused and other forward passes of every step, the trained parameters, and from several
        ranks the messages for sharded parameters.
    """
    changes = {"lora.rank": 2, "method.updates_per_rollout": 1, "training.graph_memory": memory}
    trainer = make(folder, {**changes, "runtime.rollout_weights": "replica"}, "flow_grpo")
    lines = [trainer.step(step) for step in (1, 2, 3)]
    names = ("reused_forward_passes", "train_forward_passes")
    passes = [tuple(line.get(name, 0) for name in names) for line in lines]
    refused = []
    sharded = {**changes, "training.graph_memory": 1, "runtime.rollout_weights": "sharded"}
    for more in ({"lora.rank": 0}, {}) if trainer.world.size > 1 else ():
        try:
            make(folder, {**sharded, **more}, "flow_grpo")
        except SettingsError as error:
            refused.append(str(error))
    return passes, weights_of(trainer), refused


def export_shapes(folder):
    """A step of the bundled model and its export. Returns the whole parameters."""
    changes = {
        "sampling.num_steps": 3,
        "method.group_size": 2,
        "method.granularities": [1, 2],
        "training.prompts_per_step": 2,
        "evaluation.rewards": [],
        "runtime.rollout_weights": "sharded",
    }
    trainer = Trainer(load_config("g2rpo", changes), folder)
    trainer.step(1)
    trainer.export()
    state = trainer.policy.model.state_dict()
    return {name: full_tensor(value.detach()) for name, value in state.items()}


def without_times(lines):
    """Lines of metrics without durations."""
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def train(folder, changes, method="g2rpo"):
    """A whole run, resumed if the directory contains one: its metrics and parameters."""
    trainer = make(folder, changes, method)
    trainer.resume()
    trainer.train()
    lines = trainer.recorder.read_metrics() if trainer.world.is_main else []
    return {"lines": without_times(lines), "weights": weights_of(trainer)}


def stopped(folder, how):
    """The error of every rank in a run that only the second rank has a reason to stop.

    Args:
        folder: directory of the run.
        how: "reward" (it fails) or "signal" (SIGTERM).

    Returns:
        For every rank the error's class, the steps done and the message.
    """
    trainer = make(folder, {"training.checkpoint_every": 1, "training.max_steps": 5})
    calls = []

    def troubled(images, prompts):
        calls.append(1)
        if len(calls) == 2 and trainer.world.rank == 1:
            if how == "reward":
                raise OSError("gone")
            os.kill(os.getpid(), signal.SIGTERM)
        return red(images, prompts)

    trainer.rewards["red"] = troubled
    try:
        trainer.train()
    except RunStopped as error:
        return trainer.world.gather((type(error).__name__, trainer.steps_done, str(error)))
    return None


def failing_on_one_rank(folder, method):
    """Runs of two ranks in which only the second rank cannot use an image, or a gradient.

    Args:
        folder: directory of the run.
        method: "sft" (a broken image file), "draft", "refl" or "mend".

    Returns:
        For every rank the message, and whether the checkpoint of the run is intact.
    """
    changes = {"training.max_failed_rewards": 0.0, "evaluation.every": 0}
    if method == "sft":
        changes |= {"data.images": "", "training.prompts_per_step": 6}
    trainer = make(folder, changes, method)
    second = trainer.world.rank == 1

    @differentiable
    def troubled(images, prompts):
        if second and images.requires_grad:
            raise OSError("gone")
        return red(images, prompts)

    trainer.rewards["red"] = troubled
    if second and method == "sft":
        for prompt in trainer.prompts:
            Path(prompt.images[0]).write_bytes(b"broken")
    try:
        trainer.train()
    except RunStopped as error:
        return trainer.world.gather((str(error), trainer.policy.updates, trainer.steps_done))
    return None


def recorded(folder):
    """A run of one step in chunks of two prompts, with three recorded prompts."""
    changes = {"training.max_steps": 1, "sampling.prompts_per_chunk": 2}
    trainer = make(folder, {**changes, "training.record.prompts": 3})
    trainer.train()
    return True


def refused(folder):
    """The message of every rank for a directory that another process has locked."""
    trainer = make(folder)
    try:
        trainer.resume()
    except SettingsError as error:
        return trainer.world.gather((str(error), trainer.lock.held))
    return None


def held_locks(folder):
    """Which ranks have the lock after a resume, and after training."""
    trainer = make(folder, {"training.max_steps": 1})
    trainer.resume()
    during = trainer.world.gather(trainer.lock.held)
    trainer.train()
    return during, trainer.world.gather(trainer.lock.held)


def world_sums(count):
    """Assigned items, gathered and interleaved values, and a summed gradient of every rank."""
    trainer = make("unused")
    world = trainer.world
    mine = torch.from_numpy(world.assign(count)).float()
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), float(world.rank + 1))
    world.sum_gradients([parameter])
    own = {
        "rank": world.rank,
        "main": world.is_main,
        "assigned": mine.tolist(),
        "interleaved": world.interleave(world.gather(mine), count).tolist(),
        "any": (world.any(world.rank == 1), world.any(False)),
        "sum": parameter.grad.tolist(),
    }
    return world.gather(own)


def slow_run(folder):
    """A run that takes long enough to be killed."""
    trainer = make(folder, {"training.checkpoint_every": 1, "training.max_steps": 60})
    trainer.rewards["red"] = lambda images, prompts: (time.sleep(0.05), red(images, prompts))[1]
    trainer.resume()
    Path(f"{folder}-{trainer.world.rank}.pid").write_text(str(os.getpid()))
    trainer.train()


if __name__ == "__main__":  # under torchrun
    torch.set_num_threads(1)
    slow_run(sys.argv[1])
    destroy_process_group()
