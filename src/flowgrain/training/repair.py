"""The losses of methods that repair images along the gradient of their reward.

Before the updates of a rollout, every image is scored with gradient, and images below their cap get
candidates, which are decoded and scored. An update then regresses on the accepted moves.

Shapes: I images of all ranks, J images of this rank, K candidates of an image, B rows of a
micro-batch, *L latent.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.core.cost import split_images
from flowgrain.core.mend import KEPT
from flowgrain.core.regression import squared_error
from flowgrain.core.tree import Ints, Tree
from flowgrain.distributed import World
from flowgrain.methods import Repair
from flowgrain.models import take
from flowgrain.rewards import Scores
from flowgrain.training.decoded_rewards import DecodedRewards, check_failed_gradients
from flowgrain.training.errors import RunStopped
from flowgrain.training.health import check_failed_rewards
from flowgrain.training.losses import TermRecord, Terms, Update
from flowgrain.training.policy import Policy
from flowgrain.training.rollout_batch import Metrics, RolloutBatch
from flowgrain.training.signals import check_stop, stop_together


def kept_states(tree: Tree, leaves: Ints) -> Ints:
    """The kept row before each of `leaves`."""
    rows = leaves
    while not tree.kept[rows].all():
        rows = np.where(tree.kept[rows], rows, tree.parent[rows])
    return rows


def _of_all_ranks(
    world: World, names: Sequence[str], parts: Sequence[Mapping[str, Scores]]
) -> dict[str, Scores]:
    """The scores of all ranks by reward, from the parts of this rank. It may have none."""
    mine = {name: Scores.concatenate([part[name] for part in parts]) for name in names}
    ranks = world.gather(mine)
    return {name: Scores.concatenate([rank[name] for rank in ranks]) for name in names}


class RepairLoss:
    """The losses of a `Repair` method. See `losses.RolloutLoss`.

    The losses of an update have the weights of the method, which depend on the number of repaired
    and kept images of the update on all ranks. They are multiplied by the number of images, by
    which the update divides their sum.

    Attributes:
        reward: [I] weighted sums of the rewards. NaN marks an image without a score or a gradient.
        cap: [I].
        chosen: [I] numbers of the accepted candidates, or `KEPT`.
        moves: [J, *L] accepted displacements, or 0.
    """

    def __init__(
        self, config: Config, method: Repair, policy: Policy, batch: RolloutBatch, sigmas: Tensor
    ) -> None:
        self.method, self.policy, self.batch, self.sigmas = method, policy, batch, sigmas
        self.guidance, self.chunk = config.sampling.guidance_scale, config.sampling.batch_size
        self.decoded = DecodedRewards(config, method, policy, batch)
        self.leaves = leaves = batch.tree.leaves
        self.mine = batch.local_rows(leaves)  # (J,)
        self.number = np.searchsorted(leaves, batch.global_rows(self.mine))  # (J,) among I
        self.updates: Sequence[Update] = [
            Update(rows, batch.micro_batches(rows, config.micro_batch_size), len(rows))
            for rows in split_images(batch.tree, int(method.updates_per_rollout))
        ]
        self.reward = self.cap = torch.full((len(leaves),), torch.nan, dtype=torch.float64)
        self.chosen = torch.full((len(leaves),), KEPT)
        self.weight = torch.zeros(len(leaves), dtype=torch.float64)
        self.moves = torch.zeros(0)
        self.allowed = config.training.max_failed_rewards
        self.found: Metrics = {}

    @torch.no_grad()
    def prepare(self) -> None:
        """Score all images with gradient, and decide about the candidates of failing images.

        Raises:
            RunStopped: on all ranks, if a reward or the decoder never has a gradient, or too many
                images or candidates have none or no score.
        """
        reward, slope, failed = self._gradients()
        self.reward = self._gathered(reward)
        prompt = torch.from_numpy(self.batch.tree.prompt[self.leaves])
        self.cap = self.method.caps(self.reward, prompt)
        failing = self.reward < self.cap
        mine = torch.from_numpy(self.number)
        chosen, lost, self.moves, parts = self._repairs(slope, failing[mine])
        self.chosen = self._gathered(chosen.double()).long()
        lost = self._gathered(lost.double()).bool()
        scores = _of_all_ranks(self.batch.world, list(self.decoded.rewards), parts)
        stop_together(self.batch.world)
        check_failed_rewards(scores, self.allowed)
        repaired = self.chosen != KEPT
        kept = ~repaired & ~self.reward.isnan()
        for update in self.updates:
            of_update = torch.from_numpy(np.searchsorted(self.leaves, update.rows))
            weights = self.method.weights(repaired[of_update], kept[of_update])
            self.weight[of_update] = weights * update.count
        totals = self.decoded.total({name: of.values for name, of in scores.items()})
        self.found = {
            "candidate_decodes": int(failing.sum()) * self.method.num_candidates,
            "failed/gradient": failed,
            "failed/candidates": int(totals.isnan().sum()),
            # Without a single scored candidate, there is no verdict about the step size.
            **self._metrics(failing & ~lost, repaired),
        }

    def _gradients(self) -> tuple[Tensor, Tensor, int]:
        """Rewards [J] of the images of this rank and their gradients [J, *L].

        Also returns the number of images of all ranks with a score but without a gradient.
        """
        x0 = self.batch.rollout.at(self.mine).float()
        prompts = self.batch.prompts_of(self.mine)
        rewards, slopes, failure, reason = [torch.zeros(0)], [x0[:0]], None, None
        for first in range(0, len(x0), self.chunk):
            check_stop(self.batch.world)
            part = slice(first, first + self.chunk)
            try:
                found = self.decoded.gradient(x0[part], prompts[part])
            except RunStopped as error:
                failure = str(error)
                break
            rewards.append(found.reward.cpu())
            slopes.append(found.slope)
            reason = found.reason or reason
        reward = torch.cat(rewards)
        known = self.batch.known[torch.from_numpy(self.number)][: len(reward)]
        failed = check_failed_gradients(
            self.batch.world,
            failure,
            (int((known & reward.isnan()).sum()), reason),
            len(self.leaves),
            self.allowed,
        )
        return reward, torch.cat(slopes), failed

    def _repairs(
        self, slope: Tensor, failing: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[dict[str, Scores]]]:
        """Numbers [J] of the accepted candidates of this rank, and the moves [J, *L].

        Also returns which images [J] have no scored candidate, and the scores of all candidates.

        Args:
            slope: [J, *L].
            failing: [J] whether the image is below its cap.
        """
        chosen, moves = torch.full((len(slope),), KEPT), torch.zeros_like(slope)
        lost, parts = torch.zeros(len(slope), dtype=torch.bool), list[dict[str, Scores]]()
        for part in torch.split(failing.nonzero()[:, 0], self.chunk):
            if not len(part):
                continue
            rows, of_all = self.mine[part.numpy()], self.number[part.numpy()]
            x0, prompts = self.batch.rollout.at(rows).float(), self.batch.prompts_of(rows)
            proposed = self.method.moves(slope[part.to(slope.device)])  # (K, B, *L)
            scores = []
            for move in proposed:
                check_stop(self.batch.world)
                values, of_move = self.decoded.values(x0 + move, prompts)
                scores.append(values)
                parts += of_move
            reward, cap = (of[of_all].to(slope) for of in (self.reward, self.cap))
            best = self.method.choose(reward, torch.stack(scores), cap, proposed)
            chosen[part] = best.cpu()
            lost[part] = torch.stack(scores).isnan().all(0).cpu()
            accepted = (best != KEPT).nonzero()[:, 0]
            moves[part.to(slope.device)[accepted]] = proposed[best[accepted], accepted]
        return chosen, lost, moves, parts

    def _gathered(self, values: Tensor) -> Tensor:
        """Values [I] of all images, from the values [J] of the images of every rank."""
        whole = torch.zeros(len(self.leaves), dtype=torch.float64)
        for number, of_rank in self.batch.world.gather((self.number, values.double())):
            whole[torch.from_numpy(number)] = of_rank
        return whole

    def terms(self, number: int, place: int) -> Terms:
        """Loss [B] of a micro-batch. With a KL weight, also the distance [B] to the reference."""
        method, policy, batch, device = self.method, self.policy, self.batch, self.policy.device
        rows, tree = self.updates[number].micro_batches[place].rows, batch.rollout.tree
        state = kept_states(tree, rows)
        z = batch.rollout.at(state).float()
        sigma = self.sigmas[torch.from_numpy(tree.grid_index[state]).to(device)]
        cond = take(batch.cond, torch.from_numpy(tree.prompt[rows]).to(device))
        inputs = (z, sigma, cond, self.guidance)
        old = policy.old_velocity(*inputs)
        v = policy.train_velocity(*inputs)
        weight, move = self._targets(rows, z)
        loss = weight * method.loss_of_move(v, old, sigma, move)
        if not method.kl_weight:
            return {"loss": loss}
        distance = squared_error(v, policy.reference_velocity(*inputs))
        return {"loss": loss + method.kl_weight * distance, "kl": distance}

    def _targets(self, rows: Ints, z: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [B] and moves [B, *L] of rows of this rank. 0 for a row that does not count."""
        owned = np.isin(rows, self.mine)
        place = np.searchsorted(self.mine, rows[owned])
        counted = torch.from_numpy(owned).to(z.device)
        weight, move = torch.zeros(len(rows), device=z.device), torch.zeros_like(z)
        weight[counted] = self.weight[self.number[place]].to(weight)
        move[counted] = self.moves[torch.from_numpy(place).to(self.moves.device)].to(z)
        return weight, move

    def finish(self) -> None:
        """Move the old policy toward the trained policy, and change the state of the method."""
        method = self.method
        self.policy.move_old(method.decay(self.policy.updates))
        repaired, failing = (int(self.found[f"repair/{n}"]) for n in ("repaired", "failing"))
        method.end_rollout(self.reward, repaired, failing)

    def _metrics(self, failing: Tensor, repaired: Tensor) -> Metrics:
        """Numbers of images, the acceptance, the mean cap and the state of the method."""
        below, accepted = int(failing.sum()), int(repaired.sum())
        return {
            "repair/failing": below,
            "repair/repaired": accepted,
            "repair/acceptance": accepted / max(below, 1),
            "repair/cap": float(self.cap.nanmean()),
            **self.method.round_metrics(self.reward),
        }

    def metrics(self, means: Mapping[str, float], record: TermRecord) -> Metrics:  # noqa: ARG002
        """Loss, repairs, and forward passes of the step."""
        rows = [len(update.rows) for update in self.updates]
        metrics: Metrics = {
            "loss": means["loss"],
            "train_forward_passes": sum(rows),
            "frozen_forward_passes": self.method.frozen_passes(sum(rows), sum(rows[1:])),
            **self.found,
        }
        return metrics | ({"kl": means["kl"]} if self.method.kl_weight else {})
