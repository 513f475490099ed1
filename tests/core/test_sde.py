"""Transition kernels against closed forms, and their marginals on an analytic mixture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrain.core.sde import (
    CPS,
    ODE,
    CalibratedSDE,
    DanceSDE,
    FlowSDE,
    Gaussian,
    Step,
    sigma_grid,
)


def grid_step(index: int, num_steps: int = 8, rows: int = 3) -> Step:
    """The grid step `index` for all rows."""
    start = torch.full((rows,), index)
    return Step.on(sigma_grid(num_steps), start, start + 1)


def test_grid_of_the_papers():
    expected = [1, 0.978, 0.955, 0.929, 0.9, 0.868, 0.833, 0.794, 0.75, 0.7, 0.643, 0.577, 0.5]
    expected += [0.409, 0.3, 0.167, 0]
    torch.testing.assert_close(sigma_grid(16, 3.0), torch.tensor(expected), atol=5e-4, rtol=0)


@settings(deadline=None)
@given(num_steps=st.integers(2, 40), shift=st.floats(0.5, 8), eta=st.floats(0.1, 1.5))
def test_flow_sde_starts_with_std_eta(num_steps, shift, eta):
    step = Step.on(sigma_grid(num_steps, shift), torch.tensor([0]), torch.tensor([1]))
    transition = FlowSDE(eta)(torch.zeros(1, 4), torch.zeros(1, 4), step)
    assert transition.std.item() == pytest.approx(eta, rel=1e-4)


@pytest.mark.parametrize(
    "kernel", [FlowSDE(0.0), DanceSDE(0.0), CPS(0.0), CalibratedSDE((0.0,) * 8)]
)
@pytest.mark.parametrize("index", [0, 3, 6])
def test_without_noise_every_kernel_is_the_ode(kernel, index):
    x, v = torch.randn(3, 5), torch.randn(3, 5)
    transition, ode = kernel(x, v, grid_step(index)), ODE()(x, v, grid_step(index))
    # The kernels add their fp32 terms in another order.
    torch.testing.assert_close(transition.mean, ode.mean, atol=2e-6, rtol=1e-5)
    assert (transition.std == 0).all()


def test_flow_sde_mean_by_hand():
    x, v, step = torch.randn(3, 5), torch.randn(3, 5), grid_step(3)
    sigma, dt = step.sigma[0].item(), step.dt[0].item()
    s = 0.7 * (sigma / (1 - sigma)) ** 0.5
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    transition = FlowSDE(0.7)(x, v, step)
    torch.testing.assert_close(transition.mean, mean, atol=1e-6, rtol=1e-5)
    assert transition.std[0].item() == pytest.approx(s * (-dt) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("index", range(7))
def test_cps_keeps_the_variance(index):
    """The noise in the mean and the new noise add up to sigma_next.

    For x0 = 0 the state is x = sigma eps, so the mean is a multiple of eps.
    """
    torch.manual_seed(index)  # the test divides by eps, which must not be tiny
    step, eps = grid_step(index), torch.randn(3, 5)
    transition = CPS(0.6)(step.sigma[:, None] * eps, eps, step)
    kept = (transition.mean / eps)[:, 0]
    total = kept.square() + transition.std.square()
    torch.testing.assert_close(total, step.sigma_next.square(), atol=1e-5, rtol=1e-4)


def test_log_prob_is_the_mean_over_dimensions():
    gaussian = Gaussian(torch.randn(4, 2, 3), torch.tensor([0.1, 0.5, 1.0, 2.0]))
    x = torch.randn(4, 2, 3)
    normal = torch.distributions.Normal(gaussian.mean, gaussian.std[:, None, None])
    expected = normal.log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(gaussian.log_prob(x), expected, atol=1e-5, rtol=1e-5)


def test_kl_against_torch():
    a, b = (Gaussian(torch.randn(4, 6), torch.full((4,), 0.3)) for _ in range(2))
    normals = [torch.distributions.Normal(g.mean, g.std[:, None]) for g in (a, b)]
    expected = torch.distributions.kl_divergence(*normals).mean(1)
    torch.testing.assert_close(a.kl(b), expected)


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), DanceSDE(0.5)])
def test_marginals_are_preserved_on_a_mixture(kernel):
    """After many small steps the samples have the data's distribution: -1 or 1, with spread 0.3."""
    generator = torch.Generator().manual_seed(0)
    num_steps, rows = 400, 20000
    sigmas = sigma_grid(num_steps, 1.0)

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        mean, variance = torch.tensor([-1.0, 1.0]), 0.3**2
        total = (1 - sigma) ** 2 * variance + sigma**2
        distance = x[:, :1] - (1 - sigma) * mean
        posterior = torch.softmax(-distance.square() / (2 * total), 1)
        x0 = mean + (1 - sigma) * variance / total * distance
        x0 = (posterior * x0).sum(1, keepdim=True)
        return (x - x0) / sigma

    x = torch.randn(rows, 1, generator=generator)
    for i in range(num_steps):
        step = Step.on(sigmas, torch.full((rows,), i), torch.full((rows,), i + 1))
        transition = (kernel if i < num_steps - 1 else ODE())(x, velocity(x, sigmas[i]), step)
        x = transition.sample(torch.randn(rows, 1, generator=generator))
    right = x > 0
    # 0.02 is 6 standard errors of 20,000 samples.
    assert right.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert x[right].mean().item() == pytest.approx(1.0, abs=0.02)
    # The step size leaves a bias of about 0.01.
    assert x[right].std().item() == pytest.approx(0.3, abs=0.03)
