"""Golden numbers of MEND: caps, candidates, verdicts, the regression and the controller of tau.

The displaced path state of the published code, its other target, is not available.
"""

from collections.abc import Iterator
from typing import Any

import torch
from golden.comparison import comparison, golden, tensor

from flowgrain.core import mend

CODE = "shreshthsaini/MEND-RL 545bfa5"

Cases = Iterator[tuple[str, Any, Any]]


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for number, case in enumerate(golden("forward_mend")["cases"]):
        yield str(number), case


def groups(case: dict[str, Any]) -> torch.Tensor:
    names = list(dict.fromkeys(case["group"]))
    return torch.tensor([names.index(name) for name in case["group"]])


def objective(case: dict[str, Any]) -> torch.Tensor:
    """J, from the rewards, the caps and the computed candidates."""
    moves = mend.proposals(tensor(case["reward_gradient"]), case["etas"])
    cost = mend.proximal_cost(moves, case["tau"])
    values = (tensor(case[key]) for key in ("reward_x", "reward_candidates", "kappa"))
    return mend.capped_objective(*values, cost)


@comparison(
    "MEND: caps of the rewards",
    "forward_mend",
    f"{CODE}, group_cap, update_kappa_glob",
    1e-6,
    reason="an interpolation in fp32",
)
def caps() -> Cases:
    for name, case in cases():
        reward = tensor(case["reward_x"])
        of_all = mend.next_global_cap(case["kappa_glob_before"], reward, 0.5, 0.1)
        yield f"{name} kappa_glob", of_all, case["kappa_glob"]
        cap = mend.group_cap(reward, groups(case), case["q"]).clamp(min=of_all)
        yield f"{name} kappa", cap, case["kappa"]


@comparison(
    "MEND: candidates and their objective",
    "forward_mend",
    f"{CODE}, reward_hint, explicit_proposals, proximal_verdict",
    1e-5,
    reason="a mean of squares in fp32",
)
def candidates() -> Cases:
    for name, case in cases():
        moves = mend.proposals(tensor(case["reward_gradient"]), case["etas"])
        yield f"{name} cost", mend.proximal_cost(moves, case["tau"]), case["cost"]
        j = objective(case)
        yield f"{name} J", j, case["J"]
        yield f"{name} margin", j.max(0).values - j[0], case["margin"]
        index = mend.verdict(j)
        place = torch.arange(len(index))
        move = torch.where((index == mend.KEPT)[:, None, None, None], 0, moves[index, place])
        yield f"{name} move", move, case["move"]


@comparison("MEND: accepted candidates", "forward_mend", f"{CODE}, proximal_verdict")
def accepted() -> Cases:
    for name, case in cases():
        index = mend.verdict(objective(case))
        yield f"{name} index", index, case["index"]
        yield f"{name} accepted", (index != mend.KEPT).tolist(), case["accepted"]


@comparison(
    "MEND: target, weights, loss and gradient",
    "forward_mend",
    f"{CODE}, single_state_x0_target, x0_loss, loss_weights",
    1e-5,
    reason="fp32 velocities",
)
def losses() -> Cases:
    for name, case in cases():
        z, old, t, move = (tensor(case[key]) for key in ("z", "v_old", "t", "move"))
        v = tensor(case["v"]).requires_grad_()
        yield f"{name} target", mend.x0_target(z, old, t, move), case["x0_target"]
        per_image = mend.x0_loss(v, old, t, move, case["x0_loss"])
        yield f"{name} per image", per_image, case["x0_per_sample"]
        repaired = torch.tensor(case["accepted"], dtype=torch.bool)
        weights = mend.loss_weights(repaired, ~repaired, case["lambda_keep"])
        yield f"{name} weights", weights, case["weights"]
        loss = (weights * per_image).sum()
        yield f"{name} loss", loss, case["loss"]
        yield f"{name} gradient", torch.autograd.grad(loss, v)[0], case["gradient"]


@comparison(
    "MEND: controller of tau",
    "forward_mend",
    f"{CODE}, TauController",
    1e-6,
    reason="products in float64",
)
def tau() -> Cases:
    published = golden("forward_mend")["tau"]
    target, bounds = ((published[a], published[b]) for a, b in (("low", "high"), ("min", "max")))
    value, found = published["start"], []
    for acceptance in published["acceptance"]:
        value = mend.next_tau(value, acceptance, target, published["gamma"], bounds)
        found.append(value)
    yield "tau of the next rollout", found, published["tau"]
