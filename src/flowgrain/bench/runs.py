"""Checks of runs on tiny models: a process group of one rank, and resuming to the bit."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowgrain.bench.numerics import gradient, relative_error
from flowgrain.bench.record import CHECK, StepRecord, within
from flowgrain.bench.setup import Setup, deterministic
from flowgrain.bench.sizes import TINY, ModelSizes, bench_config
from flowgrain.distributed import World
from flowgrain.distributed.one_rank import one_rank
from flowgrain.distributed.sharding import shard
from flowgrain.training import Trainer

SHARDED_LIMIT = 1e-5
"""Largest relative difference of the gradient of a sharded model. The kernels are the same."""


def check_process_group(setup: Setup, record: StepRecord) -> None:
    """Check collectives and sharded parameters in a process group of one rank."""
    deterministic()
    record.run("collectives", partial(collectives, setup))
    for sizes in TINY.kinds.values():
        record.run(
            f"gradient of a sharded model, {sizes.name}", partial(sharded_gradient, setup, sizes)
        )


def collectives(setup: Setup) -> dict[str, Any]:
    """Whether gathered objects and summed gradients of one rank are those of this process."""
    parameter = nn.Parameter(torch.arange(5.0, device=setup.device))
    parameter.grad = torch.arange(5.0, device=setup.device)
    before = parameter.grad.clone()
    with one_rank(setup.device) as world:
        gathered = world.gather({"rank": world.rank})
        on_main = world.on_main(lambda: "main")
        world.sum_gradients([parameter])
        backend = _backend(world, setup.device)
    same = gathered == [{"rank": 0}] and on_main == "main" and torch.equal(parameter.grad, before)
    return {"backend": backend, CHECK: same}


def _backend(world: World, device: torch.device) -> str:
    """The backend that communicates tensors on `device`."""
    assert world.mesh is not None
    return str(world.mesh.get_group()._get_backend(device).name())


def sharded_gradient(setup: Setup, sizes: ModelSizes) -> dict[str, Any]:
    """The difference of the gradient with FSDP2 on one rank to the gradient without it."""
    config = bench_config(
        sizes, setup.device_name, *sizes.iteration, "lora.rank=0", "runtime.dtype=float32"
    )
    trainer = setup.trainer(sizes, config)
    batch = trainer.collector.collect(1)
    reference = gradient(trainer, batch)
    with one_rank(setup.device) as world:
        model = trainer.policy.model
        blocks = [model.get_submodule(name) for name in trainer.policy.copies.block_names]
        shard(model, blocks, world)
        return within(relative_error(gradient(trainer, batch), reference), SHARDED_LIMIT)


def check_resume(setup: Setup, record: StepRecord) -> None:
    """Check that a resumed run equals an uninterrupted run to the bit, with a LoRA and without."""
    deterministic()
    for sizes in TINY.kinds.values():
        for rank in (0, 2):
            kind = f"LoRA of rank {rank}" if rank else "full fine-tune"
            record.run(f"resume, {sizes.name}, {kind}", partial(resume, setup, sizes, rank))


def resume(setup: Setup, sizes: ModelSizes, rank: int) -> dict[str, Any]:
    """Whether three steps equal two steps, a restart and a third step, to the bit."""
    changes = ("training.max_steps=3", "training.checkpoint_every=1", f"lora.rank={rank}")
    config = bench_config(sizes, setup.device_name, *sizes.iteration, *changes)
    name = f"{config.model.name}-{rank}"
    whole = setup.trainer(sizes, config, f"{name}-whole")
    whole.train()
    short = config.with_changes({"training.max_steps": 2})
    setup.trainer(sizes, short, f"{name}-cut").train()
    again = setup.trainer(sizes, config, f"{name}-cut")
    again.resume()
    again.train()
    ours, theirs = state_of(again), state_of(whole)
    different = [name for name, value in theirs.items() if not torch.equal(value, ours[name])]
    values = {"tensors": len(theirs), "different": different[:5]}
    return {**values, CHECK: ours.keys() == theirs.keys() and not different}


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Trained parameters and optimizer state by name."""
    parameters = trainer.policy.parameters.items()
    weights = {name: parameter.detach() for name, parameter in parameters}
    return {**weights, **trainer.optimizer.tensors()}
