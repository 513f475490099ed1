"""Kernels against closed forms, and the marginals of Flow-SDE and Dance-SDE on an analytic mixture."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowgrain.core.sde import CPS, ODE, CalibratedSDE, DanceSDE, FlowSDE, Gaussian, Step, sigma_grid

KERNELS = [FlowSDE(0.7), DanceSDE(0.3), CPS(0.7), CalibratedSDE([0.5] * 8)]


def a_step(index: int, steps: int = 8, rows: int = 3) -> Step:
    return Step.on(sigma_grid(steps), torch.full((rows,), index), torch.full((rows,), index + 1))


def test_grid_of_the_papers():
    expected = [1, 0.978, 0.955, 0.929, 0.9, 0.868, 0.833, 0.794, 0.75, 0.7, 0.643, 0.577, 0.5, 0.409, 0.3, 0.167, 0]
    torch.testing.assert_close(sigma_grid(16, 3.0), torch.tensor(expected), atol=5e-4, rtol=0)


@given(steps=st.integers(2, 40), shift=st.floats(0.5, 8), eta=st.floats(0.1, 1.5))
def test_flow_sde_starts_with_std_eta(steps, shift, eta):
    sigmas = sigma_grid(steps, shift)
    law = FlowSDE(eta)(torch.zeros(1, 4), torch.zeros(1, 4), Step.on(sigmas, torch.tensor([0]), torch.tensor([1])))
    assert law.std.item() == pytest.approx(eta, rel=1e-4)


@pytest.mark.parametrize("kernel", [FlowSDE(0.0), DanceSDE(0.0), CPS(0.0), CalibratedSDE([0.0] * 8)])
@pytest.mark.parametrize("index", [0, 3, 6])
def test_without_noise_every_kernel_is_the_ode(kernel, index):
    x, v = torch.randn(3, 5), torch.randn(3, 5)
    law, ode = kernel(x, v, a_step(index)), ODE()(x, v, a_step(index))
    torch.testing.assert_close(law.mean, ode.mean, atol=2e-6, rtol=1e-5)  # another order of fp32 operations
    assert (law.std == 0).all()


def test_flow_sde_mean_by_hand():
    x, v, step = torch.randn(3, 5), torch.randn(3, 5), a_step(3)
    sigma, dt = step.sigma[0].item(), step.dt[0].item()
    s = 0.7 * (sigma / (1 - sigma)) ** 0.5
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    law = FlowSDE(0.7)(x, v, step)
    torch.testing.assert_close(law.mean, mean, atol=1e-6, rtol=1e-5)
    assert law.std[0].item() == pytest.approx(s * (-dt) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("index", range(7))
def test_cps_keeps_the_variance(index):
    """The noise in the mean and the fresh noise add up to sigma_next: for x0 = 0, x = sigma eps, the mean is kept * eps."""
    step, eps = a_step(index), torch.randn(3, 5)
    law = CPS(0.6)(step.sigma[:, None] * eps, eps, step)
    kept = (law.mean / eps)[:, 0]
    torch.testing.assert_close(kept.square() + law.std.square(), step.sigma_next.square(), atol=1e-5, rtol=1e-4)


def test_log_prob_is_the_mean_over_dimensions():
    law = Gaussian(torch.randn(4, 2, 3), torch.tensor([0.1, 0.5, 1.0, 2.0]))
    x = torch.randn(4, 2, 3)
    expected = torch.distributions.Normal(law.mean, law.std[:, None, None]).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(law.log_prob(x), expected, atol=1e-5, rtol=1e-5)


def test_kl_against_torch():
    a, b = (Gaussian(torch.randn(4, 6), torch.full((4,), 0.3)) for _ in range(2))
    normals = [torch.distributions.Normal(g.mean, g.std[:, None]) for g in (a, b)]
    expected = torch.distributions.kl_divergence(*normals).mean(1)
    torch.testing.assert_close(a.kl(b), expected)


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), DanceSDE(0.5)])
def test_marginals_are_preserved_on_a_mixture(kernel):
    """x0 is -1 or 1 with spread 0.3: after many small steps the law at sigma = 0 is the ODE's, and so the data's."""
    generator = torch.Generator().manual_seed(0)
    steps, rows = 400, 20000
    sigmas = sigma_grid(steps, 1.0)

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        mean, variance = torch.tensor([-1.0, 1.0]), 0.3**2
        total = (1 - sigma) ** 2 * variance + sigma**2
        gap = x[:, :1] - (1 - sigma) * mean
        weight = torch.softmax(-gap.square() / (2 * total), 1)
        x0 = (weight * (mean + (1 - sigma) * variance / total * gap)).sum(1, keepdim=True)
        return (x - x0) / sigma

    x = torch.randn(rows, 1, generator=generator)
    for i in range(steps):
        step = Step.on(sigmas, torch.full((rows,), i), torch.full((rows,), i + 1))
        law = (kernel if i < steps - 1 else ODE())(x, velocity(x, sigmas[i]), step)
        x = law.sample(torch.randn(rows, 1, generator=generator))
    right = x > 0
    assert right.float().mean().item() == pytest.approx(0.5, abs=0.02)  # 6 standard errors of 20,000 draws
    assert x[right].mean().item() == pytest.approx(1.0, abs=0.02)
    assert x[right].std().item() == pytest.approx(0.3, abs=0.03)  # the step size leaves a bias of about .01
