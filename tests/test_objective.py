"""The clipped surrogate and the KL: values, gradients against finite differences."""

import torch

from flowgrain.core.objective import Edges, clipped
from flowgrain.core.sde import FlowSDE, Gaussian, Step, sigma_grid


def edges(theta: torch.Tensor, reference: bool = False) -> Edges:
    """Two edges of a policy of two parameters, v = theta[0] x + theta[1], in fp64 as finite differences want."""
    generator = torch.Generator().manual_seed(0)
    x, drawn = (torch.randn(2, 3, generator=generator) for _ in range(2))
    step = Step.on(sigma_grid(8), torch.tensor([1, 4]), torch.tensor([2, 5]))

    def law(t: torch.Tensor) -> Gaussian:
        return FlowSDE()(x, t[0] * x + t[1], step)

    old = law(torch.tensor([0.3, -0.1]))
    following = old.sample(drawn)
    frozen = law(torch.tensor([0.2, 0.2])) if reference else None
    return Edges(law(theta), old, following, torch.tensor([1.5, -0.7]), step, frozen)


def test_surrogate_and_clip():
    found = clipped(1e-4)(edges(torch.tensor([0.3, -0.1])))
    assert torch.equal(found.ratio, torch.ones(2))
    torch.testing.assert_close(found.loss, torch.tensor([-1.5, 0.7]))
    assert not found.clipped.any()
    moved = clipped(1e-4)(edges(torch.tensor([0.5, 0.4])))
    for i in range(2):
        r, a = moved.ratio[i].item(), (1.5, -0.7)[i]
        held = min(max(r, 1 - 1e-4), 1 + 1e-4)
        assert abs(moved.loss[i].item() + min(r * a, held * a)) < 1e-6
        assert bool(moved.clipped[i]) == (held * a < r * a)


def test_gradient_against_finite_differences():
    objective = clipped(10.0, kl_weight=0.3)
    theta = torch.tensor([0.31, -0.12], requires_grad=True)
    objective(edges(theta, reference=True)).loss.sum().backward()
    for i in range(2):
        h = torch.zeros(2)
        h[i] = 1e-2
        up, down = (objective(edges(theta.detach() + sign * h, reference=True)).loss.sum().item() for sign in (1, -1))
        numeric = (up - down) / 2e-2
        assert abs(theta.grad[i].item() - numeric) < 2e-3 * max(1, abs(numeric))  # fp32 differences of step .01


def test_kl_has_a_gradient_and_two_forms():
    theta = torch.tensor([0.3, -0.1], requires_grad=True)
    exact = clipped(1e-4, 0.04)(edges(theta, reference=True))
    exact.kl.sum().backward()
    assert theta.grad.abs().min() > 0
    published = clipped(1e-4, 0.04, "flow_grpo")(edges(theta, reference=True))
    torch.testing.assert_close(published.kl, exact.kl * -edges(theta).step.dt)
