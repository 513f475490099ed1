"""The methods, side by side. Each is a noise, a plan, a credit and an objective, and nothing else of the run is its own."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import torch

from flowgrain.core import credit
from flowgrain.core import objective
from flowgrain.core.objective import ForwardProcess
from flowgrain.core.sde import CPS, CalibratedSDE, DanceSDE, FlowSDE, Kernel, Step, flow_strength
from flowgrain.config.schema import Settings
from flowgrain.core.tree import Cost, Planner, Tree, cost, split_updates
from flowgrain.methods.window import window


@dataclass(frozen=True)
class Method:
    """One way to align: how noise enters, which tree is grown, where rewards go, what is optimised.

    plan(tree, step) writes the tree of one prompt at training step `step`; published_passes is what the method's public
    code spends on that prompt, where it is known, and 0 otherwise. A method with a forward process trains on the images
    alone: its tree has no trained edges, its credit gives one advantage a leaf, and `objective` is not asked.
    """

    kernel: Kernel
    plan: Callable[[Planner, int], None]
    credit: credit.Credit
    objective: objective.Objective
    published_passes: int = 0
    forward_process: ForwardProcess | None = None


# ---------------------------------------------------------------------- what several methods share


def psi_profile(s: Settings) -> tuple[float, ...]:
    """Noise strengths psi [T] to start calibration from: those of Flow-SDE(eta)."""
    index = torch.arange(s.num_steps)
    return tuple(flow_strength(s.eta, Step.on(s.grid(), index, index + 1)).tolist())


def noise(s: Settings) -> Kernel:
    """The transition kernel that `s` names."""
    if s.noise == "calibrated_sde":
        return CalibratedSDE(s.psi or psi_profile(s))
    if s.noise == "dance_sde":
        return DanceSDE(s.eta)
    return CPS(s.eta) if s.noise == "cps" else FlowSDE(s.eta)


def noise_weights(kernel: Kernel, s: Settings, steps: Collection[int]) -> tuple[float, ...]:
    """The kernel's std at every grid step [T], scaled to mean 1 over `steps` (TempFlow-GRPO's weight of the loss)."""
    index = torch.arange(s.num_steps)
    nothing = torch.zeros(s.num_steps, 1)
    std = kernel(nothing, nothing, Step.on(s.grid(), index, index + 1)).std
    return tuple((std / std[sorted(steps)].mean()).tolist())


def _clipped(s: Settings) -> objective.Objective:
    return objective.clipped(s.clip_range, s.kl_weight, s.kl_form)


def _steps(s: Settings, end: int) -> tuple[int, ...]:
    """The stochastic steps M: as set, or the grid steps before `end`."""
    return s.sde_steps or tuple(range(end))


def _roots(tree: Planner, s: Settings) -> list[int]:
    """The initial noises of a group: one for all, or one each."""
    return [tree.root()] * s.group_size if s.shared_noise else [tree.root() for _ in range(s.group_size)]


def _walk(tree: Planner, node: int, stop: int, noisy: Collection[int], trained: Collection[int]) -> int:
    """One trajectory from `node` at level 0 to level `stop`; whatever ODE prefix others have walked is theirs too."""
    for k in range(stop):
        node = tree.sde(node, train=k in trained)[0] if k in noisy else tree.ode(node, to=k + 1)
    return node


def _spread(start: int, stop: int, steps: int) -> list[int]:
    """`steps` grid indices after `start`, evenly spread and ending at `stop`."""
    return [round(level) for level in np.linspace(start, stop, steps + 1)[1:].tolist()]


def _tail(s: Settings, level: int) -> list[int]:
    """The grid indices of an ODE tail from `level`: all, or `tail_ratio` of them (MixGRPO-Flash)."""
    return _spread(level, s.num_steps, max(1, int((s.num_steps - level) * s.tail_ratio)))


def _finish(tree: Planner, node: int, level: int, s: Settings) -> None:
    """The image of `node`, which stands at `level`, by the ODE tail that `s` asks for."""
    tree.image(tree.ode(node, via=_tail(s, level), order=s.tail_order) if level < s.num_steps else node)


# ---------------------------------------------------------------------- the methods


def g2rpo(s: Settings) -> Method:
    """G2RPO (arXiv 2510.01982): one anchor ODE; at each step k in M a stochastic fan-out, finished at every granularity."""
    steps = _steps(s, s.num_steps // 2)

    def plan(tree: Planner, step: int) -> None:
        anchor = tree.root()
        for k in range(s.num_steps):
            for branch in tree.sde(anchor, fan=s.group_size) if k in steps else ():
                for channel, stride in enumerate(s.granularities):
                    tree.image(tree.ode(branch, stride=stride, order=s.tail_order), channel)
            anchor = tree.ode(anchor, to=k + 1)
        if s.anchor_image:
            tree.image(anchor)

    tails = sum(-(-(s.num_steps - 1 - k) // stride) for k in steps for stride in s.granularities)
    published = s.num_steps + s.group_size * (len(steps) + tails)
    return Method(noise(s), plan, credit.granular, _clipped(s), published)


def densegrpo(s: Settings) -> Method:
    """DenseGRPO (arXiv 2601.20218): trajectories with an ODE look from every state; a step earns what its look gained."""
    steps = _steps(s, s.num_steps - (s.noise == "cps"))  # CPS leaves no noise at sigma = 0
    looked = {k + after for k in steps for after in ((0, 1) if s.dense_reward == "gain" else (1,))}

    def plan(tree: Planner, step: int) -> None:
        for node in _roots(tree, s):
            for k in range(s.num_steps):
                if k in looked:
                    look_steps = s.num_steps - k if s.look_steps == "all" else min(s.look_steps, s.num_steps - k)
                    tree.image(tree.ode(node, via=_spread(k, s.num_steps, look_steps), order=s.tail_order), channel=k)
                node = tree.sde(node)[0] if k in steps else tree.ode(node, to=k + 1)
            tree.image(node, channel=s.num_steps)

    published = s.group_size * s.num_steps * (s.num_steps + 3) // 2 if s.look_steps == "all" else 0
    return Method(noise(s), plan, credit.gain if s.dense_reward == "gain" else credit.state, _clipped(s), published)


def flow_grpo(s: Settings) -> Method:
    """Flow-GRPO (arXiv 2505.05470) and, with a window, Flow-GRPO-Fast: one reward for every stochastic step of a trajectory."""
    every = _steps(s, s.num_steps - 1)

    def plan(tree: Planner, step: int) -> None:
        steps = window(s, step) if s.window_size else every
        end = max(steps) + 1
        for root in _roots(tree, s):
            _finish(tree, _walk(tree, root, end, steps, steps), end, s)

    return Method(noise(s), plan, credit.outcome, _clipped(s), s.num_steps * s.group_size)


def dancegrpo(s: Settings) -> Method:
    """DanceGRPO (arXiv 2505.07818): one initial noise a group, every step stochastic but the last, a random share trained."""
    steps = _steps(s, s.num_steps - 1)
    count = max(1, int(len(steps) * s.timestep_fraction))

    def plan(tree: Planner, step: int) -> None:
        trained = np.random.default_rng([s.seed, step]).choice(steps, count, replace=False)
        end = max(steps) + 1
        for root in _roots(tree, s):
            _finish(tree, _walk(tree, root, end, steps, trained), end, s)

    return Method(noise(s), plan, credit.outcome, _clipped(s), s.num_steps * s.group_size)


def mixgrpo(s: Settings) -> Method:
    """MixGRPO (arXiv 2507.21802) and its Flash variants: ODE trunk, a sliding stochastic window, an ODE tail, compressed or not."""

    def plan(tree: Planner, step: int) -> None:
        steps = window(s, step)
        for root in _roots(tree, s):
            _finish(tree, _walk(tree, root, steps.stop, steps, steps), steps.stop, s)

    first = window(s, 1).stop
    return Method(noise(s), plan, credit.outcome, _clipped(s), s.group_size * (first + len(_tail(s, first))))


def tempflow_grpo(s: Settings) -> Method:
    """TempFlow-GRPO (arXiv 2508.04324): branches off an ODE trunk at every step, the loss weighted by the step's noise."""
    steps = _steps(s, s.num_steps - 1)

    def plan(tree: Planner, step: int) -> None:
        trunk = tree.root()
        for k in range(max(steps) + 1):
            for branch in tree.sde(trunk, fan=s.group_size) if k in steps else ():
                _finish(tree, branch, k + 1, s)
            trunk = tree.ode(trunk, to=k + 1)

    weighted = objective.weighted(_clipped(s), noise_weights(noise(s), s, steps))
    return Method(noise(s), plan, credit.outcome, weighted, s.num_steps + s.group_size * sum(s.num_steps - k for k in steps))


def grpo_guard(s: Settings) -> Method:
    """GRPO-Guard (arXiv 2510.22319): Flow-GRPO with a ratio that is centred and scaled alike at every step."""
    guarded = objective.guarded(s.clip_range, s.kl_weight, s.kl_form)
    plain = flow_grpo(s)
    return Method(plain.kernel, plain.plan, plain.credit, guarded, plain.published_passes)


def branchgrpo(s: Settings) -> Method:
    """BranchGRPO (arXiv 2509.06040): a stochastic tree that splits at several depths; a node is worth the mean of its leaves."""
    steps = _steps(s, s.num_steps - 1)

    def plan(tree: Planner, step: int) -> None:
        nodes, end = [tree.root()], max(steps) + 1
        for k in range(end):
            fan = s.split_fan if k in s.split_steps else 1
            nodes = [b for n in nodes for b in (tree.sde(n, fan) if k in steps else [tree.ode(n, to=k + 1)])]
        for node in nodes:
            _finish(tree, node, end, s)

    return Method(noise(s), plan, credit.outcome, _clipped(s))


def diffusionnft(s: Settings) -> Method:
    """DiffusionNFT (arXiv 2509.16117), the forward-process yardstick: ODE samples, and a contrast of two velocities around them."""

    def plan(tree: Planner, step: int) -> None:
        for root in _roots(tree, s):
            _finish(tree, root, 0, s)

    times = max(1, int(s.num_steps * s.timestep_fraction))
    contrast = ForwardProcess(s.nft_beta, s.advantage_clip, times, s.nft_max_decay, s.nft_decay_rate)
    return Method(noise(s), plan, credit.per_image, _clipped(s), s.num_steps * s.group_size, contrast)


METHODS: dict[str, Callable[[Settings], Method]] = {
    "g2rpo": g2rpo,
    "densegrpo": densegrpo,
    "flow_grpo": flow_grpo,
    "flow_grpo_fast": flow_grpo,
    "dancegrpo": dancegrpo,
    "mixgrpo": mixgrpo,
    "mixgrpo_flash": mixgrpo,
    "mixgrpo_flash_star": mixgrpo,
    "tempflow_grpo": tempflow_grpo,
    "grpo_guard": grpo_guard,
    "branchgrpo": branchgrpo,
    "diffusionnft": diffusionnft,
}
"""Names and constructors. Variants that share a constructor differ by the values of their papers alone (settings.PAPER)."""


def build(s: Settings) -> Method:
    """The method that `s` names."""
    return METHODS[s.method](s)


def plan_tree(method: Method, s: Settings, step: int = 1) -> Tree:
    """The tree of one prompt at training step `step`."""
    planner = Planner(s.num_steps, s.coarse_grid)
    method.plan(planner, step)
    return planner.tree()


def changes_with_step(s: Settings) -> bool:
    """Whether the tree of a prompt differs from one training step to another: a moving window, or steps drawn at random."""
    return (s.window_size > 0 and s.window_schedule != "frozen") or (s.method == "dancegrpo" and s.timestep_fraction < 1)


def price(method: Method, s: Settings, step: int = 1) -> Cost:
    """What training step `step` costs for one prompt: its tree, and the passes of the updates on it."""
    tree = plan_tree(method, s, step)
    found = cost(tree, len(s.rewards))
    if method.forward_process is not None:
        gradient = old = float(len(tree.leaves) * method.forward_process.times)
    else:
        gradient = float(found.train_forward_passes)
        later = split_updates(tree.repeat(s.prompts_per_step), s.updates_per_rollout)[1:]
        old = sum(map(len, later)) / s.prompts_per_step
    frozen = old + (gradient if s.kl_weight else 0)
    return replace(found, train_forward_passes=int(gradient), frozen_forward_passes=frozen)
