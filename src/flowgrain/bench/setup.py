"""What every step gets: device and sizes, and the runs and policies that it measures."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from flowgrain.bench.random_models import brightness, prompts_of, random_backbone
from flowgrain.bench.sizes import REAL, TINY, ModelSizes, Sizes, bench_config
from flowgrain.config import Config
from flowgrain.training import Trainer
from flowgrain.training.load import compute_device
from flowgrain.training.policy import Policy

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
"""Variable that deterministic matrix products of CUDA need, from before the first one."""


@dataclass(frozen=True)
class Setup:
    """Device and sizes of a bench.

    Attributes:
        device_name: "cpu" or "cuda".
        tiny: whether the speed is measured with tiny models.
        folder: directory for temporary files of the step.
    """

    device_name: str
    tiny: bool
    folder: Path

    @property
    def device(self) -> torch.device:
        """The measured device.

        Raises:
            SettingsError: there is no GPU.
        """
        return compute_device(self.device_name)

    @property
    def sizes(self) -> Sizes:
        """The measured sizes."""
        return TINY if self.tiny else REAL

    @property
    def compiler(self) -> Literal["inductor", "aot_eager"]:
        """Value of runtime.compile. A CPU checks the capture of graphs, without a C++ compiler."""
        return "inductor" if self.device_name == "cuda" else "aot_eager"

    def trainer(
        self, sizes: ModelSizes, config: Config, out: str = "run", on: str | None = None
    ) -> Trainer:
        """A run of a model with random weights.

        Args:
            sizes: the model.
            config: its settings, see `config`.
            out: name of the directory of the run.
            on: device on which the weights are created: the same weights for the same value.
                Default: the device of the run.
        """
        device = torch.device(on or config.runtime.device)
        prompts = prompts_of(max(config.training.prompts_per_step, 2))
        return Trainer(
            config,
            self.folder / out,
            backbone=random_backbone(sizes, config, device),
            prompts=prompts,
            eval_prompts=prompts,
            rewards={"brightness": brightness},
        )

    def config(self, sizes: ModelSizes, *changes: str) -> Config:
        """The settings of a measurement on the device."""
        return bench_config(sizes, self.device_name, *changes)

    def policy(self, sizes: ModelSizes, config: Config) -> Policy:
        """The policy of a model with random weights, without a run around it."""
        backbone = random_backbone(sizes, config, self.device)
        return Policy.for_training(config, backbone, self.device)


def deterministic() -> None:
    """Use deterministic kernels in float32 without TF32, for checks.

    Must be called before the first kernel of the process.
    """
    os.environ.setdefault(CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(True)
    exact_float32()


def exact_float32() -> None:
    """Use float32 instead of TF32 in matrix products and convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
