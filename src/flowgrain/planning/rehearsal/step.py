"""One training step on fake tensors: the real rollout, update and optimizer.

Equal model calls are run once and counted as often as they occur: calls without gradient by their
shape, and micro-batches after the second.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flowgrain.config.schema import Config
from flowgrain.data import Prompt
from flowgrain.distributed.fake_ranks import fake_world
from flowgrain.distributed.sharding import fsdp_parameters, local_tensor
from flowgrain.methods import Method
from flowgrain.models import Backbone, Conditioning
from flowgrain.planning.rehearsal.accelerator import NAME
from flowgrain.planning.rehearsal.counts import Counts, difference, plus, times
from flowgrain.planning.rehearsal.ledger import Peak
from flowgrain.planning.rehearsal.mode import RehearsalMode
from flowgrain.planning.rehearsal.stand_ins import prompts_of, rewards_of
from flowgrain.training.collect import RolloutCollector
from flowgrain.training.context import check_context
from flowgrain.training.decoded_rewards import DecodedRewards, Gradients
from flowgrain.training.optimizer import PolicyOptimizer
from flowgrain.training.policy import Policy
from flowgrain.training.rollout_batch import RolloutBatch
from flowgrain.training.step import rollout_loss, run_updates
from flowgrain.training.timer import StageTimer

FIRST, LATER, OPTIMIZER = "first micro-batch", "later micro-batches", "optimizer"


@dataclass(frozen=True)
class Measurement:
    """What a step needs on one rank.

    Attributes:
        peaks: peak of the memory by phase.
        flops: FLOPs by phase.
        moved: bytes received over links, by phase and collective.
        copied: bytes between host and device by direction.
        syncs: waits of the host for the device by place in the code.
        checkpoint: bytes of this rank's tensors in a checkpoint.
        counts: rows through the model without and with gradient, and decoded images.
        largest: rows of the largest call of the model or the decoder, by phase.
    """

    peaks: Mapping[str, Peak]
    flops: Mapping[str, float]
    moved: Mapping[str, float]
    copied: Mapping[str, float]
    syncs: Mapping[str, int]
    checkpoint: float
    counts: Mapping[str, float]
    largest: Mapping[str, int]


class _Timer(StageTimer):
    """Names the phases of the ledger after the stages of a step."""

    def __init__(self, device: torch.device, mode: RehearsalMode) -> None:
        super().__init__(device)
        self._ledger = mode.ledger

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Name what runs inside this context."""
        with self._ledger.during(stage):
            yield


class _Collector(RolloutCollector):
    """A collector that scores in its own thread. The mode of a rehearsal is that of one thread."""

    scores_in_background = False


class _Policy(Policy):
    """A policy that runs a call without gradient once for each shape."""

    mode: RehearsalMode

    def velocity(
        self, model: Any, x: Tensor, sigma: Tensor, cond: Conditioning, guidance: float
    ) -> Tensor:
        """v [B, *L] of `model` with guidance."""
        call = super().velocity
        if torch.is_grad_enabled():
            self.mode.add_rows("gradient", len(x))
            return call(model, x, sigma, cond, guidance)
        self.mode.add_rows("no gradient", len(x))
        adapted = next((m.disable_adapters for m in model.modules() if _is_adapter(m)), None)
        autocast = torch.is_autocast_enabled(NAME)
        key = ("velocity", id(model), x.shape, x.dtype, guidance, adapted, autocast)
        return self.mode.once(key, lambda: call(model, x, sigma, cond, guidance))


def _is_adapter(module: Any) -> bool:
    return hasattr(module, "disable_adapters") and hasattr(module, "lora_A")


class _Optimizer(PolicyOptimizer):
    """An optimizer that says what its memory is for."""

    mode: RehearsalMode
    marks: list[list[Counts]]
    """Counts at the start, after every micro-batch and at the end of each update."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        super().backward(loss)
        self.mode.ledger.tag("gradients", self._gradients())
        self.mode.ledger.phase = LATER
        self.marks[-1].append(self.mode.counted())

    def step(self, losses: Any) -> tuple[Tensor, bool]:
        """Take an optimizer step."""
        self.mode.ledger.tag("gradients", self._gradients())
        with self.mode.ledger.during(OPTIMIZER):
            result = super().step(losses)
        self.mode.ledger.tag("optimizer", self.tensors().values())
        self.marks[-1].append(self.mode.counted())
        self.marks.append([self.mode.counted()])
        return result

    def _gradients(self) -> Iterator[Tensor | None]:
        for parameter in self.policy.parameters.values():
            yield parameter.grad
        for parameter in fsdp_parameters(self.policy.model):
            yield parameter.unsharded_accumulated_grad
            unsharded = getattr(parameter, "_unsharded_param", None)
            yield None if unsharded is None else unsharded.grad


def measure(
    config: Config, build: Callable[[torch.device], Backbone], gpus: int, device: torch.device
) -> Measurement:
    """What the first training step of `config` needs on one of `gpus` ranks.

    Args:
        config: settings. runtime.dtype is not auto, and with several ranks runtime.rollout_weights
            is not auto.
        build: builds the backbone on a device.
        gpus: number of ranks.
        device: the registered accelerator.

    Raises:
        SettingsError: the backbone cannot be built without weights, or does not support
            runtime.context_parallel.
    """
    mode = RehearsalMode()
    world = fake_world(gpus, NAME, config.runtime.context_parallel)
    with mode.running(), _gradients_once(mode):
        backbone = build(device)
        check_context(config, backbone)
        _decode_once(backbone, mode)
        config = config.resolved(backbone)
        method = config.method.model_copy(deep=True)
        policy: Any = _Policy.for_training(config, backbone, device, world)
        policy.mode = mode
        optimizer: Any = _Optimizer(policy, config, world)
        optimizer.mode, optimizer.marks = mode, []
        _tag(mode, policy, backbone)
        with mode.ledger.during("rewards"):
            rewards, held = rewards_of(config, device, mode.ledger)
        prompts = prompts_of(config, backbone)
        timer = _Timer(device, mode)
        collector = _Collector(config, method, policy, rewards, prompts, world, timer)
        mode.forget()
        batch = collector.collect(1)
        mode.ledger.tag("latents", [batch.rollout.latents])
        mode.ledger.tag("conditioning", [*batch.cond.values(), *policy.unconditional.values()])
        _tag(mode, policy, backbone)  # FSDP2 makes its unsharded parameters at the first call
        with mode.ledger.during(FIRST):
            _update(config, method, policy, optimizer, batch, collector.sigmas)
        tensors = {**policy.tensors(), **optimizer.tensors()}
        del held  # the rewards of evaluations, which are in memory during the whole step
    saved = sum(local_tensor(t).nbytes for t in tensors.values())
    return Measurement(
        peaks=mode.ledger.peaks(),
        flops=dict(mode.flops),
        moved=dict(mode.moved),
        copied=dict(mode.copied),
        syncs={place: round(count) for place, count in mode.syncs.items()},
        checkpoint=float(saved),
        counts=dict(mode.rows),
        largest=dict(mode.largest),
    )


def _decode_once(backbone: Any, mode: RehearsalMode) -> None:
    """Let the backbone run a decode without gradient once for each shape."""
    decode = backbone.decode

    def counted(latents: Tensor) -> Tensor:
        mode.add_rows("decoded", len(latents))
        if torch.is_grad_enabled() and latents.requires_grad:
            found: Tensor = decode(latents)
            return found
        return mode.once(("decode", latents.shape, latents.dtype), lambda: decode(latents))

    backbone.decode = counted


@contextmanager
def _gradients_once(mode: RehearsalMode) -> Iterator[None]:
    """Compute the gradient of the decoded rewards once for each number of images."""
    compute = DecodedRewards.gradient_of_batch

    def gradient_of_batch(self: DecodedRewards, x0: Tensor, prompts: Sequence[Prompt]) -> Gradients:
        decoded = mode.rows["decoded"]
        slope = mode.once(
            ("gradient of rewards", x0.shape, x0.dtype), lambda: compute(self, x0, prompts).slope
        )
        mode.rows["decoded"] = decoded + len(x0)
        return Gradients(torch.ones(len(x0), device=x0.device), slope, None)

    with patch.object(DecodedRewards, "gradient_of_batch", gradient_of_batch):
        yield


def _tag(mode: RehearsalMode, policy: Policy, backbone: Backbone) -> None:
    """Say what the parameters are for."""
    ledger, copies = mode.ledger, policy.copies
    for kind, module in (
        ("weights", copies.model),
        ("sampling copy", copies.sampler),
        ("reference", copies.reference),
        ("old policy", copies.old),
        ("VAE", backbone.vae),
    ):
        if module is not None:
            ledger.tag(kind, [*module.parameters(), *module.buffers()])
    for module in copies.distinct():
        for parameter in fsdp_parameters(module):
            ledger.tag("unsharded parameters", parameter.all_gather_outputs)
    if policy.ema is not None:
        ledger.tag("EMA", policy.ema.shadow_params)
    pipe: Any = getattr(backbone, "_encoding_pipe", None)
    if pipe is not None:
        for name, part in pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                ledger.tag("text encoders", [*part.parameters(), *part.buffers()])


def _update(
    config: Config,
    method: Method,
    policy: Policy,
    optimizer: _Optimizer,
    batch: RolloutBatch,
    sigmas: Tensor,
) -> None:
    """Run the updates with at most three micro-batches each, and add the cost of the others.

    With kept graphs, micro-batches differ, so that all of them run.
    """
    losses, mode = rollout_loss(config, method, policy, batch, sigmas), optimizer.mode
    optimizer.marks = [[mode.counted()]]
    if config.training.graph_memory:
        run_updates(losses, policy, optimizer, batch.world)
        return
    run_updates(losses, policy, optimizer, batch.world, _places)
    counts = [len(update.micro_batches) for update in losses.updates]
    chosen, costs = _places(len(counts)), []
    for marks, place in zip(optimizer.marks, chosen, strict=False):
        missing = counts[place] - len(_places(counts[place]))
        left_out = times(difference(marks[2], marks[1]), missing) if missing else {}
        mode.add(LATER, left_out)
        costs.append(plus(difference(marks[-1], marks[0]), left_out))
    if len(chosen) < len(counts):  # the other updates cost as much as the second
        mode.add(LATER, times(costs[1], len(counts) - len(chosen)))


def _places(count: int) -> list[int]:
    """The first two and the last of `count` updates or micro-batches.

    The others are equal to the second.
    """
    return sorted({*range(min(count, 2)), count - 1}) if count else []
