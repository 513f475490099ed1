"""Execution of a tree: computes its latents. The velocity of a state is computed at most once.

Shapes: N rows of the tree, B rows of a batch, K children, S slots, *L latent.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flowgrain.core.graphs import Graph, GraphKeeper
from flowgrain.core.schedule import Batch, Schedule, TailSchedule, schedule
from flowgrain.core.sde import ODE, Kernel, Step, multistep, per_row
from flowgrain.core.tree import ROOT, Ints, Tree

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""velocity(x [B, *L], sigma [B] float32, prompt [B] index) -> v [B, *L]."""

TailVelocity = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""tail(x [B, *L], sigma [B] float32, prompt [B] index, continues) -> v [B, *L].

If `continues` is true, each row is the child of the row at the same position in the previous call.
"""

Noise = Callable[[Ints, Ints], Tensor]
"""noise(prompt [K], draw [K]) -> standard normal [K, *L], determined by its arguments."""


@dataclass(frozen=True)
class Rollout:
    """A tree with the latents of its leaves, trained edges, their parents, and kept rows.

    Other latents are not kept.

    Attributes:
        tree: the executed tree.
        latents: [S, *L].
        slot: [N] slot of each row's latent.
        forward_passes: rows that went through the model.
        batches: model calls.
        graphs: autograd graphs of trained parents, see `GraphKeeper`. The update removes the graphs
            that it uses.
    """

    tree: Tree
    latents: Tensor
    slot: Ints
    forward_passes: int
    batches: int
    graphs: list[Graph] = field(default_factory=list)

    def at(self, rows: Ints) -> Tensor:
        """Latents [len(rows), *L] of leaves, trained edges, their parents, or kept rows."""
        return self.latents[torch.from_numpy(self.slot[rows]).to(self.latents.device)]


def concatenate(tree: Tree, parts: Sequence[Rollout]) -> Rollout:
    """The rollout of `tree`, from rollouts of consecutive prompts.

    `tree` contains the rows of all `parts` in this order.
    """
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.latents) for part in parts)])
    slots = [part.slot + start for part, start in zip(parts, starts, strict=False)]
    rows = np.cumsum([0, *(len(part.tree) for part in parts)])
    graphs = [
        Graph(graph.rows + start, graph.velocity)
        for part, start in zip(parts, rows, strict=False)
        for graph in part.graphs
    ]
    return Rollout(
        tree,
        torch.cat([part.latents for part in parts]),
        np.concatenate(slots),
        sum(part.forward_passes for part in parts),
        sum(part.batches for part in parts),
        graphs,
    )


@torch.no_grad()
def rollout(
    tree: Tree,
    velocity: Velocity,
    kernel: Kernel,
    sigmas: Tensor,
    noise: Noise,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    tail: Callable[[], AbstractContextManager[TailVelocity]] | None = None,
    tail_schedule: TailSchedule = "interleaved",
    keeper: GraphKeeper | None = None,
) -> Rollout:
    """Execute `tree`. Every row with children goes through the model exactly once.

    Args:
        tree: tree of all prompts.
        velocity: velocity of the policy that samples.
        kernel: transition of the stochastic steps.
        sigmas: [T + 1] noise levels of the grid.
        noise: source of noise samples.
        batch_size: rows of one model call.
        dtype: storage dtype of latents. The result of a stochastic step is rounded when it is
            stored, so log-probabilities of stored latents are exact.
        tail: returns a context manager that yields approximate velocities for tail rows. Not used
            with `tail_schedule` "interleaved".
        tail_schedule: when tail rows are evaluated, see `TailSchedule`.
        keeper: evaluates rows that are not tail rows, and keeps graphs. Default: no graph is kept.

    Raises:
        ValueError: `sigmas` and `tree` have different numbers of steps.
    """
    if len(sigmas) != tree.num_steps + 1:
        raise ValueError(f"the tree has {tree.num_steps} steps, but the grid has {len(sigmas) - 1}")
    device = sigmas.device
    plan = schedule(tree, batch_size, tail_schedule)
    roots = np.flatnonzero(tree.parent == ROOT)
    initial = noise(tree.prompt[roots], tree.draw[roots])
    latents = torch.empty(plan.num_slots, *initial.shape[1:], dtype=dtype, device=device)
    latents[_index(plan.slot[roots], device)] = initial.to(device, dtype)
    x0_estimates = torch.empty(plan.num_x0_slots, *initial.shape[1:], device=device)
    state = _State(tree, plan, kernel, sigmas, noise, latents, x0_estimates)
    with ExitStack() as stack:
        tail_velocity: TailVelocity | None = None
        for batch in plan.batches:
            x = latents[_index(batch.slot, device)]  # (B, *L)
            sigma = sigmas[_index(tree.grid_index[batch.rows], device)]
            prompt = _index(tree.prompt[batch.rows], device)
            if batch.tail and tail is not None:
                tail_velocity = tail_velocity or stack.enter_context(tail())
                v = tail_velocity(x, sigma, prompt, batch.continues)
            elif keeper is not None:
                v = keeper.evaluate(batch.rows, x, sigma, prompt, velocity)
            else:
                v = velocity(x, sigma, prompt)
            state.add_children(batch, x, sigma, v)
    passes = sum(len(batch.rows) for batch in plan.batches)
    calls = len(plan.batches) + (keeper.more_calls if keeper else 0)
    return Rollout(tree, latents, plan.slot, passes, calls, keeper.graphs if keeper else [])


def _index(values: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)


@dataclass(frozen=True)
class _State:
    """Latents [S, *L] and x0 estimates of a running rollout."""

    tree: Tree
    plan: Schedule
    kernel: Kernel
    sigmas: Tensor
    noise: Noise
    latents: Tensor
    x0_estimates: Tensor

    def add_children(self, batch: Batch, x: Tensor, sigma: Tensor, v: Tensor) -> None:
        """Compute the children of a batch: rows x [B, *L] at sigma [B] with velocity v [B, *L]."""
        tree, device = self.tree, self.sigmas.device
        steps = (
            (tree.stochastic, self._sde_step),
            (tree.multistep, self._multistep_step),
            (~tree.stochastic & ~tree.multistep, self._ode_step),
        )
        for of_kind, take_step in steps:
            chosen = of_kind[batch.child]
            if not chosen.any():
                continue
            child, source = batch.child[chosen], _index(batch.child_of[chosen], device)
            start = _index(tree.grid_index[tree.parent[child]], device)
            step = Step.on(self.sigmas, start, _index(tree.grid_index[child], device))
            x_next = take_step(x[source], v[source], step, child)
            self.latents[_index(self.plan.slot[child], device)] = x_next.to(self.latents.dtype)
        stores_x0 = self.plan.x0_slot[batch.child] >= 0
        if stores_x0.any():
            x0_hat = x.float() - per_row(sigma, x) * v.float()
            slots = _index(self.plan.x0_slot[batch.child[stores_x0]], device)
            self.x0_estimates[slots] = x0_hat[_index(batch.child_of[stores_x0], device)]

    def _sde_step(self, x: Tensor, v: Tensor, step: Step, child: Ints) -> Tensor:
        noise = self.noise(self.tree.prompt[child], self.tree.draw[child]).to(self.sigmas.device)
        return self.kernel(x, v, step).sample(noise)

    def _multistep_step(self, x: Tensor, v: Tensor, step: Step, child: Ints) -> Tensor:
        tree, device = self.tree, self.sigmas.device
        parent = tree.parent[child]
        sigma_before = self.sigmas[_index(tree.grid_index[tree.parent[parent]], device)]
        x0_before = self.x0_estimates[_index(self.plan.x0_slot[parent], device)]
        return multistep(x, v, step, x0_before, sigma_before)

    def _ode_step(self, x: Tensor, v: Tensor, step: Step, child: Ints) -> Tensor:  # noqa: ARG002
        return ODE()(x, v, step).mean
