"""Golden numbers of noise grids, coarse grids and windows of stochastic steps."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import torch
from golden.comparison import comparison, golden, tensor
from golden.trajectories import noise_table, sd3_grid, truncated_timesteps, velocity_field

from flowgrain.core.rollout import rollout
from flowgrain.core.sde import Gaussian, Step, sigma_grid
from flowgrain.core.tree import Tree
from flowgrain.methods import build_method, plan_tree
from flowgrain.models.sd3 import SD3Backbone
from flowgrain.models.shift import linear_mu, scheduler_shift

GRID = "fp32 rounding of a grid that is computed in float64"
EXACT = "integers"

DANCEGRPO = "XueZeyue/DanceGRPO 15cc71d, sd3_time_shift"
DIFFUSERS = "huggingface/diffusers 0.42.1, FlowMatchEulerDiscreteScheduler.set_timesteps"
FACTORY = "X-GenGroup/Flow-Factory a0b2bc5, calculate_shift"
GRANULAR = "bcmi/Granular-GRPO cae0961"
WINDOWS = "Tencent-Hunyuan/MixGRPO e5cdd6a, GRPOTrainingStates"
FAST = "YunzeTong/TurningPoint-GRPO 994d26a, pipeline_with_logprob"

Cases = Iterator[tuple[str, Any, Any]]


@comparison("Grid: linear and shifted", "grids", DANCEGRPO, 1e-6, reason=GRID)
def linear_shifted() -> Cases:
    for case in golden("grids")["linear_shifted"]:
        name = f"T={case['num_steps']} shift={case['shift']}"
        yield name, sigma_grid(case["num_steps"], case["shift"]), case["sigmas"]


@comparison("Grid: constant shift of SD3 pipelines", "grids", DIFFUSERS, 1e-6, reason=GRID)
def static_shift() -> Cases:
    for case in golden("grids")["diffusers_static_shift"]:
        sigmas = sd3_grid(case["num_steps"], case["shift"])
        name = f"T={case['num_steps']} shift={case['shift']}"
        yield f"{name} sigmas", sigmas, case["sigmas"]
        yield f"{name} timesteps", 1000 * sigmas[:-1], case["timesteps"]


@comparison(
    "Grid: dynamic shift of FLUX pipelines", "grids", f"{FACTORY}; {DIFFUSERS}", 1e-6, reason=GRID
)
def dynamic_shift() -> Cases:
    config = {"use_dynamic_shifting": True}
    for case in golden("grids")["diffusers_dynamic_shift"]:
        mu = linear_mu(config, case["image_tokens"])
        name = f"T={case['num_steps']} tokens={case['image_tokens']}"
        yield f"{name} mu", mu, case["mu"]
        sigmas = sigma_grid(case["num_steps"], *scheduler_shift(config, mu))
        yield f"{name} sigmas", sigmas, case["sigmas"]
        yield f"{name} timesteps", 1000 * sigmas[:-1], case["timesteps"]


@comparison(
    "Timestep that the transformer receives",
    "grids",
    DANCEGRPO,
    1e-6,
    deviation="flowgrain passes 1000 sigma. The published code passes int(1000 sigma).",
)
def timesteps() -> Cases:
    def transformer(timestep: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor]:
        return (timestep,)

    cond = {"embeds": torch.zeros(1), "pooled": torch.zeros(1)}
    for case in golden("grids")["linear_shifted"]:
        sigmas = sigma_grid(case["num_steps"], case["shift"])[:-1]
        received = SD3Backbone.velocity(None, transformer, torch.zeros(1), sigmas, cond)
        name = f"T={case['num_steps']} shift={case['shift']}"
        yield name, received, case["truncated_timesteps"]


# Coarse grids of Granular-GRPO


def granular_tree(num_steps: int) -> Tree:
    """G2RPO's tree with noise at all steps before the last. Branch g has stride g + 1 too."""
    options = {
        "name": "g2rpo",
        "sde_steps": tuple(range(num_steps - 1)),
        "granularities": (1, 2, 3, 4),
        "group_size": 4,
        "anchor_image": False,
    }
    return plan_tree(build_method(options), num_steps, step=1, seed=0)


def granular_paths(tree: Tree) -> dict[tuple[int, int, int], tuple[int, list[int]]]:
    """Images of a tree of G2RPO by stochastic step, branch and stride.

    An image comes with the grid indices that its ODE evaluates.
    """
    paths = {}
    for image, channel in zip(tree.image.tolist(), tree.channel.tolist(), strict=True):
        visited, row = [], int(tree.parent[image])
        while not tree.trained[row]:
            visited.append(int(tree.grid_index[row]))
            row = int(tree.parent[row])
        visited.append(int(tree.grid_index[row]))
        siblings = tree.edges[tree.grid_index[tree.edges] == tree.grid_index[row]]
        branch = siblings.tolist().index(row)
        paths[visited[-1] - 1, branch, channel + 1] = image, visited[::-1]
    return paths


@comparison(
    "G2RPO: grid indices of the coarse ODEs",
    "granular_grids",
    f"{GRANULAR}, sample_reference_model",
    reason=EXACT,
)
def visited_indices() -> Cases:
    paths = {num_steps: granular_paths(granular_tree(num_steps)) for num_steps in (8, 13, 16, 28)}
    for case in golden("granular_grids")["cases"]:
        num_steps, k, stride = (case[name] for name in ("num_steps", "k", "stride"))
        _, visited = paths[num_steps][k, 0, stride]
        yield f"T={num_steps} k={k} stride={stride}", visited, case["visited"]


@comparison(
    "G2RPO: images of the coarse ODEs",
    "granular_grids",
    f"{GRANULAR}, run_ode_sample_step",
    1e-5,
    reason="up to 15 fp32 steps",
)
def coarse_images() -> Cases:
    """Branch g of every stochastic step starts from the golden state of stride g + 1."""
    for num_steps in (8, 16):
        cases = {
            (case["k"], case["stride"]): case
            for case in golden("granular_grids")["cases"]
            if case["num_steps"] == num_steps
        }
        tree, sigmas = granular_tree(num_steps), sigma_grid(num_steps)
        draws = {0: torch.zeros(4)}  # the root
        for place, edge in enumerate(tree.edges.tolist()):  # four branches of every step
            k, stride = divmod(place, 4)
            draws[int(tree.draw[edge])] = tensor(cases[k, stride + 1]["start"])
        velocity = velocity_field(truncated_timesteps(num_steps, sigmas))
        done = rollout(tree, velocity, _noise_itself, sigmas, noise_table(draws))
        paths = granular_paths(tree)
        for (k, stride), case in cases.items():
            image, _ = paths[k, stride - 1, stride]
            ours = done.at(np.array([image]))[0]
            yield f"T={num_steps} k={k} stride={stride}", ours, case["image"]


def _noise_itself(x: torch.Tensor, v: torch.Tensor, step: Step) -> Gaussian:
    """A transition whose sample is the noise."""
    return Gaussian(torch.zeros_like(x), torch.ones(len(x)))


# Windows


def _window_method(case: dict[str, Any]) -> Any:
    """MixGRPO with the settings of a golden case."""
    strategy = case["sample_strategy"]
    schedule: dict[str, Any] = {"window_schedule": strategy}
    schedule["window_interval"] = case["iters_per_group"]
    if strategy == "decay":  # the published schedule starts from max_iters_per_group
        schedule["window_interval"] = case["max_iters_per_group"]
    stride = case["prog_overlap_step"] if case["prog_overlap"] else case["group_size"]
    if stride == 0:
        schedule["window_schedule"] = "frozen"
    else:
        schedule["window_stride"] = stride
    end = "roll_back" if case.get("roll_back") else "stay"
    options = {"name": "mixgrpo", "window_size": case["group_size"], "window_end": end}
    return build_method(options | schedule)


def _runs(case: dict[str, Any], iterations: int = 300) -> list[list[int]]:
    """Runs [first step, past the last step, iterations] of flowgrain's window."""
    method = _window_method(case)
    windows = (method.window(case["num_steps"], step, 0) for step in range(1, iterations + 1))
    return [[window.start, window.stop, len(list(run))] for window, run in groupby(windows)]


def _full_runs(case: dict[str, Any]) -> list[list[int]]:
    """The golden runs before the first window that is smaller than the window size."""
    size = case["group_size"]
    windows = case["windows"]
    short = (i for i, (start, stop, _) in enumerate(windows) if stop - start < size)
    return windows[: next(short, len(windows))]


@comparison("MixGRPO: windows before the end of the grid", "windows", WINDOWS, reason=EXACT)
def windows() -> Cases:
    for case in golden("windows")["cases"]:
        expected = _full_runs(case)
        yield case["setting"], _runs(case)[: len(expected)], expected


@comparison(
    "MixGRPO: windows at the end of the grid",
    "windows",
    WINDOWS,
    deviation="The published window shrinks at the end of the grid and is empty at its last "
    "position, without roll_back also afterwards. flowgrain's window always has its full size.",
)
def windows_at_the_end() -> Cases:
    for case in golden("windows")["cases"]:
        if len(_full_runs(case)) < len(case["windows"]):
            yield case["setting"], _runs(case), case["windows"]


@comparison(
    "MixGRPO: positions of the random window",
    "windows",
    WINDOWS,
    deviation="flowgrain also draws the last position, whose window ends before the step into "
    "sigma = 0.",
)
def random_windows() -> Cases:
    case = golden("windows")["mixgrpo_random"]
    method = build_method(
        {"name": "mixgrpo", "window_schedule": "random", "window_size": case["group_size"]}
    )
    starts = [method.window(case["num_steps"], step, 0).start for step in range(1, 1001)]
    yield "lowest", min(starts), case["lowest_start"]
    yield "highest", max(starts), case["highest_start"]


def _fast_windows(case: dict[str, Any]) -> list[list[int]]:
    """All windows of 200 training steps of Flow-GRPO-Fast."""
    whole = case["sde_window_range"] == [0, case["num_steps"]]
    region = "all" if whole else "first_half"
    size = case["sde_window_size"]
    method = build_method({"name": "flow_grpo_fast", "window_size": size, "window_region": region})
    seen = (method.window(case["num_steps"], step, 0) for step in range(1, 201))
    return sorted({(window.start, window.stop) for window in seen})


def _is_first_half(case: dict[str, Any]) -> bool:
    return case["sde_window_range"] == [0, case["num_steps"] // 2] and case["sde_window_size"] > 0


@comparison("Flow-GRPO-Fast: windows in the first half", "windows", FAST, reason=EXACT)
def fast_windows() -> Cases:
    for case in golden("windows")["flow_grpo_fast"]:
        if _is_first_half(case):
            yield f"size {case['sde_window_size']}", _fast_windows(case), case["windows"]


@comparison(
    "Flow-GRPO-Fast: windows in the whole grid",
    "windows",
    FAST,
    deviation="The published window may contain the step into sigma = 0. flowgrain's never does.",
)
def fast_windows_of_the_whole_grid() -> Cases:
    for case in golden("windows")["flow_grpo_fast"]:
        if case["sde_window_range"] == [0, case["num_steps"]]:
            yield f"size {case['sde_window_size']}", _fast_windows(case), case["windows"]


@comparison("Flow-GRPO: stochastic steps", "windows", FAST, reason=EXACT)
def all_steps() -> Cases:
    for case in golden("windows")["flow_grpo_fast"]:
        if case["sde_window_size"] == 0:
            tree = plan_tree(build_method({"name": "flow_grpo"}), case["num_steps"], 1, 0)
            steps = sorted(set((tree.grid_index[tree.edges] - 1).tolist()))
            yield "all", [[steps[0], steps[-1] + 1]], case["windows"]
