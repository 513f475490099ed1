"""The naive rollouts of the methods: each adds the trained edges of all prompts to a `Naive`."""

from collections.abc import Sequence

import numpy as np
from naive import Naive
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
