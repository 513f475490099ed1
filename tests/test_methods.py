"""Every method against a naive version written from the formulas: a trajectory at a time, nothing shared, with the same noise.

Samples, log-probabilities, advantages and gradients must agree. Tolerances: the order of fp32 sums differs, 1e-5 on samples and
log-probabilities; advantages divide by a spread of some .01, hence 1e-3; gradients 1e-4 of their norm.
"""

import itertools
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from toy import PROMPTS, Toy, green, red

from flowgrain import Run
from flowgrain.methods.algorithms import build as build_method
from flowgrain.methods.algorithms import price, psi_profile
from flowgrain.data import latent_noise
from flowgrain.config.schema import PAPER, settings
from flowgrain.methods.window import window

P, SEED, STEP = 2, 5, 1


@dataclass(eq=False)
class Edge:
    """A trained step as the naive version sees it."""

    prompt: int
    k: int
    x: torch.Tensor
    following: torch.Tensor
    log_prob: float
    rewards: dict[str, list[float]]  # by reward: one number, or one for each granularity
    peers: tuple
    advantage: float = 0.0
    weight: float = 1.0


class Naive:
    """One row at a time. `names` are the prompts of the step, `draw` counts the noises of a prompt in the order of use."""

    def __init__(self, run):
        self.s = s = run.settings
        self.net, self.toy = run.policy.transformer, run.backbone
        self.names = [run.prompts[i] for i in np.random.default_rng([SEED, 0]).permutation(len(run.prompts))[:P]]
        t = np.linspace(1, 0, s.num_steps + 1)
        self.sigma = [float(np.float32(v)) for v in s.shift * t / (1 + (s.shift - 1) * t)]
        self.edges: list[Edge] = []
        self.images: list[torch.Tensor] = []

    def begin(self, prompt):
        self.prompt, self.draws = prompt, 0

    def noise(self):
        self.draws += 1
        return latent_noise((2, 3), "train", SEED, STEP, self.prompt, self.draws - 1)

    def v(self, x, k, prompt=None):
        number = PROMPTS.index(self.names[self.prompt if prompt is None else prompt])
        return self.net(x[None], torch.tensor([self.sigma[k]]), torch.tensor([number]))[0]

    def law(self, x, v, k):
        """Mean and std of one stochastic step, from the table of kernels."""
        s, a, b = self.s, self.sigma[k], self.sigma[k + 1]
        dt = b - a
        if s.noise == "dance_sde":
            score = -(x - (1 - a) * (x - a * v)) / a**2
            return x + v * dt - s.eta**2 / 2 * score * dt, s.eta * math.sqrt(-dt)
        if s.noise == "cps":
            std = b * math.sin(s.eta * math.pi / 2)
            return (1 - b) * (x - a * v) + math.sqrt(b * b - std * std) * (x + (1 - a) * v), std
        strength = s.psi[k] if s.noise == "calibrated_sde" else s.eta * math.sqrt(a / (1 - (self.sigma[1] if k == 0 else a)))
        drift = strength**2 / (2 * a)
        return x * (1 + drift * dt) + v * (1 + drift * (1 - a)) * dt, strength * math.sqrt(-dt)

    def log_prob(self, x, mean, std):
        return (-((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)).mean()

    def ode(self, x, levels):
        with torch.no_grad():
            for k, j in itertools.pairwise(levels):
                x = x + self.v(x, k) * (self.sigma[j] - self.sigma[k])
        return x

    def solver(self, x, levels, x0_before, before):
        """DPM-Solver++(2M) in its own terms, alpha = 1 - sigma; the last step, into sigma = 0, is x0_hat."""
        with torch.no_grad():
            for c, n in itertools.pairwise(levels):
                s_c, s_n = self.sigma[c], self.sigma[n]
                x0 = x - s_c * self.v(x, c)
                if s_n == 0:
                    return x0
                log_snr = [
                    math.log((1 - self.sigma[i]) / self.sigma[i]) if self.sigma[i] < 1 else -math.inf for i in (before, c, n)
                ]
                h, h_before = log_snr[2] - log_snr[1], log_snr[1] - log_snr[0]
                estimate = x0 if x0_before is None else x0 + (h / h_before) / 2 * (x0 - x0_before)
                x = s_n / s_c * x - (1 - s_n) * math.expm1(-h) * estimate
                x0_before, before = x0, c
        return x

    def x0_hat(self, x, k):
        with torch.no_grad():
            return x - self.sigma[k] * self.v(x, k)

    def steps(self, x, levels, x0_before, before):
        """A deterministic way by `levels`, of second order if the settings say so; x0_before: the estimate at level `before`."""
        return self.solver(x, levels, x0_before, before) if self.s.tail_order == 2 else self.ode(x, levels)

    def finish(self, x, left, x0_before):
        """From level `left`, just after a stochastic step, to sigma = 0."""
        t = self.s.num_steps
        count = max(1, int((t - left) * self.s.tail_ratio))
        return self.steps(x, [left, *(round(left + (t - left) * j / count) for j in range(1, count + 1))], x0_before, left - 1)

    def score(self, x):
        """The rewards of a finished latent, which also counts as an image."""
        self.images.append(x)
        image = self.toy.decode(x[None])
        return {name: float(reward(image, [self.names[self.prompt]])[0]) for name, reward in (("red", red), ("green", green))}

    def sde(self, x, k):
        """One stochastic step; what is needed to train on it."""
        with torch.no_grad():
            mean, std = self.law(x, self.v(x, k), k)
            following = mean + std * self.noise()
            return following, float(self.log_prob(following, mean, std))

    def edge(self, k, x, following, log_prob, rewards, peers):
        self.edges.append(Edge(self.prompt, k, x, following, log_prob, rewards, peers))

    def chain(self, x, noisy, trained):
        """A trajectory from sigma = 1 to 0; one outcome for all its trained steps."""
        todo, last = [], max(noisy)
        for k in range(last + 1):
            x0_hat = self.x0_hat(x, k)
            if k in noisy:
                following, log_prob = self.sde(x, k)
                if k in trained:
                    todo.append((k, x, following, log_prob))
            else:
                following = self.ode(x, [k, k + 1])
            x = following
        rewards = {name: [value] for name, value in self.score(self.finish(x, last + 1, x0_hat)).items()}
        for k, x_k, following, log_prob in todo:
            self.edge(k, x_k, following, log_prob, rewards, (self.prompt, k))

    def advantages(self):
        """Normalised among peers, per reward and per channel, and added up; or the weighted rewards first."""
        s = self.s
        for edge in self.edges:
            peers = [e for e in self.edges if (e.peers == edge.peers if s.peers == "step" else e.prompt == edge.prompt)]

            def standard(value_of, peers=peers, edge=edge):
                values = np.array([value_of(e) for e in peers])
                spread = values if s.std_scope == "group" else np.array([value_of(e) for e in self.edges])
                return (value_of(edge) - values.mean()) / (spread.std(ddof=int(s.std_unbiased)) + s.std_epsilon)

            channels = range(len(edge.rewards["red"]))
            if s.reward_mix == "reward":
                total = sum(standard(lambda e, c=c: sum(w * e.rewards[n][c] for n, w in s.rewards.items())) for c in channels)
            else:
                total = sum(w * standard(lambda e, n=n, c=c: e.rewards[n][c]) for n, w in s.rewards.items() for c in channels)
            edge.advantage = float(np.clip(total, -s.advantage_clip, s.advantage_clip))

    def loss(self, edge, guard=False, weights=None):
        """The loss of one edge under the network as it is now."""
        s = self.s
        mean, std = self.law(edge.x, self.v(edge.x, edge.k, edge.prompt), edge.k)
        dt = self.sigma[edge.k + 1] - self.sigma[edge.k]
        log_ratio = self.log_prob(edge.following, mean, std) - edge.log_prob
        if guard:
            old, _ = self.law(edge.x, self.old_v[id(edge)], edge.k)
            log_ratio = std * (log_ratio + ((mean - old) ** 2).mean() / (2 * std**2))
        r = log_ratio.exp()
        loss = -torch.min(r * edge.advantage, r.clamp(1 - s.clip_range, 1 + s.clip_range) * edge.advantage)
        if guard:
            loss = loss / -dt
        loss = loss * (weights[edge.k] if weights else 1.0)
        if s.kl_weight:
            reference, _ = self.law(edge.x, self.reference_v[id(edge)], edge.k)
            kl = ((mean - reference) ** 2).mean() / (2 * std**2)
            loss = loss + s.kl_weight * kl * (-dt if s.kl_form == "flow_grpo" else 1)
        return loss * edge.weight

    def remember(self):
        """The velocities before any update: those of the old policy, which is also the reference."""
        with torch.no_grad():
            self.old_v = {id(e): self.v(e.x, e.k, e.prompt) for e in self.edges}
        self.reference_v = self.old_v


def grow_flow_grpo(n, noisy=None):
    noisy = range(n.s.num_steps - 1) if noisy is None else noisy
    for prompt in range(P):
        n.begin(prompt)
        for start in [n.noise() for _ in range(n.s.group_size)]:
            n.chain(start, noisy, noisy)


def grow_flow_grpo_fast(n):
    w = n.s.window_size
    left = int(np.random.default_rng([SEED, STEP]).integers(0, n.s.num_steps // 2 - w + 1))
    grow_flow_grpo(n, range(left, left + w))


def grow_dancegrpo(n):
    steps = range(n.s.num_steps - 1)
    trained = np.random.default_rng([SEED, STEP]).choice(steps, int(len(steps) * n.s.timestep_fraction), replace=False)
    for prompt in range(P):
        n.begin(prompt)
        start = n.noise()
        for _ in range(n.s.group_size):
            n.chain(start, steps, trained)


def grow_g2rpo(n):
    t = n.s.num_steps
    for prompt in range(P):
        n.begin(prompt)
        x = n.noise()
        for k in range(t // 2):
            for _ in range(n.s.group_size):
                following, log_prob = n.sde(x, k)
                scores = []
                for stride in n.s.granularities:
                    levels = [*range(k + 1, t + 1)][: k + 2 - (k + 1)] + [*range(k + 2, t + 1)][
                        ::stride
                    ]  # sigma[:k+2] + sigma[k+2::stride]
                    scores.append(n.score(n.steps(following, [*levels[:-1], t], n.x0_hat(x, k), k)))
                n.edge(k, x, following, log_prob, {m: [s[m] for s in scores] for m in scores[0]}, (prompt, k))
            x = n.ode(x, [k, k + 1])
        n.score(n.ode(x, [*range(t // 2, t + 1)]))  # the anchor's own image


def grow_mixgrpo(n):
    s = n.s
    window = range(s.window_size)  # the first position
    for prompt in range(P):
        n.begin(prompt)
        start = n.noise()
        for _ in range(s.group_size):
            x, todo, x0_before = start, [], None
            for k in window:
                x0_before = n.x0_hat(x, k)
                following, log_prob = n.sde(x, k)
                todo.append((k, x, following, log_prob))
                x = following
            rewards = {m: [v] for m, v in n.score(n.finish(x, window.stop, x0_before)).items()}
            for k, x_k, following, log_prob in todo:
                n.edge(k, x_k, following, log_prob, rewards, (prompt, k))


def grow_densegrpo(n):
    s, t = n.s, n.s.num_steps
    for prompt in range(P):
        n.begin(prompt)
        for x in [n.noise() for _ in range(s.group_size)]:

            def look(x, k, x0_before=None):
                steps = t - k if s.look_steps == "all" else min(s.look_steps, t - k)
                return n.score(
                    n.steps(x, [k, *(round(k + (t - k) * j / steps) for j in range(1, steps + 1))], x0_before, max(k - 1, 0))
                )

            before = look(x, 0) if s.dense_reward == "gain" else None  # the baseline asks for R of the next state alone
            for k in range(t):
                following, log_prob = n.sde(x, k)
                after = look(following, k + 1, n.x0_hat(x, k)) if k + 1 < t else n.score(following)
                worth = after if s.dense_reward == "state" else {m: after[m] - before[m] for m in after}
                n.edge(k, x, following, log_prob, {m: [v] for m, v in worth.items()}, (prompt, k))
                x, before = following, after


def grow_tempflow_grpo(n):
    t = n.s.num_steps
    for prompt in range(P):
        n.begin(prompt)
        x = n.noise()
        for k in range(t - 1):
            for _ in range(n.s.group_size):
                following, log_prob = n.sde(x, k)
                rewards = {m: [v] for m, v in n.score(n.finish(following, k + 1, n.x0_hat(x, k))).items()}
                n.edge(k, x, following, log_prob, rewards, (prompt, k))
            x = n.ode(x, [k, k + 1])


def grow_branchgrpo(n):
    s, t = n.s, n.s.num_steps

    def below(x, k):
        """Level by level, as the noises are counted; the value of an edge is the mean over the leaves below it."""
        layer = [(x, [])]
        for j in range(k, t - 1):
            following = []
            for x_j, way in layer:
                for _ in range(s.split_fan if j in s.split_steps else 1):
                    x_next, log_prob = n.sde(x_j, j)
                    following.append((x_next, [*way, (j, x_j, x_next, log_prob)]))
            layer = following
        return [(n.score(n.ode(x_j, [t - 1, t])), way) for x_j, way in layer]

    for prompt in range(P):
        n.begin(prompt)
        leaves = below(n.noise(), 0)
        steps = {}
        for rewards, way in leaves:
            for j, x_j, x_next, log_prob in way:
                steps.setdefault((j, id(x_next)), (j, x_j, x_next, log_prob, []))[4].append(rewards)
        for j, x_j, x_next, log_prob, scores in sorted(steps.values(), key=lambda step: step[0]):
            worth = {m: [float(np.mean([score[m] for score in scores]))] for m in scores[0]}
            n.edge(j, x_j, x_next, log_prob, worth, (prompt, j))


TWO = {"red": 1.0, "green": 0.5}
CASES = {
    "g2rpo": (grow_g2rpo, {"granularities": (1, 2, 3), "num_steps": 7}),
    "g2rpo-cps": (grow_g2rpo, {"method": "g2rpo", "granularities": (1, 2), "noise": "cps", "eta": 0.6}),
    "flow_grpo": (grow_flow_grpo, {"updates_per_rollout": 2}),
    "flow_grpo-group-published-kl": (grow_flow_grpo, {"method": "flow_grpo", "std_scope": "group", "kl_form": "flow_grpo"}),
    "flow_grpo_fast": (grow_flow_grpo_fast, {"num_steps": 8}),
    "dancegrpo": (grow_dancegrpo, {}),
    "mixgrpo": (grow_mixgrpo, {"window_size": 2}),
    "mixgrpo_flash": (grow_mixgrpo, {"window_size": 2, "num_steps": 8, "tail_ratio": 0.6}),
    "mixgrpo_flash_star": (grow_mixgrpo, {"window_size": 2, "num_steps": 9, "tail_ratio": 0.5}),
    "mixgrpo_flash-first-step": (grow_mixgrpo, {"method": "mixgrpo_flash", "window_size": 1, "num_steps": 6, "tail_ratio": 0.8}),
    "densegrpo": (grow_densegrpo, {"psi": (0.9, 0.7, 0.5, 0.5, 0.4)}),
    "densegrpo-state-jump": (
        grow_densegrpo,
        {"method": "densegrpo", "noise": "flow_sde", "calibration_rounds": 0, "dense_reward": "state", "look_steps": 1},
    ),
    "densegrpo-joint-two": (
        grow_densegrpo,
        {"method": "densegrpo", "noise": "flow_sde", "calibration_rounds": 0, "peers": "prompt", "look_steps": 2},
    ),
    "tempflow_grpo": (grow_tempflow_grpo, {}),
    "g2rpo-second-order": (grow_g2rpo, {"method": "g2rpo", "granularities": (1, 3), "num_steps": 7, "tail_order": 2}),
    "flow_grpo_fast-short": (
        grow_flow_grpo_fast,
        {"method": "flow_grpo_fast", "num_steps": 8, "tail_order": 2, "tail_ratio": 0.6},
    ),
    "tempflow_grpo-short": (
        grow_tempflow_grpo,
        {"method": "tempflow_grpo", "num_steps": 6, "tail_order": 2, "tail_ratio": 0.5},
    ),
    "densegrpo-second-order": (
        grow_densegrpo,
        {"method": "densegrpo", "psi": (0.9, 0.7, 0.5, 0.5, 0.4), "look_steps": 3, "tail_order": 2},
    ),
    "grpo_guard": (grow_flow_grpo, {}),
    "branchgrpo": (grow_branchgrpo, {"split_steps": (0, 2), "group_size": 4}),
}


def build(case, tmp_path, **more):
    own = CASES[case][1] if case in CASES else {}
    values = {"method": case, "num_steps": 5, "group_size": 3, "prompts_per_step": P, "rewards": TWO, "seed": SEED}
    values |= {"kl_weight": 0.2, "learning_rate": 1e-2, "eval_rewards": (), **own, **more}
    return Run(
        settings(values), tmp_path, backbone=Toy(), prompts=PROMPTS, eval_prompts=PROMPTS, rewards={"red": red, "green": green}
    )


def gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("case", CASES)
def test_against_the_naive_version(case, tmp_path, monkeypatch):
    run = build(case, tmp_path)
    s = run.settings
    naive = Naive(run)
    CASES[case][0](naive)
    naive.advantages()
    naive.remember()
    sampled = run.sample_tree(STEP)
    tree, result = sampled.result.tree, sampled.result
    assert sampled.prompts == naive.names

    edges = naive.edges
    assert len(edges) == len(tree.edges)
    torch.testing.assert_close(result.at(tree.edges), torch.stack([e.following for e in edges]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.at(tree.parent[tree.edges]), torch.stack([e.x for e in edges]), atol=1e-5, rtol=1e-5)
    ours = sorted(map(tuple, result.at(tree.leaves).flatten(1).tolist()))
    theirs = sorted({tuple(round(v, 4) for v in x.flatten().tolist()) for x in naive.images})
    assert len(ours) == len(theirs)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)  # the naive ones are rounded to tell equal images
    law, of_parents, _ = run._law(sampled, tree.trained_parents, run.policy.train_velocity)
    assert of_parents.tolist() == tree.edges.tolist()
    torch.testing.assert_close(law.log_prob(result.at(tree.edges)), torch.tensor([e.log_prob for e in edges]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sampled.advantage, torch.tensor([e.advantage for e in edges]), atol=2e-3, rtol=2e-3)

    weights = None
    if s.method == "tempflow_grpo":
        std = [naive.law(torch.zeros(1), torch.zeros(1), k)[1] for k in range(s.num_steps - 1)]
        weights = [value / np.mean(std) for value in std]
    shares = [[e for e in edges if e.prompt == p] for p in range(P)] if s.updates_per_rollout == 2 else [edges]
    optimise, seen = run.optimise, []

    def compare(losses):
        """Called with the gradients at hand, before the step is taken: the naive ones come from the same weights."""
        ours = gradient(run.policy.transformer).clone()
        run.optimizer.zero_grad()
        share = shares[len(seen)]
        (sum(naive.loss(e, s.method == "grpo_guard", weights) for e in share) / len(share)).backward()
        theirs = gradient(run.policy.transformer).clone()
        seen.append((ours - theirs).norm() / theirs.norm())
        return optimise(losses)

    monkeypatch.setattr(run, "optimise", compare)
    metrics = run.update(sampled)
    assert len(seen) == len(shares)
    assert max(seen) < 2e-3  # of the gradient's norm; the advantages' own tolerance
    if len(shares) == 2:
        assert metrics["clip_fraction/later_updates"] > 0


@pytest.mark.parametrize("method", PAPER)
def test_executed_is_priced_and_the_first_ratio_is_one(method, tmp_path):
    """At the paper's own setting, but for few prompts: what runs is what `price` said, and the policy starts on-policy."""
    own = {"calibration_rounds": 1, "calibration_samples": 2} if method == "densegrpo" else {}
    values = {"method": method, "prompts_per_step": P, "learning_rate": 1e-3, "eval_rewards": (), "updates_per_rollout": 1, **own}
    run = Run(settings(values), tmp_path, backbone=Toy(), prompts=PROMPTS, eval_prompts=PROMPTS, rewards={"red": red})
    for step in (1, 2):
        metrics, expected = run.step(step), price(run.method, run.settings, step)
        for name in ("forward_passes", "train_forward_passes", "frozen_forward_passes", "decodes"):
            assert metrics[name] == P * getattr(expected, name), name
        assert metrics.get("ratio/max", 1) == metrics.get("ratio/mean", 1) == 1


PASSES = {  # docs/*.md and the papers' settings: sampling passes of one prompt, and what public code spends
    "g2rpo": (1708, 2188),
    "densegrpo": (24 * 55, 24 * 65),
    "flow_grpo": (240, 240),
    "dancegrpo": (181, 192),
    "mixgrpo": (289, 300),
}


@pytest.mark.parametrize("method", PASSES)
def test_passes_of_the_papers(method):
    s = settings({"method": method})
    found = build_method(s)
    assert (price(found, s).forward_passes, found.published_passes) == PASSES[method]


def test_mixgrpo_needs_228_passes_over_its_first_twelve_windows():
    s = settings({"method": "mixgrpo"})
    method = build_method(s)
    assert np.mean([price(method, s, 1 + 25 * i).forward_passes for i in range(12)]) == 228.5


def test_densegrpo_decodes_eleven_images_a_trajectory():
    s = settings({"method": "densegrpo"})
    assert price(build_method(s), s).decodes == 11 * s.group_size


def test_best_of_trains_the_extremes(tmp_path):
    run = build("dancegrpo", tmp_path, group_size=6, best_of=2, kl_weight=0.0)
    sampled = run.sample_tree(STEP)
    peers = sampled.result.tree.peers
    for group in range(peers.max() + 1):
        of_group = torch.from_numpy(peers == group)
        weight, advantage = sampled.weight[of_group], sampled.advantage[of_group]
        assert weight.mean() == 1
        assert set(advantage[weight > 0].tolist()) == {advantage.min().item(), advantage.max().item()}


def test_calibration_follows_the_balance_and_is_restored(tmp_path):
    run = build("densegrpo", tmp_path, psi=None, calibration_rounds=3, calibration_samples=8, max_steps=1, eval_every=0)
    start = psi_profile(run.settings)
    run.train()
    saved = json.loads((tmp_path / "calibration.json").read_text())
    psi = np.array(start)
    for done in saved["rounds"]:
        np.testing.assert_allclose(done["psi"], psi)
        balanced = np.abs(np.array(done["gained"]) - np.array(done["lost"])) < 0.25
        psi = np.maximum(psi + np.where(balanced, 0.01, -0.01), 0.01)
    np.testing.assert_allclose(saved["psi"], psi)
    assert run.method.kernel.psi == tuple(saved["psi"])
    again = build("densegrpo", tmp_path, psi=None, calibration_rounds=3, calibration_samples=8, max_steps=2, eval_every=0)
    again.resume()
    assert again.method.kernel.psi == run.method.kernel.psi


@pytest.mark.parametrize(
    ("own", "lefts"),
    [
        ({}, {1: 0, 25: 0, 26: 1, 50: 1, 51: 2, 500: 19, 501: 20, 525: 20, 526: 0}),
        ({"window_end": "stay"}, {526: 20, 9999: 20}),
        ({"window_stride": 4, "window_interval": 10}, {10: 0, 11: 4, 21: 8, 51: 20, 61: 0}),
        ({"window_schedule": "decay", "window_interval": 10}, {10: 0, 11: 1, 19: 1, 20: 2}),
        ({"window_schedule": "exp_decay", "window_interval": 10}, {130: 12, 131: 13, 140: 13, 141: 14, 151: 15, 160: 16}),
        ({"window_schedule": "frozen"}, {1: 0, 10_000: 0}),
    ],
)
def test_windows(own, lefts):
    s = settings({"method": "mixgrpo", **own})
    assert {step: window(s, step).start for step in lefts} == lefts


@pytest.mark.parametrize("method", ["mixgrpo", "flow_grpo_fast"])
def test_random_windows_are_never_empty_and_go_everywhere(method):
    s = settings({"method": method, "window_schedule": "random"})
    seen = [window(s, step) for step in range(1, 400)]
    assert {len(w) for w in seen} == {s.window_size}
    last = s.num_steps // 2 if method == "flow_grpo_fast" else s.num_steps - 1
    assert {w.start for w in seen} == set(range(last - s.window_size + 1))
    assert window(s, 7) == window(s, 7)


def test_diffusionnft_against_the_naive_version(tmp_path, monkeypatch):
    run = build("diffusionnft", tmp_path, kl_weight=0.0, tail_order=1, nft_beta=0.7)
    s = run.settings
    with torch.no_grad():
        for p in run.policy.transformer.parameters():
            p += 0.05 * torch.sin(torch.arange(p.numel()).reshape(p.shape))  # so that old and new differ
    naive = Naive(run)
    naive.net = run.policy.old
    samples = []
    for prompt in range(P):
        naive.begin(prompt)
        for _ in range(s.group_size):
            x = naive.ode(naive.noise(), [*range(s.num_steps + 1)])
            naive.score(x)
            samples.append((prompt, x))
    sampled = run.sample_tree(STEP)
    torch.testing.assert_close(sampled.result.at(sampled.credited), torch.stack([x for _, x in samples]), atol=1e-5, rtol=1e-5)

    def reward(x, prompt):
        image = run.backbone.decode(x[None])
        return sum(w * float(f(image, [naive.names[prompt]])[0]) for f, w in ((red, 1.0), (green, 0.5)))

    values = np.array([reward(x, prompt) for prompt, x in samples]).reshape(P, -1)
    advantage = ((values - values.mean(1, keepdims=True)) / (values.std() + 1e-4)).ravel()
    np.testing.assert_allclose(sampled.advantage.numpy(), advantage, atol=2e-3)

    times = int(s.num_steps * s.timestep_fraction)
    levels = np.random.default_rng([SEED, STEP]).permuted(np.tile(np.arange(s.num_steps), (len(samples), 1)), axis=1)[:, :times]
    losses = []
    for i, (prompt, x0) in enumerate(samples):
        r = min(max(advantage[i] / 5 / 2 + 0.5, 0), 1)
        for k in levels[i].tolist():
            t, eps = naive.sigma[k], latent_noise((2, 3), "forward", SEED, STEP, i, k)
            x = (1 - t) * x0 + t * eps
            number = torch.tensor([PROMPTS.index(naive.names[prompt])])
            v = run.policy.transformer(x[None], torch.tensor([t]), number)[0]
            with torch.no_grad():
                old = run.policy.old(x[None], torch.tensor([t]), number)[0]

            def part(velocity, x=x, t=t, x0=x0):
                error = x - t * velocity - x0
                return (error**2).mean() / error.detach().abs().mean()

            plus, minus = 0.7 * v + 0.3 * old, 1.7 * old - 0.7 * v
            losses.append(5 / 0.7 * (r * part(plus) + (1 - r) * part(minus)))
    (sum(losses) / len(losses)).backward()
    theirs = gradient(run.policy.transformer).clone()
    run.optimizer.zero_grad()
    optimise, seen = run.optimise, []

    def compare(done):
        seen.append((gradient(run.policy.transformer) - theirs).norm() / theirs.norm())
        return optimise(done)

    monkeypatch.setattr(run, "optimise", compare)
    metrics = run._contrast(sampled, run.method.forward_process)
    assert seen[0] < 2e-3
    assert metrics["train_forward_passes"] == len(losses)
