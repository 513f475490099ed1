"""What is measured: the sizes of the real models, and tiny sizes that run everything on a CPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowgrain.config import Config, load_config

SETTINGS = (
    "evaluation.every=0",
    "evaluation.rewards=[]",
    "model.embedding_cache=null",
    "rewards=[{name: brightness}]",
    "watch.action=off",
    "training.record.prompts=0",
)
"""Settings of all measurements: no files of other programs, nothing evaluated or recorded."""

_TINY_VAE = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "latent_channels": 4,
    "norm_num_groups": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_TINY_FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 8),
}
_TINY_SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


@dataclass(frozen=True)
class ModelSizes:
    """What is measured of a model.

    Attributes:
        name: name in tables.
        source: recipe with the model, its method and its image size.
        settings: overrides of the recipe.
        parts: configurations of the transformer and the VAE. None: those that are built in for
            model.path.
        sampling: rows per model call.
        compiled: rows per model call with compiled blocks. Each one is compiled anew.
        training: rows per micro-batch of a LoRA, with gradient checkpointing.
        plain: rows per micro-batch of a LoRA, without gradient checkpointing.
        full: rows per micro-batch of a full fine-tune, with gradient checkpointing.
        iteration: overrides that cut a training step down to minutes.
    """

    name: str
    source: str
    settings: tuple[str, ...]
    sampling: tuple[int, ...]
    compiled: tuple[int, ...]
    training: tuple[int, ...]
    plain: tuple[int, ...]
    full: tuple[int, ...]
    iteration: tuple[str, ...]
    parts: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Sizes:
    """All sizes of a bench.

    Attributes:
        flux: FLUX.1-dev.
        sd3: SD3.5-medium.
        repeats: timed repetitions of a measurement. Tables contain their median.
        matrix: side of the square matrices whose product is timed.
        kinds: FLUX.1-dev and SD3.5-medium by the name of their backbone.
    """

    flux: ModelSizes
    sd3: ModelSizes
    repeats: int
    matrix: int
    kinds: Mapping[str, ModelSizes] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", {"flux": self.flux, "sd3": self.sd3})


_LORA = ("lora.rank=32", "optimizer.learning_rate=1e-4", "runtime.dtype=bfloat16")
_FLUX_STEP = (
    *("sampling.num_steps=8", "method.group_size=4", "method.granularities=[1,2]"),
    *("training.prompts_per_step=1", "sampling.batch_size=8"),
)
_SD3_STEP = (
    *("sampling.num_steps=10", "method.group_size=8"),
    *("training.prompts_per_step=1", "sampling.batch_size=16"),
)

REAL = Sizes(
    ModelSizes(
        name="FLUX.1-dev",
        source="flux/g2rpo",
        settings=_LORA,
        sampling=(1, 2, 4, 8, 16),
        compiled=(1, 8),
        training=(1, 2, 4),
        plain=(1,),
        full=(1,),
        iteration=_FLUX_STEP,
    ),
    ModelSizes(
        name="SD3.5-medium",
        source="sd3/flow_grpo",
        settings=_LORA,
        sampling=(1, 4, 8, 16, 32),
        compiled=(1, 16),
        training=(1, 4, 8, 16),
        plain=(1, 4),
        full=(1, 4),
        iteration=_SD3_STEP,
    ),
    repeats=3,
    matrix=8192,
)
"""Sizes of the published models, for one GPU."""

_SMALL = ("model.height=32", "model.width=32", "model.max_prompt_tokens=8", "lora.rank=2")
_TINY_STEP = (
    *("sampling.num_steps=4", "method.group_size=3"),
    *("training.prompts_per_step=2", "sampling.batch_size=8"),
)

TINY = Sizes(
    ModelSizes(
        name="tiny FLUX.1",
        source="flux/g2rpo",
        settings=(*_LORA, *_SMALL, "model.path=tiny"),
        sampling=(1, 4),
        compiled=(4,),
        training=(1, 2),
        plain=(1,),
        full=(1,),
        iteration=(*_TINY_STEP, "method.granularities=[1,2]"),
        parts={"transformer": _TINY_FLUX, "vae": _TINY_VAE},
    ),
    ModelSizes(
        name="tiny SD3.5",
        source="sd3/flow_grpo",
        settings=(*_LORA, *_SMALL, "model.path=tiny"),
        sampling=(1, 4),
        compiled=(4,),
        training=(1, 2),
        plain=(1,),
        full=(1,),
        iteration=_TINY_STEP,
        parts={"transformer": _TINY_SD3, "vae": _TINY_VAE},
    ),
    repeats=3,
    matrix=256,
)
"""Tiny twins of the published models. Correctness is checked with them on every device."""


def bench_config(sizes: ModelSizes, device: str, *changes: str) -> Config:
    """The settings of a measurement of `sizes` on `device` ("cpu" or "cuda").

    Args:
        sizes: the model.
        device: value of runtime.device.
        changes: further overrides, which win.
    """
    words = [*SETTINGS, *sizes.settings, f"runtime.device={device}"]
    return load_config(sizes.source, [*words, *changes])
