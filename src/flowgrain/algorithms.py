"""The methods, side by side. Each is a kernel, a plan, a credit and an objective, and nothing else of the run is its own."""

from collections.abc import Callable
from dataclasses import dataclass

from flowgrain import credit, objective
from flowgrain.sde import FlowSDE, Kernel
from flowgrain.settings import Settings
from flowgrain.tree import Planner, Tree


@dataclass(frozen=True)
class Method:
    """One way to align: how noise enters, which tree is grown, where rewards go, what is optimised.

    plan(tree, step) writes the tree of one prompt at training step `step`; published_passes is what the method's public
    code spends on that prompt, where it is known, and 0 otherwise.
    """

    kernel: Kernel
    plan: Callable[[Planner, int], None]
    credit: credit.Credit
    objective: objective.Objective
    published_passes: int = 0


def _clipped(s: Settings) -> objective.Objective:
    return objective.clipped(s.clip_range, s.kl_weight, s.kl_form)


def g2rpo(s: Settings) -> Method:
    """G2RPO (arXiv 2510.01982): one anchor ODE; at each step k in M a stochastic fan-out, finished at every granularity."""
    steps = s.sde_steps or tuple(range(s.num_steps // 2))

    def plan(tree: Planner, step: int) -> None:
        anchor = tree.root()
        for k in range(s.num_steps):
            for branch in tree.sde(anchor, fan=s.group_size) if k in steps else ():
                for channel, stride in enumerate(s.granularities):
                    tree.image(tree.ode(branch, stride=stride), channel)
            anchor = tree.ode(anchor, to=k + 1)
        if s.anchor_image:
            tree.image(anchor)

    tails = sum(-(-(s.num_steps - 1 - k) // stride) for k in steps for stride in s.granularities)
    published = s.num_steps + s.group_size * (len(steps) + tails)
    return Method(FlowSDE(s.eta), plan, credit.granular, _clipped(s), published)


def flow_grpo(s: Settings) -> Method:
    """Flow-GRPO (arXiv 2505.05470): independent trajectories, every step stochastic but the last, one reward for all of them."""
    steps = s.sde_steps or tuple(range(s.num_steps - 1))

    def plan(tree: Planner, step: int) -> None:
        for _ in range(s.group_size):
            node = tree.root()
            for k in range(s.num_steps):
                node = tree.sde(node)[0] if k in steps else tree.ode(node, to=k + 1)
            tree.image(node)

    return Method(FlowSDE(s.eta), plan, credit.outcome, _clipped(s), s.num_steps * s.group_size)


METHODS: dict[str, Callable[[Settings], Method]] = {"g2rpo": g2rpo, "flow_grpo": flow_grpo}


def build(s: Settings) -> Method:
    """The method that `s` names."""
    return METHODS[s.method](s)


def plan_tree(method: Method, s: Settings, step: int = 0) -> Tree:
    """The tree of one prompt at training step `step`."""
    planner = Planner(s.num_steps, s.coarse_grid)
    method.plan(planner, step)
    return planner.tree()
