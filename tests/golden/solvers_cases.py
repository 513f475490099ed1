"""Golden trajectories: MixGRPO's window and multistep tail, and the solvers of DiffusionNFT."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from golden.comparison import comparison, golden, tensor
from golden.fastvideo_cases import constants
from golden.trajectories import noise_table, sd3_grid, velocity_field
from torch import Tensor

from flowgrain.core.rollout import Rollout, rollout
from flowgrain.core.sde import ODE, DanceSDE, FlowSDE, Step, multistep, sigma_grid
from flowgrain.core.tree import Tree
from flowgrain.methods import Method, build_method, plan_tree

STEP = "one fp32 step"
TRAJECTORY = "up to 25 fp32 steps"
NEAR_ONE = "fp32 cancellation in 1 - sigma near sigma = 1"

MIXGRPO = "Tencent-Hunyuan/MixGRPO e5cdd6a, run_sample_step and dpm_step"
NFT = "NVlabs/DiffusionNFT 24af555, run_sampling"

Cases = Iterator[tuple[str, Any, Any]]


def _step(sigmas: Tensor, index: int, rows: int) -> Step:
    start = torch.full((rows,), index)
    return Step.on(sigmas, start, start + 1)


# MixGRPO


def _mixgrpo_cases(complete: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cases that flowgrain implements: tails of order 1, or of order 2 with the midpoint rule.

    `complete`: only cases whose grid ends at sigma = 0.
    """
    for number, case in enumerate(golden("sampler_mixgrpo")["cases"]):
        implemented = case["order"] < 3 and case["solver_type"] == "midpoint"
        if implemented and (case["sigmas"][-1] == 0 or not complete):
            yield f"T={case['num_steps']} window={case['window']} {number}", case


def _mixgrpo(case: dict[str, Any], **options: Any) -> tuple[Method, int]:
    """MixGRPO with the window of a case, and a training step at which the window is there."""
    values = {"name": "mixgrpo", "group_size": 2, "shared_noise": False, "window_interval": 1}
    method = build_method(values | options | {"window_size": len(case["window"])})
    return method, case["window"][0] + 1


def _trajectory(case: dict[str, Any]) -> tuple[Rollout, list[list[int]]]:
    """MixGRPO's rollout on the grid of a case, and the rows of its two trajectories."""
    second_order = case["order"] == 2 and case["algorithm"] != "null"
    method, step = _mixgrpo(case, tail_order=2 if second_order else 1)
    sigmas = tensor(case["sigmas"])
    tree = plan_tree(method, len(sigmas) - 1, step)
    states, noises = tensor(case["states"]), tensor(case["noise_of_steps"])
    paths = [_path(tree, int(leaf)) for leaf in tree.leaves]
    draws = {}
    for row, path in enumerate(paths):
        draws[int(tree.draw[path[0]])] = states[0, row]
        for index in case["window"]:
            draws[int(tree.draw[path[index + 1]])] = noises[index, row]
    timesteps = dict(zip(sigmas.tolist(), case["timesteps_given"], strict=False))
    velocity = velocity_field(timesteps)
    return rollout(tree, velocity, FlowSDE(case["eta"]), sigmas, noise_table(draws)), paths


def _path(tree: Tree, leaf: int) -> list[int]:
    """Rows from the root to `leaf`."""
    path = [leaf]
    while tree.grid_index[path[-1]] > 0:
        path.append(int(tree.parent[path[-1]]))
    return path[::-1]


@comparison(
    "MixGRPO: whole trajectory with window and tail",
    "sampler_mixgrpo",
    MIXGRPO,
    1e-5,
    reason=TRAJECTORY,
)
def mixgrpo_trajectories() -> Cases:
    for name, case in _mixgrpo_cases():
        done, paths = _trajectory(case)
        window = np.array([[path[index + 1] for index in case["window"]] for path in paths])
        latents = done.at(window.T.reshape(-1)).unflatten(0, window.T.shape)
        yield f"{name} window", latents, [case["states"][index + 1] for index in case["window"]]
        yield f"{name} image", done.at(np.array([path[-1] for path in paths])), case["final"]


@comparison(
    "MixGRPO: log-probabilities before the tail", "sampler_mixgrpo", MIXGRPO, 2e-5, reason=NEAR_ONE
)
def mixgrpo_log_probs() -> Cases:
    for name, case in _mixgrpo_cases(complete=False):
        states, sigmas = tensor(case["states"]), tensor(case["sigmas"])
        velocities = tensor(case["velocities"])
        for index, log_prob in enumerate(case["log_prob"]):
            step = _step(sigmas, index, rows=2)
            transition = FlowSDE(case["eta"])(states[index], velocities[index], step)
            yield f"{name} step {index}", transition.log_prob(states[index + 1]), log_prob


@comparison(
    "DPM-Solver++(2M): single steps of the tail", "sampler_mixgrpo", MIXGRPO, 1e-5, reason=STEP
)
def mixgrpo_tail_steps() -> Cases:
    for name, case in _mixgrpo_cases():
        if case["order"] == 2 and case["algorithm"] != "null":
            yield from _multistep_steps(name, case, first=len(case["log_prob"]))


def _multistep_steps(name: str, case: dict[str, Any], first: int) -> Cases:
    """Second-order steps from the recorded states. The last step has first order."""
    states, sigmas = tensor(case["states"]), tensor(case["sigmas"])
    velocities = tensor(case["velocities"])
    for index in range(first, len(sigmas) - 1):
        x, v, step = states[index], velocities[index], _step(sigmas, index, rows=2)
        if index == 0 or index == len(sigmas) - 2:
            ours = ODE()(x, v, step).mean
        else:
            before = _step(sigmas, index - 1, rows=2)
            to_image = Step(before.sigma, torch.zeros(2), before.index)
            x0_before = ODE()(states[index - 1], velocities[index - 1], to_image).mean
            ours = multistep(x, v, step, x0_before, before.sigma)
        yield f"{name} step {index}", ours, case["states"][index + 1]


@comparison(
    "MixGRPO: grid without a compressed tail", "sampler_mixgrpo", MIXGRPO, 1e-6, reason="fp32 grid"
)
def mixgrpo_grid() -> Cases:
    for name, case in _mixgrpo_cases():
        if case["algorithm"] == "null":
            yield name, _levels(case, ratio=1.0), case["sigmas"]


@comparison(
    "MixGRPO-Flash: noise levels of the compressed tail",
    "sampler_mixgrpo",
    MIXGRPO,
    1e-6,
    deviation="The published tail has int((T - last) ratio) points of a rebuilt grid, which is one "
    "step fewer in these cases. With a single point the sampler stops above sigma = 0. The tail of "
    "flowgrain consists of levels of the sampling grid and always ends at sigma = 0.",
)
def flash_levels() -> Cases:
    for name, case in _mixgrpo_cases(complete=False):
        if case["algorithm"] != "null":
            yield name, _levels(case, case["compress_ratio"]), case["sigmas"]


def _levels(case: dict[str, Any], ratio: float) -> Tensor:
    """Noise levels of flowgrain's trajectory on the sampling grid of a case."""
    method, step = _mixgrpo(case, tail_ratio=ratio)
    tree = plan_tree(method, case["num_steps"], step)
    path = _path(tree, int(tree.leaves[0]))
    return sigma_grid(case["num_steps"], case["shift"])[tree.grid_index[path]]


# DiffusionNFT


def _nft_cases(*solvers: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, case in enumerate(golden("solver_nft")["cases"]):
        if case["solver"] in solvers:
            yield f"{case['solver']} T={case['num_steps']} {number}", case


@comparison(
    "DiffusionNFT: images of the solvers dpm2, dpm1 and ddim",
    "solver_nft",
    NFT,
    1e-5,
    reason=TRAJECTORY,
)
def nft_images() -> Cases:
    for name, case in _nft_cases("dpm2", "dpm1", "ddim"):
        if case["eta"] == 0:
            order = 2 if case["solver"] == "dpm2" else 1
            method = build_method({"name": "diffusionnft", "group_size": 2, "tail_order": order})
            tree = plan_tree(method, case["num_steps"])
            draws = dict(enumerate(tensor(case["states"][0])))
            sigmas = _nft_grid(case)
            done = rollout(tree, velocity_field(), ODE(), sigmas, noise_table(draws))
            yield name, done.at(tree.leaves), case["states"][-1]


def _nft_grid(case: dict[str, Any]) -> Tensor:
    """The solver's grid: the scheduler's for dpm, else linear and shifted."""
    grid = sd3_grid if case["solver"].startswith("dpm") else sigma_grid
    return grid(case["num_steps"], case["shift"])


@comparison("DiffusionNFT: single steps of its solvers", "solver_nft", NFT, 1e-5, reason=STEP)
def nft_steps() -> Cases:
    for name, case in _nft_cases("dpm2"):
        yield from _multistep_steps(name, case, first=0)
    for name, case in _nft_cases("dpm1", "ddim"):
        if case["eta"] == 0:
            states, velocities = tensor(case["states"]), tensor(case["velocities"])
            for index in range(case["num_steps"]):
                step = _step(tensor(case["sigmas"]), index, rows=2)
                ours = ODE()(states[index], velocities[index], step).mean
                yield f"{name} step {index}", ours, case["states"][index + 1]


@comparison(
    "DiffusionNFT: log-probabilities of the solvers flow and dance",
    "solver_nft",
    NFT,
    2e-5,
    reason=NEAR_ONE,
)
def nft_log_probs() -> Cases:
    """The solver dance omits the constants of the Gaussian."""
    kernels: dict[str, type[FlowSDE] | type[DanceSDE]] = {"flow": FlowSDE, "dance": DanceSDE}
    for name, case in _nft_cases("flow", "dance"):
        states, velocities = tensor(case["states"]), tensor(case["velocities"])
        for index, log_prob in enumerate(case["log_prob"]):
            step = _step(tensor(case["sigmas"]), index, rows=2)
            kernel = kernels[case["solver"]](case["eta"])
            transition = kernel(states[index], velocities[index], step)
            ours = transition.log_prob(states[index + 1])
            if case["solver"] == "dance":
                ours = ours - constants(transition)
            yield f"{name} step {index}", ours, log_prob
