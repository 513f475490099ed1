"""Golden numbers of objectives: ratios, losses and gradients in the velocity."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from golden.comparison import comparison, golden, tensor
from torch import Tensor

from flowgrain.core.objective import EdgeLoss, Edges, Objective, clipped
from flowgrain.core.sde import FlowSDE, Gaussian, Step, sigma_grid
from flowgrain.methods import build_method

LOSS = "fp32 ratio of two log-probabilities, times the advantage"
RATIO = "difference of two fp32 log-probabilities"

FLOW_GRPO = "yifan123/flow_grpo ac4c86e, train_sd3.py"
FACTORY = "X-GenGroup/Flow-Factory a0b2bc5"
VERL = "verl-project/verl-omni a1139ba"
MIXGRPO = "Tencent-Hunyuan/MixGRPO e5cdd6a, train_one_step"
DANCEGRPO = "XueZeyue/DanceGRPO 15cc71d, train_one_step"
GRANULAR = "bcmi/Granular-GRPO cae0961, train_one_step"

CLIP = 5.0  # published clamp of advantages

Cases = Iterator[tuple[str, Any, Any]]


class StepCase:
    """Rows at one grid step: an old, a trained and a reference velocity, and an advantage."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.golden = case
        self.x, self.x_next = tensor(case["x"]), tensor(case["next"])
        self.kernel = FlowSDE(case["eta"])
        self.rows = len(self.x_next)
        index = torch.full((self.rows,), case.get("index", case.get("k")))
        if "timestep" in case:
            sigma, sigma_next = (tensor(case[key]) / 1000 for key in ("timestep", "timestep_next"))
            self.step = Step(sigma, sigma_next, index)
        else:
            grid = tensor(case["sigmas"]) if "sigmas" in case else sigma_grid(case["num_steps"])
            self.step = Step.on(grid, index, index + 1)

    def transition(self, v: Tensor) -> Gaussian:
        """Transition of the rows, which may share x and v."""
        return self.kernel(self.x.expand_as(self.x_next), v.expand_as(self.x_next), self.step)

    def evaluate(
        self, objective: Objective, clip: float = CLIP
    ) -> tuple[EdgeLoss, Callable[[Tensor], Tensor]]:
        """The result of an objective, and a function from a loss to its gradient in v.

        Advantages are clamped to `clip`.
        """
        v = tensor(self.golden["v"]).requires_grad_()
        reference = self.golden.get("v_ref")
        edges = Edges(
            transition=self.transition(v),
            old_transition=self.transition(tensor(self.golden["v_old"])),
            x_next=self.x_next,
            advantage=tensor(self.golden["advantage"]).clamp(-clip, clip),
            step=self.step,
            reference=None if reference is None else self.transition(tensor(reference)),
        )
        return objective(edges), lambda loss: torch.autograd.grad(loss, v)[0]


def _cases(file: str, key: str = "cases") -> Iterator[tuple[str, StepCase]]:
    for number, case in enumerate(golden(file)[key]):
        yield f"{number} step {case.get('index', case.get('k'))}", StepCase(case)


def _objective(name: str, case: dict[str, Any], **options: Any) -> Objective:
    """The objective of a method with the clip range of a case."""
    method = build_method({"name": name, "clip_range": case["clip_range"], **options})
    return method.objective(sigma_grid(case["num_steps"]))


# Flow-GRPO


@comparison("Flow-GRPO: ratio", "objectives_flow_grpo", FLOW_GRPO, 2e-6, reason=RATIO)
def flow_grpo_ratios() -> Cases:
    for name, case in _cases("objectives_flow_grpo"):
        result, _ = case.evaluate(_objective("flow_grpo", case.golden))
        yield name, result.ratio, case.golden["ratio"]


@comparison(
    "Flow-GRPO: loss, published KL and gradient",
    "objectives_flow_grpo",
    FLOW_GRPO,
    1e-5,
    reason=LOSS,
)
def flow_grpo_losses() -> Cases:
    for name, case in _cases("objectives_flow_grpo"):
        beta = case.golden["beta"]
        result, gradient = case.evaluate(_objective("flow_grpo", case.golden, kl_weight=beta))
        loss = result.loss.mean()
        yield f"{name} loss", loss, case.golden["loss"]
        if beta:
            yield f"{name} kl", result.kl.mean(), case.golden["kl_loss"]
        policy_loss = (result.loss - beta * result.kl).mean()
        yield f"{name} policy loss", policy_loss, case.golden["policy_loss"]
        yield f"{name} gradient", gradient(loss), case.golden["gradient"]


@comparison(
    "KL to the reference: kl_form gaussian",
    "objectives_flow_grpo",
    FLOW_GRPO,
    1e-5,
    deviation="The exact KL of a step divides by its variance s^2 (-dt). The published code "
    "divides by s^2, as kl_form=published does.",
)
def gaussian_kl() -> Cases:
    for name, case in _cases("objectives_flow_grpo"):
        if case.golden["beta"]:
            objective = _objective("flow_grpo", case.golden, kl_form="gaussian")
            yield name, case.evaluate(objective)[0].kl.mean(), case.golden["kl_loss"]


# Flow-Factory and verl-omni


@comparison(
    "Flow-GRPO: ratio, policy loss and gradient",
    "objectives_flow_factory",
    f"{FACTORY}, GRPOTrainer.optimize",
    1e-5,
    reason=LOSS,
)
def factory_losses() -> Cases:
    """Flow-Factory's forms of the KL are added here to the loss."""
    for name, case in _cases("objectives_flow_factory"):
        values = case.golden
        if values["rule"] == "grpo":
            result, gradient = case.evaluate(_objective("flow_grpo", values, kl_weight=0.0))
            yield f"{name} ratio", result.ratio, values["ratio"]
            policy_loss = result.loss.mean()
            yield f"{name} policy loss", policy_loss, values["policy_loss"]
            yield f"{name} gradient", gradient(policy_loss) + _kl_gradient(case), values["gradient"]


def _kl_gradient(case: StepCase) -> Tensor:
    """Gradient in v of Flow-Factory's KL: squared distance of velocities or of means."""
    v = tensor(case.golden["v"]).requires_grad_()
    pair = v, tensor(case.golden["v_ref"])
    if case.golden["kl_type"] == "x-based":
        pair = tuple(case.transition(velocity).mean for velocity in pair)
    kl = (pair[0] - pair[1]).square().mean()
    return torch.autograd.grad(case.golden["kl_beta"] * kl, v)[0]


@comparison(
    "GRPO-Guard: ratio, and loss times -dt",
    "objectives_flow_factory",
    f"{FACTORY}, GRPOGuardTrainer.optimize",
    1e-5,
    reason=LOSS,
)
def factory_guard() -> Cases:
    for name, case in _cases("objectives_flow_factory"):
        values = case.golden
        if values["rule"] == "guard":
            result, gradient = case.evaluate(_objective("grpo_guard", values))
            loss = (result.loss * -case.step.dt).mean()
            yield f"{name} ratio", result.ratio, values["ratio"]
            yield f"{name} loss", loss, values["loss"]
            yield f"{name} gradient", gradient(loss), values["gradient"]


@comparison(
    "GRPO-Guard: loss of Flow-Factory",
    "objectives_flow_factory",
    f"{FACTORY}, GRPOGuardTrainer.optimize",
    1e-5,
    deviation="Flow-Factory does not divide the loss by -dt. flowgrain divides, as verl-omni does.",
)
def factory_guard_scale() -> Cases:
    for name, case in _cases("objectives_flow_factory"):
        if case.golden["rule"] == "guard":
            result, _ = case.evaluate(_objective("grpo_guard", case.golden))
            yield name, result.loss.mean(), case.golden["loss"]


def _verl_losses(method: str, function: str) -> Cases:
    for name, case in _cases("objectives_trust_region"):
        values = case.golden[function]
        result, gradient = case.evaluate(_objective(method, case.golden, kl_weight=0.0))
        loss = result.loss.mean()
        yield f"{name} loss", loss, values["loss"]
        yield f"{name} gradient", gradient(loss), values["gradient"]
        yield f"{name} ratio", result.ratio.mean(), values["ratio_mean"]


@comparison(
    "Flow-GRPO: loss, gradient and mean ratio",
    "objectives_trust_region",
    f"{VERL}, FlowGRPOLoss",
    1e-5,
    reason=LOSS,
)
def verl_flow_grpo() -> Cases:
    yield from _verl_losses("flow_grpo", "FlowGRPOLoss")


@comparison(
    "GRPO-Guard: loss, gradient and mean ratio",
    "objectives_trust_region",
    f"{VERL}, GRPOGuardLoss",
    1e-5,
    reason=LOSS,
)
def verl_guard() -> Cases:
    yield from _verl_losses("grpo_guard", "GRPOGuardLoss")


def _dppo_objective(case: StepCase) -> Objective:
    """Flow-DPPO's objective with the threshold of a case."""
    threshold = case.golden["kl_mask_threshold"]
    method = build_method({"name": "flow_dppo", "trust_region": threshold})
    return method.objective(sigma_grid(case.golden["num_steps"]))


@comparison(
    "Flow-DPPO: loss, gradient and mean ratio",
    "objectives_trust_region",
    f"{VERL}, FlowDPPOLoss",
    1e-5,
    reason=LOSS,
)
def verl_flow_dppo() -> Cases:
    """The published loss does not clamp advantages. flowgrain clamps them in `combine`."""
    for name, case in _cases("objectives_trust_region"):
        values = case.golden["FlowDPPOLoss"]
        result, gradient = case.evaluate(_dppo_objective(case), clip=math.inf)
        loss = result.loss.mean()
        yield f"{name} loss", loss, values["loss"]
        yield f"{name} gradient", gradient(loss), values["gradient"]
        yield f"{name} ratio", result.ratio.mean(), values["ratio_mean"]


@comparison(
    "Flow-DPPO: loss of every row",
    "objectives_trust_region",
    "Tencent-Hunyuan/UniRL 1a7b501, _flowdppo_kl_adv_loss",
    1e-5,
    reason=LOSS,
)
def unirl_flow_dppo() -> Cases:
    for name, case in _cases("objectives_trust_region"):
        result, _ = case.evaluate(_dppo_objective(case), clip=math.inf)
        values = case.golden["unirl_flow_dppo"]
        yield f"{name} loss", result.loss, values["loss_per_row"]
        yield f"{name} dropped", result.clipped.float().mean(), values["masked_fraction"]


# Granular-GRPO


@comparison(
    "G2RPO: loss of a stochastic step, and gradient in the shared velocity",
    "granular_credit",
    GRANULAR,
    1e-5,
    reason=LOSS,
)
def granular_losses() -> Cases:
    for name, case in _cases("granular_credit", "losses"):
        values = case.golden
        result, gradient = case.evaluate(_objective("g2rpo", values))
        yield f"{name} ratio", result.ratio, values["ratio"]
        loss = result.loss.mean()
        yield f"{name} loss", loss, values["loss"]
        yield f"{name} gradient", gradient(loss), values["gradient"]


# From log-probabilities alone


@dataclass
class GivenLogProb:
    """A transition whose log-probability [B] is given."""

    value: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        return self.value


def _given(case: dict[str, Any], log_prob: Tensor, advantage: Tensor) -> Edges:
    rows = torch.zeros(len(log_prob))
    old = GivenLogProb(tensor(case["old_log_prob"]))
    step = Step(rows, rows, rows.long())
    return Edges(GivenLogProb(log_prob), old, rows, advantage.clamp(-CLIP, CLIP), step)


def _policy_losses(scale: float) -> Iterator[tuple[str, Tensor, Tensor, dict[str, Any]]]:
    """Policy loss times `scale`, the log-probabilities, and the golden case."""
    for number, case in enumerate(golden("objectives_log_prob")["cases"]):
        log_prob = tensor(case["log_prob"]).requires_grad_()
        edges = _given(case, log_prob, tensor(case["advantage"]))
        yield str(number), clipped(case["clip_range"])(edges).loss.mean() * scale, log_prob, case


@comparison("DanceGRPO: loss and gradient", "objectives_log_prob", DANCEGRPO, 1e-5, reason=LOSS)
def dancegrpo_losses() -> Cases:
    """Published: divided by 3 samples of an update and 9 steps."""
    for name, loss, log_prob, case in _policy_losses(1 / (3 * 9)):
        expected = case["dancegrpo"]
        yield f"{name} loss", loss, expected["loss"]
        gradient = torch.autograd.grad(loss, log_prob)[0]
        yield f"{name} gradient", gradient, expected["gradient_of_log_prob"]


@comparison("MixGRPO: policy loss and gradient", "objectives_log_prob", MIXGRPO, 1e-5, reason=LOSS)
def mixgrpo_losses() -> Cases:
    """Published: divided by 3 samples of an update and 4 steps. The penalty is added here."""
    for name, loss, log_prob, case in _policy_losses(1 / (3 * 4)):
        log_ratio = log_prob - tensor(case["old_log_prob"])
        total = loss + 0.1 * log_ratio.square().mean() / 2 / (3 * 4)
        yield f"{name} loss", total, case["mixgrpo"]["loss"]
        gradient = torch.autograd.grad(total, log_prob)[0]
        yield f"{name} gradient", gradient, case["mixgrpo"]["gradient_of_log_prob"]


@comparison(
    "MixGRPO: loss",
    "objectives_log_prob",
    MIXGRPO,
    1e-5,
    deviation="The published code adds 0.1 mean (log r)^2 / 2 to the policy loss. flowgrain does "
    "not. The gradient of the term is 0 at the first update of a rollout.",
)
def mixgrpo_losses_with_penalty() -> Cases:
    for name, loss, _, case in _policy_losses(1 / (3 * 4)):
        yield name, loss, case["mixgrpo"]["loss"]


@comparison(
    "DanceGRPO: loss of two rewards",
    "objectives_log_prob",
    "XueZeyue/DanceGRPO 15cc71d, train_grpo_hunyuan.py",
    1e-5,
    deviation="The published code clips one loss per reward and adds them. flowgrain clips the "
    "loss of the weighted sum of advantages. They are equal where no clip is active.",
)
def two_rewards() -> Cases:
    for number, case in enumerate(golden("objectives_log_prob")["cases"]):
        advantage = 0.7 * tensor(case["advantage"]) + 1.4 * tensor(case["second_advantage"])
        edges = _given(case, tensor(case["log_prob"]), advantage)
        loss = clipped(case["clip_range"])(edges).loss.mean() / (3 * 9)
        yield str(number), loss, case["dancegrpo_two_rewards"]["loss"]
