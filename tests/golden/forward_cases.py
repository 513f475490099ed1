"""Golden numbers of DiffusionNFT: loss, gradient and decay of the old policy."""

from collections.abc import Iterator
from typing import Any

import torch
from golden.comparison import comparison, golden, tensor

from flowgrain.methods import build_method

FORWARD = "fp32 velocities against a published float64 error scale"
DECAY = "one product"

NFT = "NVlabs/DiffusionNFT 24af555"
FACTORY = "X-GenGroup/Flow-Factory a0b2bc5"

Cases = Iterator[tuple[str, Any, Any]]


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
        x0, eps, v_old, v_ref = (tensor(case[key]) for key in ("x0", "eps", "v_old", "v_ref"))
        v = tensor(case["v"]).requires_grad_()
        sigma = tensor(case["t"]) / 1000
        per_image = method.loss(v, v_old, eps - x0, sigma, tensor(case["advantage"]))
        yield f"{name} per image", per_image / case["adv_clip_max"], case["per_sample"]
        yield f"{name} policy loss", per_image.mean(), case["policy_loss"]
        yield f"{name} Flow-Factory", per_image.mean(), case["flow_factory_policy_loss"]
        distance = (v - v_ref).square().flatten(1).mean(1)  # as in ForwardProcessLoss
        yield f"{name} kl", distance.mean(), case["kl_div"]
        loss = (per_image + method.kl_weight * distance).mean()
        yield f"{name} loss", loss, case["loss"]
        yield f"{name} gradient", torch.autograd.grad(loss, v)[0], case["gradient"]


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
