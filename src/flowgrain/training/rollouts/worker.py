"""A rollout worker: a process that samples, decodes and scores a share of a step's prompts.

It does what a rank does in `RolloutCollector.score_tree`, with the same chunks, batches and noise.
The results are therefore those of the training process, to the bit.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowgrain.config.load import validate
from flowgrain.config.schema import Config
from flowgrain.core.tree import Ints, Tree
from flowgrain.data import Prompt
from flowgrain.methods import ForwardProcess
from flowgrain.models import Backbone, Conditioning
from flowgrain.models.quiet import quiet_libraries
from flowgrain.registry import load_plugin
from flowgrain.rewards import build_reward
from flowgrain.training.collect import RolloutCollector
from flowgrain.training.copies import Copies, names_of_blocks, trained_model
from flowgrain.training.load import compute_device, compute_dtype, load_model
from flowgrain.training.policy import Policy
from flowgrain.training.rollouts.steps import step_noise
from flowgrain.training.scored_tree import ScoredTree


@dataclass(frozen=True)
class RolloutRequest:
    """A share of the prompts of a training step.

    Attributes:
        step: training step, a key of the noise.
        first: position of the first prompt in the step.
        prompts: consecutive prompts, in whole chunks.
        cond: conditioning of the prompts, on the CPU.
        unconditional: conditioning of the empty prompt, for classifier-free guidance.
        tree: tree of one prompt.
        method: state of the method, such as its calibrated noise.
    """

    step: int
    first: int
    prompts: list[Prompt]
    cond: Conditioning
    unconditional: Conditioning
    tree: Tree
    method: Mapping[str, Any]


class RolloutWorker:
    """Samples with a copy of the policy.

    The text encoders are not used: the training process sends the encoded prompts.

    Args:
        settings: settings of the run, from `worker_settings`.
        threads: CPU threads. The last bits of a result depend on them.
    """

    def __init__(self, settings: Mapping[str, Any], threads: int) -> None:
        quiet_libraries()
        torch.set_num_threads(threads)
        for path in settings["runtime"]["plugins"]:
            load_plugin(path)
        config = validate(dict(settings))
        device = compute_device(config.runtime.device)
        backbone = load_model(config, train=_old_samples(config))
        self.policy = sampling_policy(config, backbone, device)
        if not self.policy.parameters:  # of a full fine-tune. Quantized tails follow these
            self.policy.parameters = dict(self.policy.model.named_parameters())
        rewards = {reward.name: build_reward(reward) for reward in config.rewards}
        self.collector = RolloutCollector(config, config.method, self.policy, rewards, [])

    def process(self) -> int:
        """The number of this process. Returns once the worker is ready."""
        return os.getpid()

    def sample(
        self, request: RolloutRequest, parameters: Mapping[str, Tensor]
    ) -> tuple[ScoredTree, int]:
        """Sample and score the prompts of `request` with `parameters`, by name.

        Returns:
            The scored tree on the CPU, without conditioning, and the number of this process.
        """
        with torch.no_grad():
            for name, value in parameters.items():
                self.policy.parameters[name].copy_(value)
        self.policy.version += 1
        self.policy.unconditional = self._on_device(request.unconditional)
        collector = self.collector
        collector.method.load_state_dict(request.method)
        of_step = step_noise(collector.config, self.policy.backbone.latent_shape, request.step)

        def noise(prompt: Ints, draw: Ints) -> Tensor:
            return of_step(prompt + request.first, draw)

        scored = collector.score_tree(
            request.tree,
            request.prompts,
            collector.kernel(),
            noise,
            collector.config.watch.action != "off",
            encoded=self._on_device(request.cond),
        )
        rollout = replace(scored.rollout, latents=scored.rollout.latents.cpu())
        return replace(scored, cond={}, rollout=rollout), os.getpid()

    def _on_device(self, cond: Conditioning) -> Conditioning:
        return {name: value.to(self.policy.device) for name, value in cond.items()}


def worker_settings(config: Config) -> dict[str, Any]:
    """The settings of a worker of a run with settings `config`.

    A worker has no workers. It does not build the rewards of evaluations.
    """
    values = config.to_dict()
    del values["rollout"]
    return values


def _old_samples(config: Config) -> bool:
    """Whether the slowly moving policy of a forward-process method samples."""
    return isinstance(config.method, ForwardProcess) and config.method.old_samples


def sampling_policy(config: Config, backbone: Backbone, device: torch.device) -> Policy:
    """A policy with the transformer that samples in the training process, in the same dtypes."""
    if not _old_samples(config):
        return Policy.for_sampling(config, backbone, device, adapter=config.lora.rank > 0)
    model = trained_model(config, backbone, compute_dtype(config.runtime.dtype, device))
    blocks = names_of_blocks(model, backbone.blocks)
    backbone.to(device)
    model.to(device)
    copies = Copies(model, model, None, model, blocks, old_samples=True)
    return Policy(config, backbone, copies, device)
