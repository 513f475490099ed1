"""Golden numbers of single steps: MixGRPO, DanceGRPO and Granular-GRPO."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from golden.comparison import comparison, golden, tensor

from flowgrain.core.sde import ODE, DanceSDE, FlowSDE, Gaussian, Step, sigma_grid

NEAR_ONE = "fp32 cancellation in 1 - sigma near sigma = 1"

MIXGRPO = "Tencent-Hunyuan/MixGRPO e5cdd6a"
DANCEGRPO = "XueZeyue/DanceGRPO 15cc71d, flux_step"
GRANULAR = "bcmi/Granular-GRPO cae0961, flow_grpo_step"

Cases = Iterator[tuple[str, Any, Any]]


def constants(transition: Gaussian) -> torch.Tensor:
    """The terms of a Gaussian log-probability that do not depend on the state, [B]."""
    return -transition.std.log() - 0.5 * math.log(2 * math.pi)


class FastVideoCase:
    """A case of kernels_fastvideo.json."""

    def __init__(self, number: int, case: dict[str, Any]) -> None:
        inputs = golden("kernels_fastvideo")["inputs"][case["input"]]
        self.x, self.v, self.noise = (tensor(inputs[name]) for name in ("x", "v", "noise"))
        self.x_next = tensor(case["next"])
        index = torch.full((len(self.x),), case["index"])
        sigmas = sigma_grid(case["num_steps"], case["shift"])
        self.step = Step.on(sigmas, index, index + 1)
        self.golden = case
        self.name = f"{case['function']} {number}"

    def transition(self, kernel: type[FlowSDE] | type[DanceSDE]) -> Gaussian:
        return kernel(self.golden["eta"])(self.x, self.v, self.step)


def fastvideo_cases(function: str) -> list[FastVideoCase]:
    cases = golden("kernels_fastvideo")["cases"]
    return [
        FastVideoCase(number, case)
        for number, case in enumerate(cases)
        if case["function"] == function
    ]


def _stochastic_step(function: str, kernel: type[FlowSDE] | type[DanceSDE]) -> Cases:
    for case in fastvideo_cases(function):
        transition = case.transition(kernel)
        yield f"{case.name} mean", transition.mean, case.golden["mean"]
        yield f"{case.name} next", transition.sample(case.noise), case.golden["next"]
        yield f"{case.name} std", transition.std, [case.golden["std"]] * len(case.x)


def _full_log_prob(function: str, kernel: type[FlowSDE] | type[DanceSDE]) -> Cases:
    for case in fastvideo_cases(function):
        yield case.name, case.transition(kernel).log_prob(case.x_next), case.golden["log_prob"]


@comparison(
    "Flow-SDE: state and x0",
    "kernels_fastvideo",
    f"{MIXGRPO}, flow_grpo_step; {GRANULAR}",
    2e-5,
    reason=NEAR_ONE,
)
def fastvideo_flow_states() -> Cases:
    yield from _stochastic_step("mixgrpo.flow_grpo_step", FlowSDE)
    for case in fastvideo_cases("mixgrpo.flow_grpo_step"):
        to_image = Step(case.step.sigma, torch.zeros_like(case.step.sigma), case.step.index)
        yield f"{case.name} x0", ODE()(case.x, case.v, to_image).mean, case.golden["x0"]
    for case in fastvideo_cases("granular.flow_grpo_step"):
        ours = case.transition(FlowSDE).sample(case.noise)
        yield f"{case.name} next", ours, case.golden["next"]


@comparison(
    "Flow-SDE: log-probability",
    "kernels_fastvideo",
    f"{MIXGRPO}, flow_grpo_step; {GRANULAR}",
    2e-5,
    reason=NEAR_ONE,
)
def fastvideo_flow_log_probs() -> Cases:
    yield from _full_log_prob("mixgrpo.flow_grpo_step", FlowSDE)
    yield from _full_log_prob("granular.flow_grpo_step", FlowSDE)


@comparison(
    "ODE step, and its log-probability under Flow-SDE",
    "kernels_fastvideo",
    f"{MIXGRPO}, flow_grpo_step(determistic=True)",
    2e-5,
    reason=NEAR_ONE,
)
def fastvideo_ode_steps() -> Cases:
    for case in fastvideo_cases("mixgrpo.flow_grpo_step(determistic)"):
        x_next = ODE()(case.x, case.v, case.step).mean
        yield f"{case.name} next", x_next, case.golden["next"]
        log_prob = case.transition(FlowSDE).log_prob(case.x_next)
        yield f"{case.name} log_prob", log_prob, case.golden["log_prob"]


@comparison(
    "Flow-SDE with eta 0 and Euler step",
    "kernels_fastvideo",
    f"{GRANULAR}; {MIXGRPO}, dance_grpo_step(sde_solver=False)",
    2e-5,
    reason=NEAR_ONE,
)
def fastvideo_noiseless_steps() -> Cases:
    for case in fastvideo_cases("granular.flow_grpo_step(eta 0)"):
        yield f"{case.name} next", case.transition(FlowSDE).mean, case.golden["next"]
    for case in fastvideo_cases("mixgrpo.dance_grpo_step(sde_solver=False)"):
        yield f"{case.name} next", ODE()(case.x, case.v, case.step).mean, case.golden["next"]


@comparison(
    "Dance-SDE: state",
    "kernels_fastvideo",
    f"{DANCEGRPO}; {MIXGRPO}, dance_grpo_step",
    2e-5,
    reason=NEAR_ONE,
)
def fastvideo_dance_states() -> Cases:
    yield from _stochastic_step("dancegrpo.flux_step", DanceSDE)
    yield from _stochastic_step("mixgrpo.dance_grpo_step", DanceSDE)


@comparison("Dance-SDE: log-probability", "kernels_fastvideo", DANCEGRPO, 2e-5, reason=NEAR_ONE)
def fastvideo_dance_log_probs() -> Cases:
    yield from _full_log_prob("dancegrpo.flux_step", DanceSDE)


@comparison(
    "Dance-SDE: log-probability without its constants",
    "kernels_fastvideo",
    f"{MIXGRPO}, dance_grpo_step",
    2e-5,
    reason=NEAR_ONE,
)
def mixgrpo_dance_log_probs_without_constants() -> Cases:
    for case in fastvideo_cases("mixgrpo.dance_grpo_step"):
        transition = case.transition(DanceSDE)
        ours = transition.log_prob(case.x_next) - constants(transition)
        yield case.name, ours, case.golden["log_prob"]


@comparison(
    "Dance-SDE: log-probability of MixGRPO",
    "kernels_fastvideo",
    f"{MIXGRPO}, dance_grpo_step",
    2e-5,
    deviation="A line break drops -log std - log sqrt(2 pi) from the published expression. The "
    "terms cancel in the ratio.",
)
def mixgrpo_dance_log_probs() -> Cases:
    yield from _full_log_prob("mixgrpo.dance_grpo_step", DanceSDE)
