"""Golden numbers of methods that train on finished images: losses, gradients and schedules."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from golden.comparison import comparison, golden, tensor

from flowgrain.core.regression import Noised, Quantities, flow_awr_energy, linearized
from flowgrain.methods import ForwardProcess, build_method

FORWARD = "fp32 velocities against a published float64 error scale"
DECAY = "one product"

NFT = "NVlabs/DiffusionNFT 24af555"
FACTORY = "X-GenGroup/Flow-Factory a0b2bc5"

Cases = Iterator[tuple[str, Any, Any]]


def noised(case: dict[str, Any], images: int | None = None) -> Noised:
    """The draws of a case. The advantages of `images` repeat for every time, times slowest."""
    x0, eps = tensor(case["x0"]), tensor(case["eps"])
    advantage = tensor(case["advantage"])
    if images is not None:
        advantage = advantage.repeat(len(x0) // images)
    old, reference = (tensor(case[key]) if key in case else None for key in ("v_old", "v_ref"))
    v = tensor(case["v"]).requires_grad_()
    return Noised(v, eps - x0, tensor(case["t"]) / 1000, advantage, old, reference)


def group_losses(
    method: ForwardProcess, x: Noised, group: Any, draws: int = 1
) -> tuple[torch.Tensor, Noised]:
    """The losses [B] as the trainer computes them, and `x` with the old quantities.

    Rows are draws x images, draws slowest.
    """

    def per_image(v: torch.Tensor | None) -> torch.Tensor | None:
        if v is None:
            return None
        return method.quantity(replace(x, v=v.detach())).reshape(draws, -1).T

    images = len(x.v) // draws
    q = Quantities(
        per_image(x.v),
        per_image(x.old),
        per_image(x.reference),
        x.advantage[:images],
        torch.as_tensor(group),
    )
    values, derivative = (of.T.flatten() for of in linearized(method.group_loss, q))
    quantity = method.quantity(x)
    x = replace(x, old_quantity=q.old.T.flatten())
    return values + derivative * (quantity - quantity.detach()), x


def _nft_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for number, case in enumerate(golden("forward_nft")["cases"]):
        if case["adv_mode"] == "all":
            yield f"{number} beta={case['beta']}", case


@comparison(
    "DiffusionNFT: loss and gradient",
    "forward_nft",
    f"{NFT}, train_nft_sd3.py; {FACTORY}, DiffusionNFTTrainer.optimize",
    1e-5,
    reason=FORWARD,
)
def nft_losses() -> Cases:
    for name, case in _nft_cases():
        options = {"beta": case["beta"], "advantage_clip": case["adv_clip_max"]}
        method = build_method({"name": "diffusionnft", "kl_weight": case["kl_beta"], **options})
        x = noised(case)
        per_image = method.loss(x)
        yield f"{name} per image", per_image / case["adv_clip_max"], case["per_sample"]
        yield f"{name} policy loss", per_image.mean(), case["policy_loss"]
        yield f"{name} Flow-Factory", per_image.mean(), case["flow_factory_policy_loss"]
        distance = method.regularizer(x)
        yield f"{name} kl", distance.mean() / method.kl_weight, case["kl_div"]
        loss = (per_image + distance).mean()
        yield f"{name} loss", loss, case["loss"]
        yield f"{name} gradient", torch.autograd.grad(loss, x.v)[0], case["gradient"]


# decay_rate, max_decay and decay_start of the published schedules.
DECAYS = {
    "0": (0.0, 0.5, 0),
    "1": (0.001, 0.5, 0),
    "2": (0.0075, 0.999, 75),
    "4": (0.02, 0.99, 0),
    "5": (0.01, 0.5, 0),
    "6": (0.0075, 0.999, 0),
    "none": (0.0, 0.5, 0),
    "slow": (0.001, 0.5, 0),
    "medium": (0.0075, 0.999, 75),
    "fast": (0.02, 0.99, 0),
    "moderate": (0.01, 0.5, 0),
}


def _decay(rate: float, largest: float, start: int) -> list[float]:
    method = build_method(
        {
            "name": "diffusionnft",
            "decay_rate": rate,
            "max_decay": largest,
            "decay_start": start,
        }
    )
    return [method.decay(step) for step in golden("forward_nft")["decay"]["steps"]]


@comparison(
    "DiffusionNFT: decay of the old policy",
    "forward_nft",
    f"{NFT}, return_decay; {FACTORY}, compute_decay",
    1e-6,
    reason=DECAY,
)
def nft_decay() -> Cases:
    decay = golden("forward_nft")["decay"]
    method = build_method({"name": "diffusionnft"})
    yield "default", [method.decay(step) for step in decay["steps"]], decay["by_type"]["1"]
    for kind, expected in decay["by_type"].items():
        yield f"type {kind}", _decay(*DECAYS[kind]), expected
    for preset, expected in decay["flow_factory_presets"].items():
        if preset in DECAYS:
            yield f"preset {preset}", _decay(*DECAYS[preset]), expected


AWM = "scxue/advantage_weighted_matching be51372"
WEIGHTINGS = {
    "Uniform": "uniform",
    "t": "t",
    "t**2": "t_squared",
    "huber": "huber",
    "ghuber": "generalized_huber",
}


def _awm(case: dict[str, Any]) -> ForwardProcess:
    # With beta = 0 the published code turns the distance to the EMA off too.
    return build_method(
        {
            "name": "awm",
            "weighting": WEIGHTINGS[case["weighting"]],
            "power": case["ghuber_power"],
            "ratio": {"exp_first": "draw", "sum_first": "image"}[case["loss_type"]],
            "updates_per_rollout": 2,  # the old policy of the cases is not the trained policy
            "kl_weight": case["beta"],
            "ema_weight": case["ema_beta"] if case["beta"] else 0.0,
            "kl_weighting": case["kl_weight"].lower(),
            "clip_range": case["clip_range"],
            "advantage_scale": 1.0,
            "advantage_clip": 1.0,  # the cases have the scaled advantages
        }
    )


def _awm_regularizer(case: dict[str, Any], x: Noised) -> torch.Tensor:
    """The distances, which have a weighting each in the published code."""
    total = torch.zeros(len(x.v))
    for weight, kind, anchor in (
        (case["beta"], case["kl_weight"], {"ema_weight": 0.0}),
        (case["ema_beta"] if case["beta"] else 0.0, case["kl_ema_weight"], {"kl_weight": 0.0}),
    ):
        name = "kl_weight" if "ema_weight" in anchor else "ema_weight"
        options = {"kl_weighting": kind.lower(), name: weight, **anchor}
        added = build_method({"name": "awm", **options}).regularizer(x)
        total = total if added is None else total + added
    return total


@comparison(
    "AWM: weighted error, loss and gradient",
    "forward_awm",
    f"{AWM}, train_sd3_awm.py; {FACTORY}, AWMTrainer.compute_weighted_log_prob",
    1e-5,
    reason=FORWARD,
)
def awm_losses() -> Cases:
    for number, case in enumerate(golden("forward_awm")["cases"]):
        name = f"{number} {case['weighting']} {case['loss_type']}"
        method, x = _awm(case), noised(case, case["batch"])
        x = replace(x, advantage=x.advantage.clamp(-5, 5))
        anchors = replace(x, old=tensor(case["v_ema"]))
        old = method.quantity(replace(x, v=x.old))
        yield f"{name} log-probability", -method.quantity(x), case["log_prob"]
        yield f"{name} Flow-Factory", -method.quantity(x), case["flow_factory_log_prob"]
        yield f"{name} old log-probability", -old, case["old_log_prob"]
        if method.reduces:
            group = list(range(case["batch"]))
            policy = group_losses(method, x, group, case["times"])[0]
        else:
            policy = method.loss(replace(x, old_quantity=old))
        yield f"{name} policy loss", policy.mean(), case["policy_loss"]
        loss = (policy + _awm_regularizer(case, anchors)).mean()
        yield f"{name} loss", loss, case["loss"]
        yield f"{name} gradient", torch.autograd.grad(loss, x.v)[0], case["gradient"]


AWR = "Fuzm7/FlowAWR 05e993a"


@comparison(
    "FlowAWR: energy",
    "forward_flowawr",
    f"{AWR}, PerPromptStatTracker.update",
    1e-5,
    reason="one softmax in fp32",
)
def flowawr_energy() -> Cases:
    for number, case in enumerate(golden("forward_flowawr")["cases"]):
        advantage = tensor(case["advantage"])
        group = torch.zeros(len(advantage), dtype=torch.long)
        kind = "hard" if case["hard_gating"] else "soft"
        energy = flow_awr_energy(advantage, group, kind).clamp(-3, 3)
        yield f"{number} {kind}", energy, case["energy"]


@comparison(
    "FlowAWR: loss and gradient",
    "forward_flowawr",
    f"{AWR}, train_awr_sd3.py",
    1e-5,
    reason=FORWARD,
)
def flowawr_losses() -> Cases:
    for number, case in enumerate(golden("forward_flowawr")["cases"]):
        method = build_method({"name": "flowawr", "kl_weight": case["kl_beta"]})
        x = replace(noised(case), advantage=tensor(case["energy"]))
        per_image = method.loss(x)
        yield f"{number} per image", per_image, case["per_sample"]
        added = method.regularizer(x)
        total = per_image if added is None else per_image + added
        # flowgrain leaves out images by their advantage. The cases have a mask.
        mask = torch.tensor(case["loss_mask"] or [1] * len(total), dtype=torch.float32)
        loss = (total * mask).sum() / mask.sum()
        yield f"{number} loss", loss, case["loss"]
        yield f"{number} gradient", torch.autograd.grad(loss, x.v)[0], case["gradient"]


VRL = "guoriyue/VRL 05c65ed"


@comparison(
    "V-GRPO: surrogate, loss and gradient",
    "forward_vgrpo",
    f"{VRL}, VGRPO.compute_batch_timestep_loss",
    1e-5,
    reason=FORWARD,
)
def vgrpo_losses() -> Cases:
    for number, case in enumerate(golden("forward_vgrpo")["cases"]):
        clip = case["adv_soft_clip"] or 1e6  # null: no clip
        method = build_method({"name": "vgrpo", "soft_clip": clip})
        x = noised(case)
        yield f"{number} surrogate", method.quantity(x), case["surrogate"]
        loss = method.loss(x).mean()
        yield f"{number} loss", loss, case["loss"]
        yield f"{number} gradient", torch.autograd.grad(loss, x.v)[0], case["gradient"]


@comparison(
    "DGPO: loss and gradient of a group",
    "forward_dgpo",
    f"Luo-Yihong/DGPO 01ceb4b, compute_group_dgpo_loss_allreduce; {FACTORY}, DGPOTrainer",
    1e-5,
    reason=FORWARD,
)
def dgpo_losses() -> Cases:
    for number, case in enumerate(golden("forward_dgpo")["cases"]):
        method = build_method(
            {
                "name": "dgpo",
                "beta": float(case["beta_dpo"]),
                "clip_range": case["clip_range"] if case["clip_dsm"] else None,
                "clip_kl": case["clip_kl"],
                "anchor": {"v_ref": "reference", "v_old": "slow"}[case["reference"]],
                "kl_weight": case["kl_beta"],
            }
        )
        x = noised(case)
        x = replace(x, advantage=x.advantage.clamp(-5, 5))
        yield f"{number} error", method.quantity(x), case["dsm_loss"]
        policy, x = group_losses(method, x, case["group"])
        yield f"{number} policy loss", policy.mean(), case["policy_loss"]
        yield f"{number} Flow-Factory", policy.mean(), case["flow_factory"]["policy_loss"]
        added = method.regularizer(x)
        loss = (policy if added is None else policy + added).mean()
        yield f"{number} loss", loss, case["loss"]
        yield f"{number} gradient", torch.autograd.grad(loss, x.v)[0], case["gradient"]


@comparison(
    "CRD: loss and gradient of a group",
    "forward_crd",
    f"{FACTORY}, CRDTrainer._compute_crd_loss, optimize",
    1e-5,
    reason=FORWARD,
)
def crd_losses() -> Cases:
    for number, case in enumerate(golden("forward_crd")["cases"]):
        if case["weight_temp"] == 0:
            continue  # a separate center of the images above and below the mean: not available
        method = build_method(
            {
                "name": "crd",
                "beta": float(case["crd_beta"]),
                "temperature": case["weight_temp"] if case["weight_temp"] > 0 else None,
                "matching": case["loss_type"],
                "normalized_error": case["adaptive_logp"],
                "kl_weight": case["kl_beta"],
                "adaptive_kl": case["reward_adaptive_kl"],
            }
        )
        x = noised(case)
        x = replace(x, advantage=x.advantage.clamp(-5, 5))
        implicit = method.quantity(replace(x, v=x.old)) - method.quantity(x)
        yield f"{number} implicit reward", implicit, case["implicit_reward"]
        policy, x = group_losses(method, x, [0] * len(x.v))
        yield f"{number} policy loss", policy.mean(), case["policy_loss"]
        added = method.regularizer(x)
        loss = (policy if added is None else policy + added).mean()
        yield f"{number} loss", loss, case["loss"]
        yield f"{number} gradient", torch.autograd.grad(loss, x.v)[0], case["gradient"]


@comparison(
    "Diffusion-DPO: term inside the sigmoid, loss and gradient of pairs",
    "forward_dpo",
    f"yifan123/flow_grpo ac4c86e, train_sd3_dpo.py; {FACTORY}, DPOTrainer.optimize",
    1e-5,
    reason=FORWARD,
)
def dpo_losses() -> Cases:
    for number, case in enumerate(golden("forward_dpo")["cases"]):
        method = build_method({"name": "diffusion_dpo", "beta": float(case["beta"])})
        pairs = len(case["t"])
        chosen, rejected = (
            {
                "x0": case[f"x0_{image}"],
                "v": case[f"v_{image}"],
                "v_old": case[f"v_ref_{image}"],
            }
            for image in ("chosen", "rejected")
        )
        both = {name: chosen[name] + rejected[name] for name in chosen}
        shared = {"eps": case["eps"] * 2, "t": case["t"] * 2}
        x = noised(both | shared | {"advantage": [1.0] * pairs + [-1.0] * pairs})
        better = method.quantity(x) - method.quantity(replace(x, v=x.old))
        inside = -method.beta / 2 * (better[:pairs] - better[pairs:])
        yield f"{number} inside", inside, case["inside_term"]
        losses, x = group_losses(method, x, list(range(pairs)) * 2)
        loss = losses.mean()
        yield f"{number} loss", loss, case["loss"]
        yield f"{number} Flow-Factory", loss, case["flow_factory_loss"]
        gradient = torch.autograd.grad(loss, x.v)[0]
        yield f"{number} gradient", gradient[:pairs], case["gradient_chosen"]
        yield f"{number} gradient of the rejected", gradient[pairs:], case["gradient_rejected"]
