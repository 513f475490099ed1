"""The naive rollouts of the methods: each adds the trained edges of all prompts to a `Naive`."""

from collections.abc import Sequence

import numpy as np
from naive import Naive, NaiveEdge
from torch import Tensor
from toy_trainer import SEED, STEP, P


def flow_grpo(n: Naive, steps: Sequence[int] | None = None) -> None:
    steps = range(n.num_steps - 1) if steps is None else steps
    for prompt in range(P):
        n.begin(prompt)
        for start in [n.noise() for _ in range(n.group_size)]:
            n.trajectory(start, steps, steps)


def flow_grpo_fast(n: Naive) -> None:
    size = n.method.window_size
    left = int(np.random.default_rng([SEED, STEP]).integers(0, n.num_steps // 2 - size + 1))
    flow_grpo(n, range(left, left + size))


def dancegrpo(n: Naive) -> None:
    steps = range(n.num_steps - 1)
    count = int(len(steps) * n.method.timestep_fraction)
    trained = np.random.default_rng([SEED, STEP]).choice(steps, count, replace=False)
    for prompt in range(P):
        n.begin(prompt)
        start = n.noise()
        for _ in range(n.group_size):
            n.trajectory(start, steps, trained)


def g2rpo(n: Naive) -> None:
    t = n.num_steps
    for prompt in range(P):
        n.begin(prompt)
        x = n.noise()
        for k in range(t // 2):
            for _ in range(n.group_size):
                x_next, log_prob = n.sde(x, k)
                scores = []
                for stride in n.method.granularities:
                    # Published code: sigma[:k + 2] + sigma[k + 2::stride], its last entry set to 0.
                    indices = [k + 1, *range(k + 2, t + 1, stride)]
                    leaf = n.steps(x_next, [*indices[:-1], t], n.x0_hat(x, k), k)
                    scores.append(n.score(leaf))
                values = {name: [score[name] for score in scores] for name in scores[0]}
                n.edge(k, x, x_next, log_prob, values)
            x = n.ode(x, [k, k + 1])
        n.score(n.ode(x, range(t // 2, t + 1)))  # the image of the anchor


def mixgrpo(n: Naive) -> None:
    window = range(n.method.window_size)  # its first position
    for prompt in range(P):
        n.begin(prompt)
        start = n.noise()
        for _ in range(n.group_size):
            n.trajectory(start, window, window)


def densegrpo(n: Naive) -> None:
    t, gain = n.num_steps, n.method.dense_reward == "gain"

    def completion(x: Tensor, k: int, x0_before: Tensor | None = None) -> dict[str, float]:
        remaining, count = t - k, n.method.completion_steps
        count = remaining if count == "all" else min(count, remaining)
        indices = [k, *(round(k + remaining * j / count) for j in range(1, count + 1))]
        return n.score(n.steps(x, indices, x0_before, max(k - 1, 0)))

    for prompt in range(P):
        n.begin(prompt)
        for start in [n.noise() for _ in range(n.group_size)]:
            x = start
            # The baseline only needs the reward of the next state.
            before = completion(x, 0) if gain else {}
            for k in range(t):
                x_next, log_prob = n.sde(x, k)
                last = k + 1 == t
                after = n.score(x_next) if last else completion(x_next, k + 1, n.x0_hat(x, k))
                values = {
                    name: [score - before[name] if gain else score] for name, score in after.items()
                }
                n.edge(k, x, x_next, log_prob, values)
                x, before = x_next, after


def tempflow_grpo(n: Naive) -> None:
    for prompt in range(P):
        n.begin(prompt)
        for start in [n.noise() for _ in range(n.method.seeds)]:
            x = start
            for k in range(n.num_steps - 1):
                for _ in range(n.group_size):
                    x_next, log_prob = n.sde(x, k)
                    scores = n.score(n.finish(x_next, k + 1, n.x0_hat(x, k)))
                    values = {name: [score] for name, score in scores.items()}
                    n.edge(k, x, x_next, log_prob, values)
                x = n.ode(x, [k, k + 1])


def branchgrpo(n: Naive) -> None:
    method, t = n.method, n.num_steps
    for prompt in range(P):
        n.begin(prompt)
        layer: list[tuple[Tensor, list]] = [(n.noise(), [])]  # states, each with its path
        for k in range(t - 1):
            fan = method.split_fan if k in method.split_steps else 1
            children = []
            for x, path in layer:
                for _ in range(fan):
                    x_next, log_prob = n.sde(x, k)
                    children.append((x_next, [*path, (k, x, x_next, log_prob)]))
            layer = children
        # The value of an edge is the mean over the leaves below it.
        steps: dict[tuple[int, int], tuple[tuple, list]] = {}
        for x, path in layer:
            scores = n.score(n.ode(x, [t - 1, t]))
            for step in path:
                k, _, x_next, _ = step
                steps.setdefault((k, id(x_next)), (step, []))[1].append(scores)
        for step, scores in sorted(steps.values(), key=lambda value: value[0][0]):
            values = {name: [float(np.mean([s[name] for s in scores]))] for name in scores[0]}
            n.edge(*step, values)


def softmax_branchgrpo(n: Naive) -> None:
    """The value of a state: the softmax-weighted mean of its children's values."""
    method, t = n.method, n.num_steps

    def descend(x: Tensor, k: int, found: list) -> dict[str, float]:
        if k == t - 1:
            return n.score(n.ode(x, [t - 1, t]))
        steps, values = children[id(x)], []
        for step in steps:
            values.append(descend(step[0], k + 1, found))
            found.append((k, x, *step, values[-1]))
        weight = np.exp([log_prob for _, log_prob in steps])
        weight /= weight.sum()
        return {name: float(sum(weight * [v[name] for v in values])) for name in values[0]}

    for prompt in range(P):
        n.begin(prompt)
        root = n.noise()
        layer, children, place = [root], {}, {}
        for k in range(t - 1):
            fan = method.split_fan if k in method.split_steps else 1
            for x in layer:
                children[id(x)] = [n.sde(x, k) for _ in range(fan)]
            layer = [x_next for x in layer for x_next, _ in children[id(x)]]
            place |= {id(x): number for number, x in enumerate(layer)}
        found: list = []
        descend(root, 0, found)
        for k, x, x_next, log_prob, scores in sorted(found, key=lambda e: (e[0], place[id(e[2])])):
            n.edge(k, x, x_next, log_prob, {name: [v] for name, v in scores.items()})


def e_grpo(n: Naive) -> None:
    t, lengths = n.num_steps, dict(zip(n.method.sde_steps, n.method.merged_steps, strict=True))
    for prompt in range(P):
        n.begin(prompt)
        x = n.noise()
        for k in range(t):
            for _ in range(n.group_size if k in lengths else 0):
                end = k + lengths[k]
                x_next, log_prob = n.sde(x, k, end)
                scores = n.score(n.ode(x_next, range(end, t + 1)))
                values = {name: [score] for name, score in scores.items()}
                n.edge(k, x, x_next, log_prob, values, end)
            x = n.ode(x, [k, k + 1])
        n.score(x)  # the image of the trunk


def tp_grpo(n: Naive) -> None:
    """The process reward of the weighted sum of the rewards, as the value of one reward."""
    t, weights = n.num_steps, n.config.reward_weights
    trajectories = []
    for prompt in range(P):
        n.begin(prompt)
        for start in [n.noise() for _ in range(n.group_size)]:
            x, steps = start, []
            sequence = [n.score(n.ode(x, range(t + 1)))]
            for k in range(t - 1):  # the last step is an ODE step
                x_next, log_prob = n.sde(x, k)
                steps.append((k, x, x_next, log_prob))
                sequence.append(n.score(n.ode(x_next, range(k + 1, t + 1))))
                x = x_next
            total = [sum(w * scores[name] for name, w in weights.items()) for scores in sequence]
            trajectories.append((prompt, steps, np.array(total)))
    turns = []  # absolute gain, sign of the gain, number of the trajectory, step
    for number, (_, _, total) in enumerate(trajectories):
        gain, trend = np.diff(total), np.sign(total[-1] - total[0])
        for k in range(len(gain)):
            continues = np.sign(gain[k]) == np.sign(total[-1] - total[k + 1]) != 0
            flips = k == 0 or (np.sign(gain[k]) == trend and np.sign(gain[k - 1]) == -trend)
            if continues and flips:
                turns.append((abs(total[-1] - total[0]), trend, number, k))
    up, down = ([turn for turn in turns if turn[1] == s] for s in (1, -1))
    kept = min(len(up), len(down)) or len(turns)
    largest = [sorted(side, key=lambda turn: -turn[0])[:kept] for side in (up, down)]
    chosen = {turn[2:] for side in largest for turn in side}
    for number, (prompt, steps, total) in enumerate(trajectories):
        n.prompt = prompt
        for k, x, x_next, log_prob in steps:
            end = total[-1] if (number, k) in chosen else total[k + 1]
            value = {"red": [float(end - total[k])], "green": [0.0]}
            n.edge(k, x, x_next, log_prob, value)


def ddpo_advantages(n: Naive, own: bool = False) -> None:
    """With the mean and the std of the whole batch, or with the own values of every prompt."""
    weights = n.config.reward_weights

    def total(edge: NaiveEdge) -> float:
        return sum(w * edge.values[name][0] for name, w in weights.items())

    for edge in n.edges:
        values = [total(e) for e in n.edges if not own or e.prompt == edge.prompt]
        std = np.std(values) + n.method.std_epsilon
        edge.advantage = float((total(edge) - np.mean(values)) / std)
