"""The clipped surrogate and the KL: values, and gradients against finite differences."""

import torch

from flowgrain.core.objective import Edges, clipped
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
