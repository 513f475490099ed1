"""Backbones with the architecture of a published model, random weights and random embeddings."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from flowgrain.bench.sizes import ModelSizes
from flowgrain.config import Config
from flowgrain.data import Prompt
from flowgrain.models import Backbone, Dtypes, ModelConfig
from flowgrain.models.flux import FluxBackbone
from flowgrain.models.pipeline import PipelineBackbone
from flowgrain.models.published import required_config
from flowgrain.models.sd3 import SD3Backbone
from flowgrain.training.load import load_dtypes

_CLIP_TOKENS = 77
"""Tokens of CLIP, which come before the tokens of T5 in SD3."""


class _RandomParts(PipelineBackbone):
    """Uses given parts instead of loading a pipeline, and random embeddings without encoders."""

    _absent_parts = ()  # type: ignore[assignment]
    _text_tokens = 0
    """Tokens before the tokens of T5."""

    def __init__(
        self, model: ModelConfig, dtypes: Dtypes, transformer: nn.Module, vae: nn.Module
    ) -> None:
        self._parts = {"transformer": transformer, "vae": vae}
        super().__init__(model, dtypes)

    def _load_pipeline(self, parts: Mapping[str, Any]) -> Any:  # noqa: ARG002
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)  # type: ignore[no-untyped-call]
        return self.pipeline(**dict.fromkeys(self.encoders), **self._parts, scheduler=scheduler)

    def check(self, texts: Sequence[str]) -> None:
        """Accept every text, because there is no tokenizer."""

    def _embedding(self, text: str) -> dict[str, Tensor]:
        sizes = self.transformer.config
        tokens = self._text_tokens + self.config.max_prompt_tokens
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        embeds = torch.randn(tokens, sizes["joint_attention_dim"], generator=generator)
        return {
            "embeds": embeds,
            "pooled": torch.randn(sizes["pooled_projection_dim"], generator=generator),
        }


class _RandomFlux(_RandomParts, FluxBackbone):
    """FLUX.1 with random parts."""


class _RandomSD3(_RandomParts, SD3Backbone):  # type: ignore[misc]
    """SD3.5 with random parts. Its prompts have the tokens of CLIP and T5."""

    _text_tokens = _CLIP_TOKENS


_BACKBONES: Mapping[str, type[_RandomParts]] = {"flux": _RandomFlux, "sd3": _RandomSD3}


def random_backbone(
    sizes: ModelSizes, config: Config, device: torch.device, seed: int = 0
) -> Backbone:
    """The backbone of `config` with random weights on `device`.

    Args:
        sizes: names the configurations of its parts.
        config: settings of the model and dtypes.
        device: where the weights are created, without a copy in main memory.
        seed: the weights on one kind of device are a function of it.
    """
    model, dtypes = config.model, load_dtypes(config)
    parts = sizes.parts or {part: required_config(model, part) for part in ("transformer", "vae")}
    transformer = random_module(parts["transformer"], device, dtypes.transformer, seed)
    vae = random_module(parts["vae"], device, dtypes.vae, seed + 1)
    return _BACKBONES[model.name](model, dtypes, transformer, vae)


def random_module(
    config: Mapping[str, Any], device: torch.device, dtype: torch.dtype, seed: int
) -> nn.Module:
    """A model of diffusers with random weights on `device`.

    Matrices have the standard deviation 1 / sqrt(inputs), so that activations stay of order 1.
    Scales are 1 and biases are 0. Position embeddings that are stored as a buffer are random.
    """
    with torch.device("meta"):
        module: nn.Module = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    module = module.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if tensor.ndim > 1:
                std = 1 / math.sqrt(tensor[0].numel())
                tensor.normal_(std=std, generator=generator)
            else:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.normal_(std=0.5, generator=generator)
    return module.eval()


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # noqa: ARG001
    """The mean of the pixels [I], a reward without cost."""
    return images.mean((1, 2, 3))


def prompts_of(count: int) -> list[str]:
    """Distinct prompts. Their embeddings are random."""
    return [f"prompt {number}" for number in range(count)]
