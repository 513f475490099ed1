"""Rewards of CLIP's make: CLIP score, PickScore, HPS-v2 and v2.1, and the aesthetic score of a linear head.

Shapes: I images, H x W pixels, D embedding. Written on transformers' classes; open_clip's checkpoints are read by a key map.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedModel
from transformers.models.auto.image_processing_auto import get_image_processor_config

from flowgrain.rewards.base import RewardSource
from flowgrain.rewards.checkpoints import fill, linear_head, read_checkpoint

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
"""SigLIP's mean and its standard deviation."""

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


Mode = Literal["crop", "torchvision", "squash", "pad"]

# Where the image lies when what is left over is odd: half a pixel down (transformers), to the even one (torchvision), or for bars
# up (the bar before is then the narrower one).
_HALF: dict[str, Callable[[float], int]] = {"crop": math.floor, "torchvision": round, "squash": math.floor, "pad": math.ceil}


def fit(images: Tensor, size: int, mode: Mode, edge: int | None = None, resample: str = "bicubic") -> Tensor:
    """Images [I, 3, H, W] in 0..1 as [I, 3, size, size], resized with antialiasing, as Pillow does.

    "crop": the shorter side becomes `edge` (size, if it is not given), then the centre is cut out; "torchvision": the same, by its
    rounding; "squash": both sides become `edge`, whatever the shape was; "pad": the longer side does, and the rest is black (HPS).
    """
    h, w = images.shape[-2:]
    edge = edge or size
    if mode == "squash":
        shape = edge, edge
    elif mode == "pad":
        shape = max(round(h * (edge / max(h, w))), 1), max(round(w * (edge / max(h, w))), 1)
    else:
        shape = int(edge * h / min(h, w)), int(edge * w / min(h, w))
    for part in ((h, shape[1]), shape):  # Pillow's two passes; bytes cannot overshoot, not even between
        if part != images.shape[-2:]:
            images = F.interpolate(images, part, mode=resample, antialias=True, align_corners=False)
            images = images if mode == "pad" else images.clamp(0, 1)  # HPS's authors resize floats, which can
    top, left = (_HALF[mode]((side - size) / 2) for side in shape)
    return F.pad(images, (-left, size - shape[1] + left, -top, size - shape[0] + top))  # of negative width: cut off


@dataclass(frozen=True)
class Preprocess:
    """What a model is given: squares of `size`, fitted by `mode` (see `fit`), less `mean`, over `std`."""

    size: int
    mode: Mode = "crop"
    edge: int | None = None
    resample: str = "bicubic"
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD

    def __call__(self, images: Tensor) -> Tensor:
        """Pixels [I, 3, size, size] of images [I, 3, H, W] in 0..1."""
        mean, std = (torch.tensor(v, device=images.device).reshape(1, 3, 1, 1) for v in (self.mean, self.std))
        return (fit(images, self.size, self.mode, self.edge, self.resample) - mean) / std


_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read_preprocess(config: Mapping[str, Any], size: int, siglip: bool) -> Preprocess:
    """What a model's preprocessor config says and, where it is silent, what the processors of CLIP or SigLIP do.

    config: the entries of transformers' preprocessor_config.json, {} if a model has none; size: the side of the model's input.
    Raises ValueError naming the entry that cannot be followed.
    """
    said: dict[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "crop_size": size}
    if siglip:
        said |= {"do_center_crop": False, "size": {"height": size, "width": size}, "image_mean": HALF, "image_std": HALF}
    else:
        said |= {"do_center_crop": True, "size": {"shortest_edge": size}, "image_mean": OPENAI_MEAN, "image_std": OPENAI_STD}
    said |= {entry: value for entry, value in config.items() if value is not None}
    crop, wanted, cut = said["do_center_crop"], said["size"], said["crop_size"]
    if isinstance(wanted, int):  # configs of before transformers 4.25
        wanted = {"shortest_edge": wanted} if crop else {"height": wanted, "width": wanted}
    squash = set(wanted) == {"height", "width"} and wanted["height"] == wanted["width"]
    edge = wanted["height"] if squash else wanted.get("shortest_edge")
    wrong = {
        "do_resize": not said["do_resize"],
        "do_rescale": not said["do_rescale"],
        "resample": said["resample"] not in _FILTERS,
        "size": (not squash and set(wanted) != {"shortest_edge"}) or (not crop and (not squash or edge != size)),
        "crop_size": crop and cut not in (size, {"height": size, "width": size}),
    }
    for entry in wrong:
        if wrong[entry]:
            raise ValueError(f"preprocessor_config.json: {entry}={said[entry]} cannot be followed: {_CAN[entry].format(size=size)}")
    mean, std = (said["image_mean"], said["image_std"]) if said["do_normalize"] else ((0.0,) * 3, (1.0,) * 3)
    return Preprocess(size, "squash" if squash else "crop", edge, _FILTERS[said["resample"]], tuple(mean), tuple(std))


_CAN = {
    "do_resize": "the model reads images of {size} x {size} alone",
    "do_rescale": "images are in 0..1 here",
    "resample": "2, bilinear, and 3, bicubic, can be",
    "size": "the model reads {size} x {size}; height and width that are the same lead there, or shortest_edge and do_center_crop",
    "crop_size": "the model reads {size} x {size}",
}


class _Clip:
    """A CLIP or SigLIP of transformers, or an open_clip checkpoint beside the config of one."""

    default: str
    mode: Mode | None = None
    """How images are fitted; None: as the model's own preprocessor config says."""

    def __init__(self, source: RewardSource) -> None:
        self.source = source
        name, _, checkpoint = (source.model or self.default).partition("#")
        try:
            self.model: Any = self._build(name, Path(checkpoint) if checkpoint else None)
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except OSError as error:
            raise ValueError(f"reward_models: {name} could not be loaded ({error}); give a folder or a hub name") from error
        except ImportError as error:  # SigLIP's tokenizer
            raise ValueError(f"reward_models: {name} needs a package more ({error}); pip install 'flowgrain[siglip]'") from error
        self.model = self.model.eval().requires_grad_(False).to(source.device)
        self.length = self.model.config.text_config.max_position_embeddings
        self.siglip = self.model.config.model_type.startswith("siglip")
        self.preprocess = self._preprocess(name, self.model.config.vision_config.image_size)

    def _preprocess(self, name: str, size: int) -> Preprocess:
        if self.mode is not None:
            return Preprocess(size, self.mode)
        try:
            return read_preprocess(get_image_processor_config(name), size, self.siglip)
        except ValueError as error:
            raise ValueError(f"reward_models: {name}: {error}") from error

    def _build(self, name: str, checkpoint: Path | None) -> PreTrainedModel:
        if checkpoint is None:
            return AutoModel.from_pretrained(name)
        config = AutoConfig.from_pretrained(name)
        if not isinstance(config, CLIPConfig):
            raise ValueError(f"reward_models: {name} is no CLIP, and {checkpoint} can only be read as one")
        state = read_checkpoint(checkpoint, self.source.allow_pickle)
        if any("resblocks" in key for key in state):
            state = from_open_clip(state)
        model = CLIPModel(config)
        fill(model, state, checkpoint, name)
        return model

    def image_embeds(self, images: Tensor) -> Tensor:
        """Normalised embeddings [I, D] of images [I, 3, H, W] in 0..1."""
        pixels = self.preprocess(images.float().to(self.source.device))
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
    """CLIP score (Hessel et al. 2021, arXiv:2104.08718): cosine in -1..1 of any CLIP or SigLIP, about .2 to .45 for good images.

    Weights: the default is OpenAI's ViT-L/14 (Radford et al. 2021, arXiv:2103.00020; MIT). The G2RPO paper takes
    DFN5B-CLIP-ViT-H-14-378 (Fang et al. 2023, arXiv:2309.17425; Apple's own licence, see its card); SigLIP (Zhai et al. 2023,
    arXiv:2303.15343; Apache-2.0) needs the extra `siglip`. Input: the model's size (224, 378, ...), fitted as its own
    preprocessor_config.json says; without one, bicubic and a centre crop for CLIP, both sides resized for SigLIP.
    """

    default = "openai/clip-vit-large-patch14"


class PickScore(_Clip):
    """PickScore v1 (Kirstain et al. 2023, arXiv:2305.01569): cosine in -1..1 of a CLIP-H tuned on Pick-a-Pic, about .2.

    It is printed times 100 elsewhere, about 22. Weights: MIT, as its code. Input: 224 x 224, bicubic and a centre crop.
    """

    default = "yuvalkirstain/PickScore_v1"


class HPS(_Clip):
    """HPS-v2 and v2.1 (Wu et al. 2023, arXiv:2306.09341): cosine in -1..1 of a CLIP-H tuned on HPDv2, about .25 to .4.

    Weights: Apache-2.0. Input: 224 x 224, the longer side resized (bicubic), the rest black bars, not a crop.

    Give the checkpoint file behind the config's name: laion/CLIP-ViT-H-14-laion2B-s32B-b79K#HPS_v2.1_compressed.pt.
    """

    default = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    mode: Mode | None = "pad"

    def _build(self, name: str, checkpoint: Path | None) -> PreTrainedModel:
        if checkpoint is None:
            raise ValueError(f"reward_models: hps needs its checkpoint: hps={name}#HPS_v2.1_compressed.pt")
        return super()._build(name, checkpoint)


class Aesthetic(_Clip):
    """LAION's aesthetic predictor v2 (Schuhmann et al. 2022, arXiv:2210.08402): five linear layers on CLIP-L/14, about 1 to 10.

    Weights: the head Apache-2.0, the CLIP MIT. Input: 224 x 224, bicubic and a centre crop.

    Give the head's file behind the name of the CLIP: openai/clip-vit-large-patch14#sac+logos+ava1-l14-linearMSE.safetensors. The
    prompt does not count.
    """

    default = "openai/clip-vit-large-patch14"
    mode: Mode | None = "torchvision"  # CLIP's own package, which LAION's code calls

    def _build(self, name: str, checkpoint: Path | None) -> PreTrainedModel:
        if checkpoint is None:
            raise ValueError("reward_models: aesthetic needs its head's file: aesthetic=CLIP#HEAD.safetensors")
        state = read_checkpoint(checkpoint, self.source.allow_pickle)
        state = {key.removeprefix("layers."): value for key, value in state.items()}
        try:
            self.head = linear_head(state)
        except (KeyError, ValueError) as error:
            raise ValueError(f"reward_models: {checkpoint} is no head of linear layers (layers.0.weight and so on)") from error
        fill(self.head, state, checkpoint, "the aesthetic head")
        self.head = self.head.eval().requires_grad_(False).to(self.source.device)
        return AutoModel.from_pretrained(name)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score of each image, [I]."""
        return self.head(self.image_embeds(images)).squeeze(-1)
