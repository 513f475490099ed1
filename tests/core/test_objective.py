"""Surrogates and the KL: values, dropped terms, and gradients against finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrain.core.objective import Edges, clipped, divergence_masked, score_function
from flowgrain.core.sde import FlowSDE, Gaussian, Step, sigma_grid


def edges(theta: torch.Tensor, reference: bool = False) -> Edges:
    """Two edges of a policy with two parameters, v = theta[0] x + theta[1]."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(2, 3, generator=generator) for _ in range(2))
    step = Step.on(sigma_grid(8), torch.tensor([1, 4]), torch.tensor([2, 5]))

    def transition(t: torch.Tensor) -> Gaussian:
        return FlowSDE()(x, t[0] * x + t[1], step)

    old = transition(torch.tensor([0.3, -0.1]))
    frozen = transition(torch.tensor([0.2, 0.2])) if reference else None
    advantage = torch.tensor([1.5, -0.7])
    return Edges(transition(theta), old, old.sample(noise), advantage, step, frozen)


def test_surrogate_and_clip():
    unchanged = clipped(1e-4)(edges(torch.tensor([0.3, -0.1])))
    assert torch.equal(unchanged.ratio, torch.ones(2))
    torch.testing.assert_close(unchanged.loss, torch.tensor([-1.5, 0.7]))
    assert not unchanged.clipped.any()
    moved = clipped(1e-4)(edges(torch.tensor([0.5, 0.4])))
    for i in range(2):
        ratio, advantage = moved.ratio[i].item(), (1.5, -0.7)[i]
        bound = min(max(ratio, 1 - 1e-4), 1 + 1e-4)
        assert abs(moved.loss[i].item() + min(ratio * advantage, bound * advantage)) < 1e-6
        assert bool(moved.clipped[i]) == (bound * advantage < ratio * advantage)


def test_gradient_against_finite_differences():
    objective = clipped(10.0, kl_weight=0.3)
    theta = torch.tensor([0.31, -0.12], requires_grad=True)
    objective(edges(theta, reference=True)).loss.sum().backward()
    for i in range(2):
        h = torch.zeros(2)
        h[i] = 1e-2
        up, down = (
            objective(edges(theta.detach() + sign * h, reference=True)).loss.sum().item()
            for sign in (1, -1)
        )
        numeric = (up - down) / 2e-2
        # 2e-3: fp32 differences with a step of 0.01.
        assert abs(theta.grad[i].item() - numeric) < 2e-3 * max(1, abs(numeric))


def test_kl_has_a_gradient_and_two_forms():
    theta = torch.tensor([0.3, -0.1], requires_grad=True)
    exact = clipped(1e-4, 0.04)(edges(theta, reference=True))
    exact.kl.sum().backward()
    assert theta.grad.abs().min() > 0
    published = clipped(1e-4, 0.04, "published")(edges(theta, reference=True))
    torch.testing.assert_close(published.kl, exact.kl * -edges(theta).step.dt)


parameters = st.floats(-1, 1, width=32)


@settings(max_examples=60, deadline=None)
@given(values=st.tuples(parameters, parameters), exponent=st.integers(-8, 0))
def test_a_dropped_term_is_far_and_has_moved_in_the_direction_of_its_advantage(values, exponent):
    """Flow-DPPO: no other term is dropped, and a dropped term has no gradient."""
    region = 10.0**exponent
    theta = torch.tensor(values, requires_grad=True)
    given_edges = edges(theta)
    result = divergence_masked(region)(given_edges)
    for i, advantage in enumerate((1.5, -0.7)):
        mean, old = given_edges.transition.mean[i].detach(), given_edges.old_transition.mean[i]
        std, ratio = given_edges.transition.std[i], result.ratio[i].item()
        divergence = float((mean - old).square().mean() / (2 * std**2))
        assert math.isclose(math.log(ratio), float(given_edges.log_ratio[i].detach()), abs_tol=1e-6)
        toward = ratio > 1 if advantage > 0 else ratio < 1
        if not math.isclose(divergence, region, rel_tol=1e-4):
            assert bool(result.clipped[i]) == (divergence > region and toward)
        expected = 0.0 if result.clipped[i] else -ratio * advantage
        assert math.isclose(float(result.loss[i]), expected, rel_tol=1e-5, abs_tol=1e-7)
        gradient = torch.autograd.grad(result.loss[i], theta, retain_graph=True)[0]
        if result.clipped[i]:
            assert torch.equal(gradient, torch.zeros(2))


def test_no_term_is_dropped_before_the_first_update():
    result = divergence_masked(1e-30)(edges(torch.tensor([0.3, -0.1])))
    assert not result.clipped.any()
    torch.testing.assert_close(result.loss, torch.tensor([-1.5, 0.7]))


def test_a_dropped_term_keeps_its_kl():
    theta = torch.tensor([-0.3, -0.6], requires_grad=True)
    result = divergence_masked(1e-6, kl_weight=0.3)(edges(theta, reference=True))
    assert result.clipped.any()
    dropped = int(result.clipped.nonzero()[0])
    torch.testing.assert_close(result.loss[dropped], 0.3 * result.kl[dropped])


@pytest.mark.parametrize("theta", [[0.3, -0.1], [0.5, 0.4]])
def test_the_score_function_has_the_gradient_of_the_log_probability(theta):
    theta = torch.tensor(theta, requires_grad=True)
    given_edges = edges(theta)
    result = score_function()(given_edges)
    assert torch.equal(result.ratio, torch.ones(2))
    assert torch.equal(result.loss.detach(), -given_edges.advantage)
    log_prob = given_edges.transition.log_prob(given_edges.x_next)
    expected = torch.autograd.grad(
        -(given_edges.advantage * log_prob).sum(), theta, retain_graph=True
    )[0]
    gradient = torch.autograd.grad(result.loss.sum(), theta)[0]
    torch.testing.assert_close(gradient, expected)


def test_the_score_function_equals_ppo_at_the_old_policy():
    gradients = []
    for objective in (score_function(0.2), clipped(1e-4, 0.2)):
        theta = torch.tensor([0.3, -0.1], requires_grad=True)
        objective(edges(theta, reference=True)).loss.sum().backward()
        gradients.append(theta.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
