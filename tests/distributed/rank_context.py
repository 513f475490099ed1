"""What each rank does in the tests of context parallelism: runs of the tiny twins."""

from pathlib import Path

import diffusers  # noqa: F401  imported once before the fork, not after each
import torch
import twins

from flowgrain import Trainer, load_config
from flowgrain.config import Config
from flowgrain.distributed.sharding import full_tensor
from flowgrain.models import take
from flowgrain.rewards import differentiable
from flowgrain.training.step import update

SETTINGS = {
    **{f"model.{key}": value for key, value in twins.SIZE.items()},
    "model.embedding_cache": None,
    "model.gradient_checkpointing": False,
    "model.long_prompts": "error",
    "lora.rank": 0,
    "sampling.num_steps": 3,
    "sampling.guidance_scale": 3.5,
    "sampling.batch_size": 5,
    "method.group_size": 2,
    "training.prompts_per_step": 3,
    "training.micro_batch_size": 3,
    "training.max_steps": 2,
    "optimizer.learning_rate": 5e-5,
    "rewards": ["brightness"],
    "evaluation.rewards": [],
    "evaluation.num_prompts": 3,
    "evaluation.num_steps": 2,
    "runtime.dtype": "float32",
    "runtime.threads": 1,
}


@differentiable
def brightness(images, prompts):
    brightness.calls += len(images)
    return images.mean((1, 2, 3)) + 0.1 * images[:, 0].std((1, 2))


def config_of(twin, changes=(), method="g2rpo") -> Config:
    """Settings of a run of the twin in the directory `twin`, which has the name of its model."""
    values = {**SETTINGS, "model.name": twin.name, "model.path": str(twin)}
    if method == "g2rpo":
        values["method.granularities"] = [1, 2]
    return load_config(method, {**values, **dict(changes)})


def make(folder, twin, changes=(), method="g2rpo") -> Trainer:
    """A run of the twin in the directory `twin`."""
    brightness.calls = 0
    return Trainer(
        config_of(twin, changes, method),
        folder,
        prompts=twins.PROMPTS,
        eval_prompts=twins.PROMPTS[:3],
        rewards={"brightness": brightness},
    )


def two_steps(folder, twin, changes=(), method="g2rpo"):
    """Images, advantages, metrics and parameters of two steps, and an evaluation after them."""
    trainer = make(folder, twin, changes, method)
    world, policy = trainer.world, trainer.policy
    found = {"images": [], "advantage": [], "metrics": []}
    for step in (1, 2):
        batch = trainer.collector.collect(step)
        count = trainer.config.training.prompts_per_step
        of_groups = [
            images.reshape(-(-count // world.data_size), -1)
            for images in world.gather_data(batch.images)
        ]
        found["images"].append(world.interleave(of_groups, count))
        found["advantage"].append(batch.advantage)
        parts = (trainer.config, trainer.method, policy, trainer.optimizer, batch, trainer.sigmas)
        found["metrics"].append(update(*parts))
    found["scored"] = world.gather(brightness.calls)
    found["evaluation"] = torch.from_numpy(trainer.evaluate().scores["brightness"])
    found["weights"] = {n: full_tensor(p.detach()) for n, p in policy.parameters.items()}
    found["sharded"] = any(type(p).__name__ == "DTensor" for p in policy.parameters.values())
    sums = [float(full_tensor(p.detach()).double().sum()) for p in policy.parameters.values()]
    found["equal"] = all(of_rank == sums for of_rank in world.gather(sums))
    return found


def every_case(folder, cases):
    """`two_steps` of every case (name -> directory of the twin, settings and method)."""
    return {name: two_steps(Path(folder) / name, *case) for name, case in cases.items()}


def velocity_and_gradients(folder, twin, changes=()):
    """Velocities, and the gradients of a loss of the parameters and of the latents, on all ranks.

    Returns:
        For every rank the velocity, the gradient of the latents, and the parameters' gradients.
    """
    trainer = make(folder, twin, {**changes, "training.ema_decay": 0.0})
    policy, world = trainer.policy, trainer.world
    generator = torch.Generator().manual_seed(0)
    shape = (3, *policy.backbone.latent_shape)
    x, slope = (torch.randn(shape, generator=generator) for _ in range(2))
    x.requires_grad_()
    cond = take(policy.encode(twins.PROMPTS), torch.tensor([2, 0, 1]))
    sigma = torch.tensor([0.2, 0.6, 1.0])
    sampled = policy.sample_velocity(x.detach(), sigma, cond, 3.5).float()
    v = policy.train_velocity(x, sigma, cond, 3.5)
    (v * slope).sum().backward()
    world.sum_gradients(policy.parameters.values())
    gradients = {n: p.grad for n, p in policy.parameters.items() if p.grad is not None}
    gradients = {name: full_tensor(grad) for name, grad in gradients.items()}
    return world.gather((sampled, v.detach(), x.grad, gradients))


def train(folder, twin, changes, method="g2rpo"):
    """A whole run, resumed if the directory contains one: its rewards and parameters."""
    trainer = make(folder, twin, changes, method)
    trainer.resume()
    trainer.train()
    lines = trainer.recorder.read_metrics() if trainer.world.is_main else []
    weights = {n: full_tensor(p.detach()) for n, p in trainer.policy.parameters.items()}
    rewards = [line["reward/brightness"] for line in lines if "reward/brightness" in line]
    return {"rewards": rewards, "weights": weights, "steps": [line["step"] for line in lines]}


def groups(context):
    """Context groups of all ranks, and what they exchange."""
    from flowgrain.distributed import init_process_group

    world = init_process_group(torch.device("cpu"), context)
    return world.gather(
        {
            "data": (world.data_rank, world.data_size, world.is_first_of_group),
            "assigned": world.assign(5).tolist(),
            "values": world.gather_data(world.rank),
            "main": world.is_main,
        }
    )
