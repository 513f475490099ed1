"""Checks of numbers: a GPU against the CPU on tiny models, and the ratio before the first update.

Shapes: B rows, E trained edges, *L latent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from flowgrain.bench.record import CHECK, StepRecord, Values, within
from flowgrain.bench.setup import Setup, deterministic
from flowgrain.bench.sizes import TINY, ModelSizes, bench_config
from flowgrain.core.sde import Step
from flowgrain.core.tree import Ints
from flowgrain.distributed.sharding import full_tensor
from flowgrain.methods import PolicyGradient
from flowgrain.models import take
from flowgrain.training import Trainer
from flowgrain.training.rollout_batch import RolloutBatch
from flowgrain.training.step import rollout_loss

LIMITS = {
    "float32": {"velocity": 1e-3, "log-probability": 1e-3, "gradient": 1e-2},
    "bfloat16": {"velocity": 3e-2, "log-probability": 3e-2, "gradient": 3e-1},
}
"""Largest allowed difference to the CPU in the same dtype. For the velocity and the gradient it is
the norm of the difference, relative to the norm on the CPU. For log-probabilities, which are
averages over the latent, it is the largest absolute difference.

bfloat16 is not compared with float32: FLUX.1 embeds 1000 times the noise level and the guidance
scale, and their rounding to bfloat16 alone changes the velocity of a random model by a third. The
gradient is a sum of terms with advantages of both signs, which amplifies rounding errors.
"""


def check_numerics(setup: Setup, record: StepRecord) -> None:
    """Compare velocity, log-probabilities and gradient with the CPU, and check the ratio."""
    deterministic()
    for sizes in TINY.kinds.values():
        batch = _trainer(setup, sizes, "cpu", "float32").collector.collect(1)
        for dtype in LIMITS:
            host = _trainer(setup, sizes, "cpu", dtype)
            ours = _trainer(setup, sizes, setup.device_name, dtype)
            label = f"{sizes.name}, {dtype}"
            pair = Pair(host, ours, batch, LIMITS[dtype])
            record.run(f"velocity, {label}", pair.velocity)
            record.run(f"log-probability, {label}", pair.log_probability)
            record.run(f"gradient of a training step, {label}", pair.gradient)
            record.run(f"ratio before the first update, {label}", partial(ratio, ours))


@dataclass(frozen=True)
class Pair:
    """The same run on the CPU and on the device.

    Attributes:
        host: the run on the CPU.
        ours: the run on the device.
        batch: a rollout batch on the CPU.
        limits: largest allowed differences, see `LIMITS`.
    """

    host: Trainer
    ours: Trainer
    batch: RolloutBatch
    limits: Mapping[str, float]

    def velocity(self) -> Values:
        """Compare the velocity."""
        error = relative_error(velocity(self.ours), velocity(self.host))
        return within(error, self.limits["velocity"])

    def log_probability(self) -> Values:
        """Compare the log-probabilities of the trained edges."""
        ours = log_probabilities(self.ours, batch_on(self.batch, self.ours.device))
        error = largest_error(ours, log_probabilities(self.host, self.batch))
        return within(error, self.limits["log-probability"])

    def gradient(self) -> Values:
        """Compare the gradient of the first update."""
        ours = gradient(self.ours, batch_on(self.batch, self.ours.device))
        error = relative_error(ours, gradient(self.host, self.batch))
        return within(error, self.limits["gradient"])


def _trainer(setup: Setup, sizes: ModelSizes, device: str, dtype: str) -> Trainer:
    """A full fine-tune with two updates per rollout. The weights are created on the CPU."""
    changes = ("lora.rank=0", "method.updates_per_rollout=2", f"runtime.dtype={dtype}")
    config = bench_config(sizes, device, *sizes.iteration, *changes)
    return setup.trainer(sizes, config, on="cpu")


def velocity(trainer: Trainer) -> Tensor:
    """v [B, *L] of four random states at noise levels from 0.2 to 1, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *trainer.backbone.latent_shape, generator=generator).to(trainer.device)
    sigma = torch.linspace(1, 0.2, 4, device=trainer.device)
    prompts = [prompt.text for prompt in trainer.prompts[:2]]
    cond = take(trainer.policy.encode(prompts), torch.tensor([0, 0, 1, 1], device=trainer.device))
    guidance = trainer.config.sampling.guidance_scale
    return trainer.policy.sample_velocity(x, sigma, cond, guidance).float().cpu()


@torch.no_grad()
def log_probabilities(trainer: Trainer, batch: RolloutBatch) -> Tensor:
    """log p(x_next | x) [E] of all trained edges of `batch` under the policy, on the CPU."""
    method, sigmas, device = trainer.method, trainer.sigmas, trainer.device
    assert isinstance(method, PolicyGradient)
    rollout, tree = batch.rollout, batch.rollout.tree
    parents, edges = tree.trained_parents, tree.edges

    def tensor(values: Ints) -> Tensor:
        return torch.from_numpy(values).to(device)

    source = tensor(np.searchsorted(parents, tree.parent[edges]))
    x = rollout.at(parents)  # (B, *L)
    cond = take(batch.cond, tensor(tree.prompt[parents]))
    sigma = sigmas[tensor(tree.grid_index[parents])]
    v = trainer.policy.train_velocity(x, sigma, cond, trainer.config.sampling.guidance_scale)
    step = Step.on(sigmas, tensor(tree.grid_index[parents])[source], tensor(tree.grid_index[edges]))
    transition = method.kernel(sigmas)(x[source], v[source], step)
    return transition.log_prob(rollout.at(edges)).cpu()


def gradient(trainer: Trainer, batch: RolloutBatch) -> Tensor:
    """The gradient of the first update on `batch`, of all parameters in one vector, on the CPU."""
    losses = rollout_loss(trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas)
    losses.prepare()
    for place in range(len(losses.updates[0].micro_batches)):
        loss = losses.terms(0, place)["loss"].sum() / losses.updates[0].count
        loss.backward()  # type: ignore[no-untyped-call]
    return gradient_of(trainer.policy.model)


def gradient_of(model: nn.Module) -> Tensor:
    """The gradients of the trained parameters in one vector on the CPU. They are then deleted.

    Sharded gradients are gathered.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    whole = torch.cat([full_tensor(grad).flatten().float().cpu() for grad in grads])
    model.zero_grad(set_to_none=True)
    return whole


def ratio(trainer: Trainer) -> dict[str, object]:
    """Whether the ratio of every trained edge is exactly 1 before the first update.

    The old log-probabilities of the second update come from a forward pass without gradient, and
    the new ones from a forward pass with gradient.
    """
    batch = trainer.collector.collect(1)
    losses = rollout_loss(trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas)
    losses.prepare()
    ratios = [
        losses.terms(number, place)["ratio"].detach()
        for number, update in enumerate(losses.updates)
        for place in range(len(update.micro_batches))
    ]
    ratios_of_all = torch.cat(ratios)
    largest = float((ratios_of_all - 1).abs().max())
    return {"edges": len(ratios_of_all), "largest_difference": largest, CHECK: largest == 0}


def batch_on(batch: RolloutBatch, device: torch.device) -> RolloutBatch:
    """`batch` with its latents and its conditioning on `device`."""
    cond = {name: value.to(device) for name, value in batch.cond.items()}
    rollout = replace(batch.rollout, latents=batch.rollout.latents.to(device))
    return replace(batch, cond=cond, rollout=rollout)


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||, in float64."""
    ours, reference = ours.double(), reference.double()
    return float((ours - reference).norm() / reference.norm())


def largest_error(ours: Tensor, reference: Tensor) -> float:
    """The largest absolute difference, in float64."""
    return float((ours.double() - reference.double()).abs().max())
