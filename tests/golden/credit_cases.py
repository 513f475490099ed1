"""Golden numbers of advantages: groups, several rewards, trees and granularities."""

from collections.abc import Iterator
from typing import Any

import torch
from golden.comparison import comparison, golden, tensor
from torch import Tensor

from flowgrain.core import credit
from flowgrain.core.credit import (
    Normalization,
    combine,
    gains,
    normalize,
    row_values,
    softmax_values,
)
from flowgrain.core.tree import Planner, Tree
from flowgrain.core.turning_points import (
    balanced,
    process_rewards,
    step_rewards,
    turning_points,
)
from flowgrain.methods import Method, build_method, plan_tree

FLOAT = "float64 against fp32 mean and std"
BATCH = "published fp32 variance E[x^2] - E[x]^2"
INDICES = "indices"

TRACKER = "yifan123/flow_grpo ac4c86e, PerPromptStatTracker.update"
MIXGRPO = "Tencent-Hunyuan/MixGRPO e5cdd6a, train_one_step"
DANCEGRPO = "XueZeyue/DanceGRPO 15cc71d, train_one_step"
FACTORY = "X-GenGroup/Flow-Factory a0b2bc5, AdvantageProcessor"
VERL = "verl-project/verl-omni a1139ba, compute_flow_grpo_outcome_advantage"
BRANCH = "Fredreic1849/BranchGRPO 19fbb9f"
TURNING_POINT = "YunzeTong/TurningPoint-GRPO 994d26a, my_train_sd3_fast_with_op3.py"
GRANULAR = "bcmi/Granular-GRPO cae0961, train_one_step"

Cases = Iterator[tuple[str, Any, Any]]


# Groups


@comparison("Flow-GRPO: advantages", "advantages_trackers", TRACKER, 1e-5, reason=FLOAT)
def tracker_advantages() -> Cases:
    """With the normalization of flowgrain's Flow-GRPO, and with the std of the group."""
    for number, case in enumerate(golden("advantages_trackers")["cases"]):
        groups, columns = (
            torch.tensor(case["group"]),
            tensor(case["rewards"]).reshape(len(case["group"]), -1),
        )
        for scope in ("group", "global"):
            how = build_method({"name": "flow_grpo", "std_scope": scope}).normalization()
            expected = tensor(case[f"advantages_{scope}_std"]).reshape(columns.shape)
            ours = torch.stack([normalize(column, groups, how) for column in columns.T], 1)
            yield f"{number} {scope}", ours, expected


@comparison("verl-omni: advantages", "advantages_groups", VERL, 1e-5, reason=FLOAT)
def verl_advantages() -> Cases:
    for number, case in enumerate(golden("advantages_groups")["verl_omni"]):
        groups, rewards = torch.tensor(case["group"]), tensor(case["rewards"])
        for scope in ("group", "global"):
            how = Normalization(scope, unbiased=True, epsilon=1e-4)
            ours = normalize(rewards, groups, how)
            yield f"{number} {scope}", ours, case[f"advantages_{scope}_std"]


def _factory_advantages(sampler: str) -> Cases:
    for number, case in enumerate(golden("advantages_groups")["flow_factory"]):
        total = sum(
            case["weights"][name] * tensor(values) for name, values in case["rewards"].items()
        )
        groups = torch.tensor(case["group"])
        for scope in ("group", "global"):
            how = Normalization(scope, unbiased=False, epsilon=1e-8)
            expected = case[f"sum_{scope}_std:{sampler}"]
            yield f"{number} {scope}", normalize(total, groups, how), expected


@comparison(
    "Flow-Factory: advantages, distributed_k_repeat",
    "advantages_groups",
    FACTORY,
    1e-5,
    reason=FLOAT,
)
def factory_advantages() -> Cases:
    yield from _factory_advantages("distributed_k_repeat")


@comparison(
    "Flow-Factory: advantages, group_contiguous", "advantages_groups", FACTORY, 1e-5, reason=BATCH
)
def factory_contiguous_advantages() -> Cases:
    yield from _factory_advantages("group_contiguous")


def group_tree(method: Method, num_steps: int, prompts: int) -> Tree:
    """The tree of `method` for several prompts."""
    return plan_tree(method, num_steps).repeat(prompts)


def _per_image(tree: Tree, values: Tensor) -> Tensor:
    """Values [I] of the edges of trajectories with a single trained step, in order of images."""
    owner = {}
    for edge, value in zip(tree.edges.tolist(), values.tolist(), strict=True):
        owner[edge] = value
    ordered = []
    for leaf in tree.leaves.tolist():
        row = leaf
        while row not in owner:
            row = int(tree.parent[row])
        ordered.append(owner[row])
    return torch.tensor(ordered)


@comparison(
    "MixGRPO: advantages of several rewards", "advantages_groups", MIXGRPO, 1e-5, reason=FLOAT
)
def mixgrpo_advantages() -> Cases:
    for number, case in enumerate(golden("advantages_groups")["mixgrpo"]):
        mix = case["multi_reward_mix"]
        if case["trimmed_ratio"]:
            continue
        options = {
            "name": "mixgrpo",
            "group_size": case["generations"],
            "window_size": 1,
            "reward_mix": mix.removesuffix("_aggr"),
        }
        method = build_method(options)
        tree = group_tree(method, 4, case["prompts"])
        weights = method.mix_weights(case["raw_weights"])
        yield f"{number} weights", list(weights.values()), list(case["weights"].values())
        rewards = {name: tensor(values) for name, values in case["rewards"].items()}
        advantage = combine(
            method.credit, tree, rewards, weights, method.normalization(), method.reward_mix
        )
        yield f"{number} {mix}", _per_image(tree, advantage), case["advantages"]


@comparison("DanceGRPO: advantages", "advantages_groups", DANCEGRPO, 1e-5, reason=FLOAT)
def dancegrpo_advantages() -> Cases:
    for number, case in enumerate(golden("advantages_groups")["dancegrpo"]):
        if "rewards" in case:
            method = build_method(
                {"name": "dancegrpo", "group_size": case["generations"], "sde_steps": (0,)}
            )
            tree = group_tree(method, 4, case["prompts"])
            advantage = method.credit(tree, tensor(case["rewards"]), method.normalization())
            yield f"{number}", _per_image(tree, advantage), case["advantages_group"]


@comparison("DanceGRPO: best of N", "advantages_groups", DANCEGRPO, reason=INDICES)
def best_of_n() -> Cases:
    for number, case in enumerate(golden("advantages_groups")["dancegrpo"]):
        if "kept" in case:
            scores = tensor(case["scores"])
            groups = torch.zeros(len(scores), dtype=torch.long)
            edge_weight = credit.extremes(scores, groups, case["bestofn"])
            yield f"{number}", edge_weight.nonzero().squeeze(1), sorted(case["kept"])


# BranchGRPO


def branch_tree(fans: list[int]) -> Tree:
    """A tree that splits into `fans[depth]` children at every depth, down to sigma = 0."""
    planner = Planner(len(fans))
    nodes = [planner.root()]
    for fan in fans:
        nodes = [child for node in nodes for child in planner.sde(node, fan)]
    for node in nodes:
        planner.image(node)
    return planner.tree()


def _branch_trees() -> Iterator[tuple[str, dict[str, Any], Tree]]:
    for number, case in enumerate(golden("advantages_trees")["branchgrpo"]):
        yield f"{number} {case['fan_out_by_depth']}", case, branch_tree(case["fan_out_by_depth"])


@comparison(
    "BranchGRPO: tree and values of its nodes",
    "advantages_trees",
    f"{BRANCH}, compute_node_rewards_from_leaves",
    1e-6,
    reason=FLOAT,
)
def branch_values() -> Cases:
    for name, case, tree in _branch_trees():
        yield f"{name} parents", tree.parent, case["parent"]
        yield f"{name} depths", tree.grid_index, case["depth"]
        values = row_values(tree, tensor(case["leaf_rewards"]))
        yield f"{name} values", values, case["node_reward_mean"]


@comparison(
    "BranchGRPO: advantages by depth",
    "advantages_trees",
    f"{BRANCH}, compute_hierarchical_advantages_by_depth",
    1e-5,
    reason=FLOAT,
)
def branch_advantages() -> Cases:
    """With the credit of flowgrain's BranchGRPO. The root has no edge."""
    method = build_method({"name": "branchgrpo"})
    for name, case, tree in _branch_trees():
        advantage = method.credit(tree, tensor(case["leaf_rewards"]), method.normalization())
        yield name, advantage, case["advantage_mean"][1:]


@comparison(
    "BranchGRPO: advantages on the method's own tree",
    "advantages_trees",
    f"{BRANCH}, compute_hierarchical_advantages_by_depth",
    1e-5,
    reason=FLOAT,
)
def branch_advantages_of_the_method() -> Cases:
    for number, case in enumerate(golden("advantages_trees")["branchgrpo"]):
        fans = case["fan_out_by_depth"]
        if set(fans) == {2}:
            steps = tuple(range(len(fans)))
            options = {"split_steps": steps, "sde_steps": steps, "group_size": 2 ** len(fans)}
            method = build_method({"name": "branchgrpo", **options})
            tree = plan_tree(method, len(fans) + 2)
            how = method.normalization()
            advantage = method.credit(tree, tensor(case["leaf_rewards"]), how)
            yield f"{number}", advantage, case["advantage_mean"][1:]


@comparison(
    "BranchGRPO: softmax-weighted values of its nodes",
    "advantages_trees",
    f"{BRANCH}, compute_node_rewards_from_leaves",
    1e-6,
    reason=FLOAT,
)
def branch_softmax_values() -> Cases:
    for name, case, tree in _branch_trees():
        values = softmax_values(tree, tensor(case["leaf_rewards"]), _log_prob(case))
        yield name, values, case["node_reward_weighted"]


@comparison(
    "BranchGRPO: advantages by depth, softmax-weighted",
    "advantages_trees",
    f"{BRANCH}, compute_hierarchical_advantages_by_depth",
    1e-5,
    reason=FLOAT,
)
def branch_softmax_advantages() -> Cases:
    how = build_method({"name": "branchgrpo", "node_value": "softmax"}).normalization()
    for name, case, tree in _branch_trees():
        advantage = credit.softmax_outcome(tree, tensor(case["leaf_rewards"]), how, _log_prob(case))
        yield name, advantage, case["advantage_weighted"][1:]


def _log_prob(case: dict[str, Any]) -> Tensor:
    """Log-probabilities of the steps to all nodes. The root has none."""
    return tensor([value or 0.0 for value in case["log_prob"]])


# TP-GRPO


def completed_trajectories(count: int, steps: int) -> Tree:
    """`count` trajectories of `steps` trained steps. The image follows one more, untrained step."""
    planner = Planner(steps + 1)
    for _ in range(count):
        node = planner.root()
        for k in range(steps + 1):
            planner.image(planner.ode(node), channel=k)
            node = planner.sde(node, train=k < steps)[0]
        planner.image(node, channel=steps + 1)
    return planner.tree()


class TurningPointCase:
    """A turning-point case of advantages_trees.json on a tree of completed trajectories."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.golden, sequence = case, tensor(case["reward_sequence"])
        self.count, self.steps = len(sequence), sequence.shape[1] - 1
        self.tree = completed_trajectories(self.count, self.steps)
        # Leaves are in order of trajectories: completions of the states, then the image.
        self.rewards = torch.cat([sequence, tensor(case["sde_reward"])[:, None]], 1).flatten()

    def by_trajectory(self, values: Tensor) -> Tensor:
        """Values [E] as [trajectories, steps]."""
        return values.reshape(self.count, self.steps)


def _turning_points(*settings: str) -> Iterator[tuple[str, TurningPointCase]]:
    for number, case in enumerate(golden("advantages_trees")["turning_point"]):
        if case["setting"] in settings:
            yield f"{number} {case['setting']}", TurningPointCase(case)


OF_SETTING = {  # options of flowgrain's TP-GRPO by the setting of a case
    "launch script": {},
    "launch script without balance": {"balanced": False},
    "launch script, all turning points": {"balanced": False, "turning_points": "all"},
}


@comparison(
    "TP-GRPO: process rewards",
    "advantages_trees",
    TURNING_POINT,
    1e-6,
    reason=FLOAT,
)
def turning_point_rewards() -> Cases:
    for name, case in _turning_points(*OF_SETTING):
        method = build_method({"name": "tp_grpo", **OF_SETTING[case.golden["setting"]]})
        values = process_rewards(case.tree, case.rewards, method.turning_points, method.balanced)
        yield (
            f"{name} gains",
            case.by_trajectory(gains(case.tree, case.rewards)),
            (case.golden["gains"]),
        )
        yield name, case.by_trajectory(values), case.golden["process_rewards"]


@comparison("TP-GRPO: turning points", "advantages_trees", TURNING_POINT, reason=INDICES)
def turning_point_indicator() -> Cases:
    for name, case in _turning_points(*OF_SETTING):
        options = OF_SETTING[case.golden["setting"]]
        steps = step_rewards(case.tree, case.rewards)
        chosen = turning_points(steps, options.get("turning_points", "consistent"))
        if options.get("balanced", True):
            chosen = balanced(chosen, steps.total_gain)
        yield name, case.by_trajectory(chosen.float()), case.golden["indicator"]


@comparison("DenseGRPO: gains", "advantages_trees", TURNING_POINT, 1e-6, reason=FLOAT)
def turning_point_gains() -> Cases:
    """The published process reward without turning points is DenseGRPO's gain."""
    for name, case in _turning_points("gains only"):
        ours = case.by_trajectory(gains(case.tree, case.rewards))
        yield name, ours, case.golden["process_rewards"]


@comparison(
    "TP-GRPO: process rewards of other flags",
    "advantages_trees",
    TURNING_POINT,
    1e-6,
    deviation="The published code can also add the gain of the whole trajectory at turning points, "
    "or to every step. Its launch script does neither, and flowgrain does not offer them.",
)
def other_turning_point_rewards() -> Cases:
    for name, case in _turning_points("config defaults", "bonus added"):
        values = process_rewards(case.tree, case.rewards)
        yield name, case.by_trajectory(values), case.golden["process_rewards"]


# Granular-GRPO


class GranularCase:
    """A case of granular_credit.json on the tree of flowgrain's G2RPO."""

    def __init__(self, case: dict[str, Any]) -> None:
        granularities, _, steps = tensor(case["reward_1"]).shape
        options = {
            "name": "g2rpo",
            "group_size": case["generations"],
            "sde_steps": tuple(range(steps)),
            "granularities": tuple(range(1, granularities + 1)),
            "anchor_image": False,
        }
        self.method = build_method(options)
        # On a grid of 24 steps, the granularities of a branch have different images.
        self.tree = group_tree(self.method, 24, case["prompts"])
        self.golden = case
        self.shape = case["prompts"], steps, case["generations"]

    def rewards(self, name: str) -> Tensor:
        """Rewards [I] of the tree's images."""
        tree, values = self.tree, tensor(self.golden[name])
        edge_number = {edge: number for number, edge in enumerate(tree.edges.tolist())}
        _, steps, generations = self.shape
        reward_of = {}
        for image, channel in zip(tree.image.tolist(), tree.channel.tolist(), strict=True):
            row = image
            while row not in edge_number:
                row = int(tree.parent[row])
            prompt, place = divmod(edge_number[row], steps * generations)
            k, generation = divmod(place, generations)
            reward_of[image] = values[channel, prompt * generations + generation, k]
        return torch.stack([reward_of[leaf] for leaf in tree.leaves.tolist()])

    def advantages(self, *names: str, clip: float | None = None) -> Tensor:
        """Advantages [prompts * generations, steps] of the sum of several rewards."""
        rewards = {name: self.rewards(name) for name in names}
        method = self.method
        advantage = combine(
            method.credit,
            self.tree,
            rewards,
            dict.fromkeys(rewards, 1.0),
            method.normalization(),
            method.reward_mix,
            clip,
        )
        return advantage.reshape(self.shape).transpose(1, 2).flatten(0, 1)


@comparison("G2RPO: advantages", "granular_credit", GRANULAR, 1e-5, reason=FLOAT)
def granular_advantages() -> Cases:
    for number, values in enumerate(golden("granular_credit")["advantages"]):
        case = GranularCase(values)
        clip = case.method.advantage_clip
        yield f"{number} first", case.advantages("reward_1"), values["advantage_1"]
        yield f"{number} second", case.advantages("reward_2"), values["advantage_2"]
        both = "reward_1", "reward_2"
        yield f"{number} sum", case.advantages(*both), values["advantages"]
        yield f"{number} clamped", case.advantages(*both, clip=clip), values["clamped"]
