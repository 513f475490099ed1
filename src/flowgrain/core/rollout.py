"""The executor: fills a tree with latents. Its one law: the velocity of a state is computed at most once.

Shapes: N rows, B rows of a pass, K children, S slots, *L latent.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowgrain.core.sde import ODE, Kernel, Step, multistep, per_row
from flowgrain.core.tree import ROOT, Ints, Pass, Tails, Tree, schedule

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""velocity(x [B, *L], sigma [B] fp32, prompt [B] index) -> v [B, *L]."""

Tail = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""tail(x [B, *L], sigma [B] fp32, prompt [B] index, follows) -> v [B, *L]; follows: these rows are the last call's, a step on."""

Noise = Callable[[Ints, Ints], Tensor]
"""noise(prompt [K], draw [K]) -> standard normal [K, *L], a function of its arguments alone."""


@dataclass(frozen=True)
class Rollout:
    """A tree with its latents: those of the leaves, of the trained edges and of their parents; the others are gone.

    latents [S, *L]; slot [N] the place of a row's latent; forward_passes the rows that went through the model;
    batches the number of model calls they took.
    """

    tree: Tree
    latents: Tensor
    slot: Ints
    forward_passes: int
    batches: int

    def at(self, rows: Ints) -> Tensor:
        """Latents [len(rows), *L] of leaves, trained edges or their parents."""
        return self.latents[torch.from_numpy(self.slot[rows]).to(self.latents.device)]


def join(tree: Tree, parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of consecutive prompts as one of `tree`, which has the rows of all of them in this order."""
    starts = np.cumsum([0, *(len(part.latents) for part in parts)])
    return Rollout(
        tree,
        torch.cat([part.latents for part in parts]),
        np.concatenate([part.slot + start for part, start in zip(parts, starts, strict=False)]),
        sum(part.forward_passes for part in parts),
        sum(part.batches for part in parts),
    )


@torch.no_grad()
def rollout(
    tree: Tree,
    velocity: Velocity,
    kernel: Kernel,
    sigmas: Tensor,
    noise: Noise,
    rows_per_pass: int = 64,
    dtype: torch.dtype = torch.float32,
    tail: Callable[[], AbstractContextManager[Tail]] | None = None,
    tails: Tails = "mixed",
) -> Rollout:
    """Runs `tree` on the grid `sigmas` [T + 1]: every evaluated row exactly once, `rows_per_pass` rows at a time.

    Latents are stored as `dtype`; a stochastic step is rounded to it when stored, so a log-probability taken from the
    stored latents is that of what was fed onward. tail opens another source of velocities for the tree's tails, if `tails` sets
    them apart (see schedule).
    Raises ValueError if the grid's length is not the tree's.
    """
    if len(sigmas) != tree.num_steps + 1:
        raise ValueError(f"the tree has {tree.num_steps} steps, the grid {len(sigmas) - 1}")
    device = sigmas.device
    plan = schedule(tree, rows_per_pass, tails)

    def index(values: Ints) -> Tensor:
        return torch.from_numpy(values).to(device)

    roots = np.flatnonzero(tree.parent == ROOT)
    first = noise(tree.prompt[roots], tree.draw[roots])
    latents = torch.empty(plan.num_slots, *first.shape[1:], dtype=dtype, device=device)
    latents[index(plan.slot[roots])] = first.to(device, dtype)
    memories = torch.empty(plan.num_memories, *first.shape[1:], device=device)
    kinds = {"sde": tree.stochastic, "multistep": tree.multistep, "ode": ~tree.stochastic & ~tree.multistep}

    def make_children(batch: Pass, x: Tensor, sigma: Tensor, v: Tensor) -> None:
        for kind, rows_of_kind in kinds.items():
            of_kind = rows_of_kind[batch.child]
            if not of_kind.any():
                continue
            child, source = batch.child[of_kind], index(batch.child_of[of_kind])
            parent = tree.parent[child]
            step = Step.on(sigmas, index(tree.level[parent]), index(tree.level[child]))
            if kind == "sde":
                drawn = noise(tree.prompt[child], tree.draw[child]).to(device)
                following = kernel(x[source], v[source], step).sample(drawn)
            elif kind == "multistep":
                sigma_before = sigmas[index(tree.level[tree.parent[parent]])]
                following = multistep(x[source], v[source], step, memories[index(plan.memory[parent])], sigma_before)
            else:
                following = ODE()(x[source], v[source], step).mean
            latents[index(plan.slot[child])] = following.to(dtype)
        remembering = plan.memory[batch.child] >= 0
        if remembering.any():
            x0_hat = x.float() - per_row(sigma, x) * v.float()
            memories[index(plan.memory[batch.child[remembering]])] = x0_hat[index(batch.child_of[remembering])]

    with ExitStack() as stack:
        cheap: Tail | None = None
        for batch in plan.passes:
            x = latents[index(batch.slot)]  # (B, *L)
            sigma, prompt = sigmas[index(tree.level[batch.rows])], index(tree.prompt[batch.rows])
            if batch.tail and tail is not None:
                cheap = cheap or stack.enter_context(tail())
                v = cheap(x, sigma, prompt, batch.follows)
            else:
                v = velocity(x, sigma, prompt)
            make_children(batch, x, sigma, v)
    return Rollout(tree, latents, plan.slot, sum(len(batch.rows) for batch in plan.passes), len(plan.passes))
