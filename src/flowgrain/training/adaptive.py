"""Adaptive groups: a prompt whose first samples have equal rewards is replaced by another prompt.

A place is one of the P prompt numbers of a training step. What happens at a place does not depend
on other places, so the result does not depend on the number of ranks.

Shapes: P places, G samples of a group, I images, J images of a part of a group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flowgrain.config.economy import AdaptiveGroupsConfig
from flowgrain.core.cost import cost
from flowgrain.core.credit import RewardMix, weighted_sum
from flowgrain.core.rollout import Noise
from flowgrain.core.subtree import SampledPart, Subtree, assemble, subtree
from flowgrain.core.tree import ROOT, Ints, Tree
from flowgrain.data import Prompt
from flowgrain.distributed import World
from flowgrain.rewards import Scores
from flowgrain.training.rollout_batch import Metrics
from flowgrain.training.scored_tree import ScoredTree

SampleTree = Callable[[Tree, Sequence[Prompt], Noise], ScoredTree]
"""sample(tree of one prompt, prompts of all ranks, noise) -> the tree, scored."""


@dataclass(frozen=True)
class AdaptiveGroups:
    """The groups of a training step.

    Attributes:
        prompts: the final prompts of the P places.
        scored: their whole groups.
        decodes: images that were decoded and scored, but replaced, on all ranks.
        metrics: replaced prompts and wasted forward passes.
    """

    prompts: list[Prompt]
    scored: ScoredTree
    decodes: int
    metrics: Metrics


@dataclass(frozen=True)
class Spread:
    """How the spread of the rewards of a place is measured.

    Attributes:
        weights: weight of each reward by name.
        by: how several rewards are combined.
        min_spread: largest standard deviation (divided by n) that counts as no spread, in units of
            the weighted rewards.
    """

    weights: Mapping[str, float]
    by: RewardMix
    min_spread: float

    def missing(self, scores: Mapping[str, Scores], places: int) -> list[bool]:
        """Whether the rewards of each of `places` places have no spread.

        With "reward", the sum of the weighted rewards counts. With "advantage", a place has no
        spread if none of its weighted rewards has one. The spread of a place with fewer than two
        scores is unknown, and does not count as missing.

        Args:
            scores: scores [places * J] by reward.
            places: number of places.
        """
        values = {name: of_reward.values for name, of_reward in scores.items()}
        if self.by == "reward":
            terms = [weighted_sum(values, self.weights)]
        else:
            terms = [abs(self.weights[name]) * values[name] for name in values]
        found = []
        for place in range(places):
            of_place = [term.reshape(places, -1)[place].double() for term in terms]
            known = [term[term.isfinite()] for term in of_place]
            known = [term for term in known if len(term) > 1]
            found.append(bool(known) and all(self._is_flat(term) for term in known))
        return found

    def _is_flat(self, values: Tensor) -> bool:
        centered = values - values.mean()
        # As for advantages, a difference of float32 rounding is none.
        if float(centered.abs().max()) <= 1e-6 * float(values.abs().max()):
            return True
        return float(centered.square().mean().sqrt()) <= self.min_spread


def replacements(
    prompts: Sequence[Prompt], chosen: Sequence[Prompt], step: int, seed: int
) -> Iterator[Prompt]:
    """Prompts to try in place of the prompts `chosen` of a training step, in a random order.

    Prompts of the step come last. The sequence is endless and a function of seed and step.
    """
    order = np.random.default_rng([seed, step, len(chosen)]).permutation(len(prompts))
    while True:
        later = []
        for number in order.tolist():
            if prompts[number] in chosen:
                later.append(prompts[number])
            else:
                yield prompts[number]
        yield from later


@dataclass
class _Probes:
    """The sampled first parts of all places, of which the last of a place counts.

    `origin` [P]: number of the part that counts, and position of the place in this part.
    """

    parts: list[ScoredTree]
    origin: list[tuple[int, int]]


def sample_adaptively(
    settings: AdaptiveGroupsConfig,
    plan: Tree,
    prompts: Sequence[Prompt],
    others: Iterator[Prompt],
    spread: Spread,
    noise: Noise,
    sample: SampleTree,
    world: World,
) -> AdaptiveGroups:
    """Sample the groups of a training step, and replace prompts without spread.

    Args:
        settings: samples of a probe, smallest spread, number of rounds.
        plan: tree of one prompt, with independent roots.
        prompts: first prompts of the P places.
        others: prompts to try. Round r uses P of them, one for every place.
        spread: measures the spread of a probe.
        noise: noise of the training step. A place always has the same noise.
        sample: samples and scores a tree.
        world: ranks.
    """
    roots, count = int((plan.parent == ROOT).sum()), len(prompts)
    first, rest = subtree(plan, 0, settings.probe), subtree(plan, settings.probe, roots)
    current = list(prompts)
    probes = _Probes([sample(first.tree, current, noise)], [(0, p) for p in range(count)])
    flat = [p for p, none in enumerate(spread.missing(probes.parts[0].scores, count)) if none]
    replaced = 0
    for number in range(1, settings.max_rounds + 1):
        if not flat:
            break
        of_round = [next(others) for _ in range(count)]
        for place in flat:
            current[place] = of_round[place]
        replaced += len(flat)
        rows = padded(flat, world.data_size)
        position = {p: i for i, p in reversed([*enumerate(rows)]) if (p - i) % world.data_size == 0}
        part = sample(first.tree, [current[p] for p in rows], _of_places(noise, np.array(rows)))
        probes.parts.append(part)
        missing = spread.missing(part.scores, len(rows))
        for place in flat:
            probes.origin[place] = (number, position[place])
        used = {part for part, _ in probes.origin}
        probes.parts[:] = [
            part if i in used else _without_images(part) for i, part in enumerate(probes.parts)
        ]
        flat = [place for place in flat if missing[position[place]]]
    last = sample(rest.tree, current, noise)
    scored = _join(plan, probes, first, last, rest, world)
    passes = sum(part.rollout.forward_passes for part in probes.parts[1:]) * world.data_size
    return AdaptiveGroups(
        current,
        scored,
        replaced * cost(first.tree).decodes,
        {
            "adaptive/replaced_prompts": replaced,
            "adaptive/groups_without_spread": len(flat),
            "adaptive/wasted_forward_passes": passes,
        },
    )


def _without_images(part: ScoredTree) -> ScoredTree:
    """`part` without images and latents, which take most of the memory."""
    latents = part.rollout.latents
    rollout = replace(part.rollout, latents=latents.new_empty(0, *latents.shape[1:]))
    return replace(part, rollout=rollout, images=part.images.new_empty(0, *part.images.shape[1:]))


def padded(places: Sequence[int], ranks: int) -> list[int]:
    """`places` in an order in which every rank samples its own places.

    Rank r samples the entries r, r + ranks, ... All ranks must make the same number of model calls,
    so a rank with fewer places repeats one, whose result is discarded.
    """
    of_rank = [[p for p in places if p % ranks == rank] for rank in range(ranks)]
    most = max(map(len, of_rank))
    filled = [own + [(own or list(places))[0]] * (most - len(own)) for own in of_rank]
    return [filled[rank][i] for i in range(most) for rank in range(ranks)]


def _of_places(noise: Noise, places: Ints) -> Noise:
    """`noise` for prompts whose numbers are positions in `places`."""
    return lambda prompt, draw: noise(places[prompt], draw)


def _join(
    plan: Tree, probes: _Probes, first: Subtree, last: ScoredTree, rest: Subtree, world: World
) -> ScoredTree:
    """The whole groups, from the probes that count and the rest."""
    count = len(probes.origin)
    mine = world.assign(count).tolist()  # the last may be `count` or more, and is discarded
    local = [probes.origin[p] if p < count else (0, p) for p in mine]
    own = np.arange(len(mine))

    def source(part: int) -> Ints:
        """Prompt number in the rollout of `part` on this rank, of every place of this rank."""
        return np.array(
            [i // world.data_size if k == part else -1 for k, i in local], dtype=np.int64
        )

    sampled = [
        SampledPart(first, part.rollout, source(number)) for number, part in enumerate(probes.parts)
    ]
    rollout = assemble(plan, [*sampled, SampledPart(rest, last.rollout, own)])

    def whole(of_parts: Sequence[Tensor], of_rest: Tensor, at: Sequence[tuple[int, int]]) -> Tensor:
        """Values [len(at) * I, ...] of whole groups, from values of the parts."""
        shape, places = of_rest.shape[1:], len(at)
        result = of_rest.new_empty(places, len(plan.leaves), *shape)
        of_first = np.searchsorted(plan.leaves, first.rows[first.tree.leaves])
        of_last = np.searchsorted(plan.leaves, rest.rows[rest.tree.leaves])
        by_part = [values.reshape(-1, len(of_first), *shape) for values in of_parts]
        for place, (part, position) in enumerate(at):
            result[place, torch.from_numpy(of_first)] = by_part[part][position]
        result[:, torch.from_numpy(of_last)] = of_rest.reshape(places, len(of_last), *shape)
        return result.flatten(0, 1)

    here = [(part, i // world.data_size) for part, i in local]
    images = whole([part.images for part in probes.parts], last.images, here)
    scores = {}
    for name, of_last_part in last.scores.items():
        parts = [part.scores[name] for part in probes.parts]
        values = whole([part.values for part in parts], of_last_part.values, probes.origin)
        reasons = [part.reason for part in (*parts, of_last_part) if part.reason]
        failed = int(values.isnan().sum())
        scores[name] = Scores(values, failed, reasons[0] if failed and reasons else None)
    monitors = {
        name: whole([part.monitors[name] for part in probes.parts], values, probes.origin)
        for name, values in last.monitors.items()
    }
    return replace(last, rollout=rollout, images=images, scores=scores, monitors=monitors)
