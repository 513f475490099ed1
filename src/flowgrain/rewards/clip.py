"""Rewards of CLIP's make: CLIP score, PickScore, HPS-v2 and v2.1, and the aesthetic score of a linear head.

Shapes: I images, H x W pixels, D embedding. Written on transformers' classes; open_clip's checkpoints are read by a key map.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPConfig, CLIPModel

from flowgrain.rewards.base import RewardSource

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_WHOLE = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state dict of a ViT under the names of transformers' CLIPModel. Raises ValueError for a key it does not know."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        tower, _, rest = key.partition("transformer.resblocks.")
        if key in _WHOLE:
            named[_WHOLE[key]] = value
        elif key in ("visual.proj", "text_projection"):
            named["visual_projection.weight" if key == "visual.proj" else "text_projection.weight"] = value.T.contiguous()
        elif rest and tower in ("", "visual."):
            number, _, part = rest.partition(".")
            layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
            if part.startswith("attn.in_proj_"):
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    named[f"{layer}.self_attn.{letter}_proj.{part.removeprefix('attn.in_proj_')}"] = third
            else:
                module, _, kind = part.rpartition(".")
                if module not in _BLOCK:
                    raise ValueError(f"{key} is no key of an open_clip ViT")
                named[f"{layer}.{_BLOCK[module]}.{kind}"] = value
        elif key != "attn_mask":
            raise ValueError(f"{key} is no key of an open_clip ViT")
    return named


def read_checkpoint(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or, if that is allowed in so many words, of a pickled one, of which only tensors are read.

    Raises ValueError naming the file and the way out.
    """
    if not path.is_file():
        raise ValueError(f"reward_models: there is no file {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickle, which can run code; convert it to safetensors, or set reward_pickles=true to read its tensors"
        )
    found = torch.load(path, map_location="cpu", weights_only=True)
    return dict(found.get("state_dict", found))


def fit(images: Tensor, size: int, mode: str) -> Tensor:
    """Images [I, 3, H, W] in 0..1 as [I, 3, size, size]: bicubic, then a centre crop ("crop") or black bars ("pad", HPS)."""
    h, w = images.shape[-2:]
    scale = size / (min(h, w) if mode == "crop" else max(h, w))
    shape = max(round(h * scale), 1), max(round(w * scale), 1)
    if shape != (h, w):
        images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    if mode == "crop":
        return images[..., top : top + size, left : left + size]
    return F.pad(images, (-left, size - shape[1] + left, -top, size - shape[0] + top))


class _Clip:
    """A CLIP or SigLIP of transformers, or an open_clip checkpoint beside the config of one."""

    default: str
    mode = "crop"

    def __init__(self, source: RewardSource) -> None:
        self.source = source
        name, _, checkpoint = (source.model or self.default).partition("#")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = self._build(name, Path(checkpoint) if checkpoint else None)
        except OSError as error:
            raise ValueError(f"reward_models: {name} could not be loaded ({error}); give a folder or a hub name") from error
        self.model = self.model.eval().requires_grad_(False).to(source.device)
        self.size = self.model.config.vision_config.image_size
        self.length = self.model.config.text_config.max_position_embeddings
        self.siglip = self.model.config.model_type.startswith("siglip")
        mean, std = ((0.5,) * 3, (0.5,) * 3) if self.siglip else (OPENAI_MEAN, OPENAI_STD)
        self.mean, self.std = (torch.tensor(v, device=source.device).reshape(1, 3, 1, 1) for v in (mean, std))

    def _build(self, name: str, checkpoint: Path | None) -> nn.Module:
        if checkpoint is None:
            return AutoModel.from_pretrained(name)
        config = AutoConfig.from_pretrained(name)
        if not isinstance(config, CLIPConfig):
            raise ValueError(f"reward_models: {name} is no CLIP, and {checkpoint} can only be read as one")
        state = read_checkpoint(checkpoint, self.source.allow_pickle)
        if any("resblocks" in key for key in state):
            state = from_open_clip(state)
        model = CLIPModel(config)
        missing, unexpected = model.load_state_dict(state, strict=False)
        missing = [key for key in missing if not key.endswith("position_ids")]
        if missing or unexpected:
            raise ValueError(
                f"{checkpoint} is no checkpoint of {name}: {len(missing)} tensors are missing, {len(unexpected)} too many"
            )
        return model

    def image_embeds(self, images: Tensor) -> Tensor:
        """Normalised embeddings [I, D] of images [I, 3, H, W] in 0..1."""
        pixels = (fit(images.float().to(self.source.device), self.size, self.mode) - self.mean) / self.std
        return F.normalize(_tensor(self.model.get_image_features(pixel_values=pixels)), dim=-1)

    def text_embeds(self, prompts: list[str]) -> Tensor:
        """Normalised embeddings [I, D] of prompts, cut at the model's length."""
        tokens = self.tokenizer(prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        names = ("input_ids",) if self.siglip else ("input_ids", "attention_mask")
        given = {name: tokens[name].to(self.source.device) for name in names}
        return F.normalize(_tensor(self.model.get_text_features(**given)), dim=-1)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine of image and prompt, [I]."""
        return (self.image_embeds(images) * self.text_embeds(prompts)).sum(-1)


def _tensor(found: Any) -> Tensor:
    """transformers 5 gives an object with a pooled output where 4 gave the tensor."""
    return found if isinstance(found, Tensor) else found.pooler_output


class ClipScore(_Clip):
    """CLIP score (Hessel et al. 2021): cosine in -1..1, about .2 to .45 for images of a model. Any CLIP or SigLIP, at its own size.

    The G2RPO paper takes DFN5B-CLIP-ViT-H-14-378 (Apple's research licence); the default is OpenAI's ViT-L/14 (MIT).
    """

    default = "openai/clip-vit-large-patch14"


class PickScore(_Clip):
    """PickScore v1 (Kirstain et al. 2023, MIT): cosine of a CLIP-H tuned on Pick-a-Pic, about .2; 22 where printed times 100."""

    default = "yuvalkirstain/PickScore_v1"


class HPS(_Clip):
    """HPS-v2 and v2.1 (Wu et al. 2023, Apache-2.0): cosine of a CLIP-H tuned on HPDv2, about .25 to .4; black bars, not a crop.

    Give the checkpoint file behind the config's name: laion/CLIP-ViT-H-14-laion2B-s32B-b79K#HPS_v2.1_compressed.pt.
    """

    default = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    mode = "pad"

    def _build(self, name: str, checkpoint: Path | None) -> nn.Module:
        if checkpoint is None:
            raise ValueError(f"reward_models: hps needs its checkpoint: hps={name}#HPS_v2.1_compressed.pt")
        return super()._build(name, checkpoint)


class Aesthetic(_Clip):
    """LAION's aesthetic predictor v2 (Schuhmann 2022, MIT): a head of five linear layers on CLIP-L/14 embeddings, about 1 to 10.

    Give the head's file behind the name of the CLIP: openai/clip-vit-large-patch14#sac+logos+ava1-l14-linearMSE.safetensors. The
    prompt does not count.
    """

    default = "openai/clip-vit-large-patch14"

    def _build(self, name: str, checkpoint: Path | None) -> nn.Module:
        if checkpoint is None:
            raise ValueError("reward_models: aesthetic needs its head's file: aesthetic=CLIP#HEAD.safetensors")
        state = read_checkpoint(checkpoint, self.source.allow_pickle)
        layers: list[nn.Module] = []
        for number in range(8):  # linear layers and, between some of them, dropout, which is off
            weight = state.get(f"layers.{number}.weight")
            layers.append(nn.Identity() if weight is None else nn.Linear(weight.shape[1], weight.shape[0]))
        self.head = nn.Sequential(*layers)
        self.head.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
        self.head = self.head.eval().requires_grad_(False).to(self.source.device)
        return AutoModel.from_pretrained(name)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score of each image, [I]."""
        return self.head(self.image_embeds(images)).squeeze(-1)
