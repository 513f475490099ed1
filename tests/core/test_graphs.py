"""A rollout that keeps graphs: the same latents, each wanted row once, within the room."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_trees import trees

from flowgrain.core.graphs import GraphKeeper
from flowgrain.core.rollout import concatenate, rollout
from flowgrain.core.sde import FlowSDE, sigma_grid
from flowgrain.data import keyed_noise

SHAPE = (2, 3)


noise = keyed_noise(SHAPE, 0)


class Model:
    """A velocity with one parameter. It records whether its calls have gradient."""

    def __init__(self):
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.calls = []

    def velocity(self, x, sigma, prompt):
        self.calls.append((len(x), torch.is_grad_enabled()))
        return torch.sin(3 * x) * self.scale + (sigma + 0.1 * prompt)[:, None, None] * x


def executed(tree, model, size, keeper=None):
    sigmas = sigma_grid(tree.num_steps, 3.0)
    return rollout(tree, model.velocity, FlowSDE(), sigmas, noise, size, keeper=keeper)


@given(trees(), st.integers(1, 9), st.integers(1, 4), st.integers(0, 30))
def test_a_keeper_changes_no_latent(tree, size, call_rows, room):
    """The velocity of a row does not depend on the other rows of a call, so latents are equal."""
    model, left = Model(), [room]

    def take_room(rows):
        taken = min(rows, call_rows, left[0])
        left[0] -= taken
        return taken

    wanted = np.zeros(len(tree), dtype=bool)
    wanted[tree.trained_parents] = True
    keeper = GraphKeeper(model.velocity, wanted, take_room)
    kept, plain = executed(tree, model, size, keeper), executed(tree, Model(), size)
    assert torch.equal(kept.latents, plain.latents)
    assert kept.forward_passes == plain.forward_passes == sum(rows for rows, _ in model.calls)
    assert kept.batches == len(model.calls)
    rows = [row for graph in kept.graphs for row in graph.rows.tolist()]
    assert len(rows) == len(set(rows)) == min(room, len(tree.trained_parents))
    assert set(rows) <= set(tree.trained_parents.tolist())
    assert [n for n, gradient in model.calls if gradient] == [len(g.rows) for g in kept.graphs]
    assert all(len(graph.rows) <= call_rows for graph in kept.graphs)
    for graph in kept.graphs:
        x = kept.at(graph.rows)
        (found,) = torch.autograd.grad(graph.velocity.sum(), model.scale)
        torch.testing.assert_close(found, torch.sin(3 * x).sum())
    assert not kept.latents.requires_grad


@given(trees().filter(lambda tree: tree.num_prompts == 1), st.integers(1, 3))
def test_graphs_of_chunks_are_those_of_rows_of_the_whole_tree(tree, copies):
    wanted = np.zeros(len(tree), dtype=bool)
    wanted[tree.trained_parents] = True
    model, parts = Model(), []
    for _ in range(copies):
        keeper = GraphKeeper(model.velocity, wanted, lambda rows: rows)
        parts.append(executed(tree, model, 5, keeper))
    whole = tree.repeat(copies)
    together = concatenate(whole, parts)
    rows = np.sort(np.concatenate([[], *(graph.rows for graph in together.graphs)]))
    assert rows.tolist() == whole.trained_parents.tolist()
    for graph in together.graphs:
        x = together.at(graph.rows)
        sigma = sigma_grid(tree.num_steps, 3.0)[torch.from_numpy(whole.grid_index)]
        prompt = torch.from_numpy(tree.prompt[graph.rows % len(tree)])
        v = Model().velocity(x, sigma[torch.from_numpy(graph.rows)], prompt)
        assert torch.equal(graph.velocity, v)
