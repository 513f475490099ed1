"""Golden numbers of single steps: Flow-GRPO, Flow-CPS and Flow-Factory."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from golden.comparison import comparison, golden, tensor

from flowgrain.core.objective import Edges
from flowgrain.core.sde import CPS, ODE, DanceSDE, FlowSDE, Gaussian, Kernel, Step

SINGLE = "one fp32 step"
LOG_PROB = "squared fp32 differences of the state and the mean"
RATIO = "difference of two fp32 log-probabilities"

FLOW_GRPO = "yifan123/flow_grpo ac4c86e, sde_step_with_logprob"
NEWER = "YunzeTong/TurningPoint-GRPO 994d26a, sde_step_with_logprob"
FLOW_CPS = "IamCreateAI/FlowCPS b402c7a, sde_step_with_logprob"
FACTORY = "X-GenGroup/Flow-Factory a0b2bc5, FlowMatchEulerDiscreteSDEScheduler.step"

Cases = Iterator[tuple[str, Any, Any]]


# Flow-GRPO and Flow-CPS


class FlowGRPOCase:
    """A case of kernels_flow_grpo.json with the transition of flowgrain's kernel."""

    def __init__(self, number: int, case: dict[str, Any], squared_error: bool = True) -> None:
        inputs = golden("kernels_flow_grpo")["inputs"][case["kind"]][case["input"]]
        self.x, self.v, self.noise = (tensor(inputs[name]) for name in ("x", "v", "noise"))
        self.x_next = tensor(case["next"])
        index = torch.tensor(case["index"])
        self.step = Step.on(tensor(case["sigmas"]), index, index + 1)
        cps = case["variant"].startswith("cps")
        self.kernel: Kernel = CPS(case["eta"], squared_error) if cps else FlowSDE(case["eta"])
        self.transition = self.kernel(self.x, self.v, self.step)
        self.golden = case
        self.name = f"{case['variant']} {number}"

    @property
    def std(self) -> torch.Tensor:
        """Golden std [B]. The published function returns s for Flow-SDE and the std for CPS."""
        std = tensor(self.golden["std_dev_t"])
        return std if isinstance(self.kernel, CPS) else std * (-self.step.dt).sqrt()

    @property
    def ratio(self) -> torch.Tensor:
        """Ratio [B] of the policies 1.01 v and v."""
        other = self.kernel(self.x, 1.01 * self.v, self.step)
        zeros = torch.zeros(len(self.x))
        return Edges(other, self.transition, self.x_next, zeros, self.step).log_ratio.exp()

    @property
    def golden_ratio(self) -> list[float]:
        """The same ratio from the golden log-probabilities."""
        pairs = zip(self.golden["log_prob_v_times_1.01"], self.golden["log_prob"], strict=True)
        return [math.exp(new - old) for new, old in pairs]


def flow_grpo_cases(*variants: str, **options: bool) -> list[FlowGRPOCase]:
    cases = golden("kernels_flow_grpo")["cases"]
    return [
        FlowGRPOCase(number, case, **options)
        for number, case in enumerate(cases)
        if case["variant"] in variants
    ]


def _states(*variants: str) -> Cases:
    for case in flow_grpo_cases(*variants):
        yield f"{case.name} mean", case.transition.mean, case.golden["mean"]
        yield f"{case.name} next", case.transition.sample(case.noise), case.golden["next"]
        yield f"{case.name} std", case.transition.std, case.std


def _log_probs(*variants: str) -> Cases:
    for case in flow_grpo_cases(*variants):
        yield f"{case.name}", case.transition.log_prob(case.x_next), case.golden["log_prob"]


def _ratios(*variants: str) -> Cases:
    for case in flow_grpo_cases(*variants):
        yield f"{case.name}", case.ratio, case.golden_ratio


@comparison("Flow-SDE: state", "kernels_flow_grpo", FLOW_GRPO, 1e-5, reason=SINGLE)
def flow_sde_states() -> Cases:
    yield from _states("sde")


@comparison("Flow-SDE: log-probability", "kernels_flow_grpo", FLOW_GRPO, 1e-5, reason=LOG_PROB)
def flow_sde_log_probs() -> Cases:
    yield from _log_probs("sde")


@comparison("Flow-SDE: ratio under 1.01 v", "kernels_flow_grpo", FLOW_GRPO, 2e-6, reason=RATIO)
def flow_sde_ratios() -> Cases:
    yield from _ratios("sde")


@comparison("Flow-SDE, newer file: state", "kernels_flow_grpo", NEWER, 1e-5, reason=SINGLE)
def newer_states() -> Cases:
    yield from _states("sde_newer")


@comparison(
    "Flow-SDE, newer file: log-probability", "kernels_flow_grpo", NEWER, 1e-5, reason=LOG_PROB
)
def newer_log_probs() -> Cases:
    yield from _log_probs("sde_newer")


@comparison(
    "Flow-SDE, newer file: ratio under 1.01 v", "kernels_flow_grpo", NEWER, 2e-6, reason=RATIO
)
def newer_ratios() -> Cases:
    yield from _ratios("sde_newer")


@comparison("CPS: state", "kernels_flow_grpo", f"{FLOW_CPS}; {NEWER}", 1e-5, reason=SINGLE)
def cps_states() -> Cases:
    yield from _states("cps", "cps_official")


@comparison(
    "CPS: log-probability, squared_error",
    "kernels_flow_grpo",
    f"{FLOW_CPS}; {NEWER}",
    1e-5,
    reason=LOG_PROB,
)
def cps_log_probs() -> Cases:
    yield from _log_probs("cps", "cps_official")


@comparison(
    "CPS: ratio under 1.01 v, squared_error",
    "kernels_flow_grpo",
    f"{FLOW_CPS}; {NEWER}",
    2e-6,
    reason=RATIO,
)
def cps_ratios() -> Cases:
    yield from _ratios("cps", "cps_official")


@comparison(
    "CPS: log-probability, gaussian",
    "kernels_flow_grpo",
    f"{FLOW_CPS}; {NEWER}",
    1e-5,
    deviation="The option gaussian is the log-density of the step. The published code omits the "
    "variance and the constants, as the option squared_error does.",
)
def cps_gaussian_log_probs() -> Cases:
    for case in flow_grpo_cases("cps", "cps_official", squared_error=False):
        if (case.transition.std > 0).all():
            ours = case.transition.log_prob(case.x_next)
            yield case.name, ours, case.golden["log_prob"]


# Flow-Factory


def _factory_cases(dynamics: str) -> Iterator[tuple[str, dict[str, Any], Gaussian, torch.Tensor]]:
    file = golden("kernels_flow_factory")
    kernels: dict[str, Any] = {
        "Flow-SDE": FlowSDE,
        "Dance-SDE": DanceSDE,
        "CPS": lambda eta: CPS(eta, squared_error=True),
        "ODE": lambda eta: ODE(),
    }
    for number, case in enumerate(file["cases"]):
        if case["dynamics"] == dynamics:
            inputs = file["inputs"][case["input"]]
            x, v, noise = (tensor(inputs[name]) for name in ("x", "v", "noise"))
            sigma, sigma_next = (
                tensor(case[name]) / 1000 for name in ("timestep", "timestep_next")
            )
            step = Step(sigma, sigma_next, torch.tensor(case["index"]))
            transition = kernels[dynamics](case["eta"])(x, v, step)
            yield f"{dynamics} {number}", case, transition, noise


@comparison("Kernels: state", "kernels_flow_factory", FACTORY, 1e-5, reason=SINGLE)
def factory_states() -> Cases:
    for dynamics in ("Flow-SDE", "Dance-SDE", "CPS", "ODE"):
        for name, case, transition, noise in _factory_cases(dynamics):
            yield f"{name} mean", transition.mean, case["mean"]
            yield f"{name} next", transition.sample(noise), case["next"]
            std = tensor(case["std_dev_t"])
            if dynamics in ("Flow-SDE", "Dance-SDE"):
                std = std * (-tensor(case["dt"])).sqrt()
            yield f"{name} std", transition.std, std


@comparison("Kernels: log-probability", "kernels_flow_factory", FACTORY, 1e-5, reason=LOG_PROB)
def factory_log_probs() -> Cases:
    for dynamics in ("Flow-SDE", "Dance-SDE", "CPS"):
        for name, case, transition, _ in _factory_cases(dynamics):
            yield name, transition.log_prob(tensor(case["next"])), case["log_prob"]
