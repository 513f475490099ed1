"""The executor on random plans: planned = executed passes, and the images of a naive executor that shares nothing."""

from contextlib import contextmanager

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrain.data import keyed_noise, latent_noise
from flowgrain.core.rollout import rollout
from flowgrain.core.sde import ODE, FlowSDE, Step, multistep, sigma_grid
from flowgrain.core.tree import ROOT, Planner, Tree, cost

SHAPE = (2, 3)


def velocity(x, sigma, prompt):
    return torch.sin(3 * x) + sigma[:, None, None] * x + 0.1 * prompt[:, None, None]


@st.composite
def trees(draw) -> Tree:
    planner = Planner(draw(st.integers(2, 7)), draw(st.sampled_from(["stride", "exact"])))
    nodes = [(planner.root(), 0) for _ in range(draw(st.integers(1, 2)))]
    for _ in range(draw(st.integers(0, 8))):
        node, level = draw(st.sampled_from(nodes))
        if level >= planner.num_steps - 1:
            continue
        if draw(st.booleans()):
            nodes += [(child, level + 1) for child in planner.sde(node, draw(st.integers(1, 3)))]
        else:
            nodes.append((planner.ode(node, to=level + 1), level + 1))
    for node, _ in nodes:
        planner.image(planner.ode(node, stride=draw(st.integers(1, 3)), order=draw(st.integers(1, 2))), draw(st.integers(0, 1)))
    return planner.tree().repeat(draw(st.integers(1, 3)))


def naive(tree: Tree, row: int, noise, sigmas) -> torch.Tensor:
    """The latent of `row`, one row at a time from its root."""
    parent = int(tree.parent[row])
    fresh = noise(tree.prompt[[row]], tree.draw[[row]]) if tree.draw[row] >= 0 else None
    if parent == ROOT:
        return fresh
    x = naive(tree, parent, noise, sigmas)
    start, end = torch.tensor([tree.level[parent]]), torch.tensor([tree.level[row]])
    if tree.multistep[row]:
        before = int(tree.parent[parent])
        y, t = naive(tree, before, noise, sigmas), torch.tensor([tree.level[before]])
        prompt = torch.tensor([tree.prompt[row]])
        x0_before = y - sigmas[t] * velocity(y, sigmas[t], prompt)
        return multistep(x, velocity(x, sigmas[start], prompt), Step.on(sigmas, start, end), x0_before, sigmas[t])
    law = (FlowSDE() if tree.stochastic[row] else ODE())(
        x, velocity(x, sigmas[start], torch.tensor([tree.prompt[row]])), Step.on(sigmas, start, end)
    )
    return law.sample(fresh) if tree.stochastic[row] else law.mean


@settings(max_examples=40, deadline=None)
@given(tree=trees(), rows_per_pass=st.sampled_from([1, 3, 64]), tails=st.sampled_from(["mixed", "last", "in_company"]))
def test_executed_is_planned_and_images_are_the_naive_ones(tree, rows_per_pass, tails):
    sigmas, noise = sigma_grid(tree.num_steps), keyed_noise(SHAPE, 0)
    seen = 0
    of_tails, opened, followed = [], [], []

    def counted(x, sigma, prompt):
        nonlocal seen
        seen += len(x)
        return velocity(x, sigma, prompt)

    @contextmanager
    def tail():
        opened.append(seen)

        def finish(x, sigma, prompt, follows):
            if follows:
                followed.append(len(x))
                sigma_before, prompt_before = of_tails[-1]
                assert torch.equal(prompt, prompt_before)
                assert (sigma < sigma_before).all()
            of_tails.append((sigma, prompt))
            return counted(x, sigma, prompt)

        yield finish
        opened.append(seen)

    result = rollout(tree, counted, FlowSDE(), sigmas, noise, rows_per_pass, tail=tail, tails=tails)
    if tails != "mixed":  # opened once, after all that a stochastic step depends on, and closed at the end
        noisy = {int(row) for row in np.flatnonzero(tree.stochastic)}
        above = set()
        while noisy:
            noisy = {int(tree.parent[row]) for row in noisy} - {ROOT}
            above |= noisy
        assert opened in ([], [len(above), seen])
        assert sum(len(sigma) for sigma, _ in of_tails) == seen - len(above)
        assert tails == "in_company" or not followed
    assert seen == result.forward_passes == cost(tree).forward_passes
    expected = torch.cat([naive(tree, int(row), noise, sigmas) for row in tree.leaves])
    torch.testing.assert_close(result.at(tree.leaves), expected, atol=1e-5, rtol=1e-5)  # fp32, batched differently
    kept = np.concatenate([tree.edges, tree.trained_parents])
    if len(kept):
        expected = torch.cat([naive(tree, int(row), noise, sigmas) for row in kept])
        torch.testing.assert_close(result.at(kept), expected, atol=1e-5, rtol=1e-5)


def test_noise_depends_on_its_key_alone():
    assert torch.equal(latent_noise(SHAPE, "a", 1), latent_noise(SHAPE, "a", 1))
    assert not torch.equal(latent_noise(SHAPE, "a", 1), latent_noise(SHAPE, "a", 2))
