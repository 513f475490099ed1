"""The executor on random trees, against the plan and a naive executor that shares nothing."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import trees

from flowgrain.core.cost import cost
from flowgrain.core.rollout import rollout
from flowgrain.core.sde import ODE, FlowSDE, Step, multistep, sigma_grid
from flowgrain.core.tree import ROOT, Planner, Tree
from flowgrain.data import keyed_noise, latent_noise

SHAPE = (2, 3)


def velocity(x, sigma, prompt):
    return torch.sin(3 * x) + sigma[:, None, None] * x + 0.1 * prompt[:, None, None]


def naive(tree: Tree, row: int, noise, sigmas) -> torch.Tensor:
    """The latent [1, *L] of `row`, computed row by row from its root."""
    parent = int(tree.parent[row])
    own_noise = noise(tree.prompt[[row]], tree.draw[[row]]) if tree.draw[row] >= 0 else None
    if parent == ROOT:
        return own_noise
    x, prompt = naive(tree, parent, noise, sigmas), torch.tensor([tree.prompt[row]])
    start, end = torch.tensor([tree.grid_index[parent]]), torch.tensor([tree.grid_index[row]])
    v, step = velocity(x, sigmas[start], prompt), Step.on(sigmas, start, end)
    if tree.multistep[row]:
        grandparent = int(tree.parent[parent])
        y = naive(tree, grandparent, noise, sigmas)
        before = torch.tensor([tree.grid_index[grandparent]])
        x0_before = y - sigmas[before] * velocity(y, sigmas[before], prompt)
        return multistep(x, v, step, x0_before, sigmas[before])
    if tree.stochastic[row]:
        return FlowSDE()(x, v, step).sample(own_noise)
    return ODE()(x, v, step).mean


class Counter:
    """A velocity that counts its rows, and a tail that records how it is used."""

    def __init__(self) -> None:
        self.rows = 0
        self.opened_and_closed: list[int] = []
        self.tail_calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.continued = 0

    def velocity(self, x, sigma, prompt):
        self.rows += len(x)
        return velocity(x, sigma, prompt)

    @contextmanager
    def tail(self):
        self.opened_and_closed.append(self.rows)
        yield self._tail_velocity
        self.opened_and_closed.append(self.rows)

    def _tail_velocity(self, x, sigma, prompt, continues):
        if continues:
            self.continued += 1
            sigma_before, prompt_before = self.tail_calls[-1]
            assert torch.equal(prompt, prompt_before)
            assert (sigma < sigma_before).all()
        self.tail_calls.append((sigma, prompt))
        return self.velocity(x, sigma, prompt)


def ancestors_of_noise(tree: Tree) -> set[int]:
    """All rows that a stochastic row depends on."""
    rows = {int(row) for row in np.flatnonzero(tree.stochastic)}
    ancestors: set[int] = set()
    while rows:
        rows = {int(tree.parent[row]) for row in rows} - {ROOT}
        ancestors |= rows
    return ancestors


@settings(max_examples=40, deadline=None)
@given(
    tree=trees(),
    batch_size=st.sampled_from([1, 3, 64]),
    tail_schedule=st.sampled_from(["interleaved", "last", "aligned"]),
)
def test_passes_are_planned_and_latents_are_the_naive_ones(tree, batch_size, tail_schedule):
    sigmas, noise, counter = sigma_grid(tree.num_steps), keyed_noise(SHAPE, 0), Counter()
    result = rollout(
        tree,
        counter.velocity,
        FlowSDE(),
        sigmas,
        noise,
        batch_size,
        tail=counter.tail,
        tail_schedule=tail_schedule,
    )
    if tail_schedule == "interleaved":
        assert not counter.tail_calls
    else:
        # The tail is opened once, after all rows that stochastic steps depend on, and closed last.
        before = len(ancestors_of_noise(tree))
        assert counter.opened_and_closed in ([], [before, counter.rows])
        assert sum(len(sigma) for sigma, _ in counter.tail_calls) == counter.rows - before
        assert tail_schedule == "aligned" or not counter.continued
    assert counter.rows == result.forward_passes == cost(tree).forward_passes
    for rows in (tree.leaves, np.concatenate([tree.edges, tree.trained_parents])):
        if len(rows):
            expected = torch.cat([naive(tree, int(row), noise, sigmas) for row in rows])
            # Batches differ, and so does the rounding of fp32.
            torch.testing.assert_close(result.at(rows), expected, atol=1e-5, rtol=1e-5)


def test_noise_depends_only_on_its_key():
    assert torch.equal(latent_noise(SHAPE, "a", 1), latent_noise(SHAPE, "a", 1))
    assert not torch.equal(latent_noise(SHAPE, "a", 1), latent_noise(SHAPE, "a", 2))


def test_a_grid_of_another_length_is_an_error():
    planner = Planner(4)
    planner.image(planner.ode(planner.root()))
    with pytest.raises(ValueError, match="the tree has 4 steps, but the grid has 5"):
        rollout(planner.tree(), velocity, ODE(), sigma_grid(5), keyed_noise(SHAPE, 0))
