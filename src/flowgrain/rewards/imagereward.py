"""ImageReward (Xu et al. 2023): a BLIP that reads image and prompt together, and a head that rates them.

Shapes: I images, H x W pixels, D width. Written on transformers' BLIP; the authors' checkpoint is read by a key map.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from flowgrain.rewards.base import RewardSource
from flowgrain.rewards.checkpoints import fill, linear_head, read_checkpoint
from flowgrain.rewards.clip import Preprocess

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output on the authors' data: scores are given in these deviations."""
LENGTH = 35
"""Tokens of a prompt, the rest is cut, as in the authors' `score`."""
_HEAD_WIDTH = 64  # of one attention head, in both towers and every size of BLIP

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


def from_image_reward(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under the names of `Rater`. Raises ValueError for a key it does not know.

    BLIP's projections, which are in the file, take no part in the score and are left out.
    """
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        block = re.fullmatch(r"blip\.visual_encoder\.blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        whole = re.fullmatch(r"blip\.visual_encoder\.(.+?)(\.weight|\.bias)?", key)
        if key.startswith(_UNUSED):
            continue
        if block and block[2] in _BLOCK:
            named[f"vision.encoder.layers.{block[1]}.{_BLOCK[block[2]]}.{block[3]}"] = value
        elif whole and whole[1] in _VISION:
            named[f"vision.{_VISION[whole[1]]}{whole[2] or ''}"] = value
        elif key.startswith("blip.text_encoder."):
            named["text." + key.removeprefix("blip.text_encoder.")] = value
        elif key.startswith("mlp.layers."):
            named["head." + key.removeprefix("mlp.layers.")] = value
        else:
            raise ValueError(f"reward_models: {key} is no key of ImageReward's checkpoint")
    return named


class Rater(nn.Module):
    """The network, of the sizes of `state` (as `from_image_reward` names it): pixels [I, 3, H, W], tokens -> outputs [I].

    Raises KeyError for a tensor that a size is read from and that is not there.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        patches = state["vision.embeddings.patch_embedding.weight"]  # (D, 3, patch, patch)
        across = math.isqrt(state["vision.embeddings.position_embedding"].shape[1] - 1)  # one more, the class token
        words = state["text.embeddings.word_embeddings.weight"]  # (vocabulary, D)
        vision = BlipVisionConfig(
            hidden_size=patches.shape[0],
            intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_count(state, "vision.encoder.layers"),
            num_attention_heads=patches.shape[0] // _HEAD_WIDTH,
            image_size=across * patches.shape[-1],
            patch_size=patches.shape[-1],
            layer_norm_eps=1e-6,  # timm's, not the 1e-5 of transformers
        )
        text = BlipTextConfig(
            vocab_size=words.shape[0],
            hidden_size=words.shape[1],
            encoder_hidden_size=patches.shape[0],
            intermediate_size=state["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_count(state, "text.encoder.layer"),
            num_attention_heads=words.shape[1] // _HEAD_WIDTH,
            max_position_embeddings=state["text.embeddings.position_embeddings.weight"].shape[0],
            layer_norm_eps=1e-12,
            is_decoder=True,  # gives cross attention; the mask stays that of an encoder, which the forward below is
        )
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        self.head = linear_head({key.removeprefix("head."): value for key, value in state.items() if key.startswith("head.")})
        self.size = across * patches.shape[-1]

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Outputs [I] before they are standardised, of pixels [I, 3, H, W], tokens [I, LENGTH] and their mask."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        return self.head(read[:, 0]).squeeze(-1)  # the class token's state


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers there are whose keys begin with `prefix`."""
    return len({key[len(prefix) + 1 :].partition(".")[0] for key in state if key.startswith(f"{prefix}.")})


class ImageReward:
    """ImageReward v1.0 (Xu et al. 2023, arXiv:2304.05977): preference in standard deviations, about -2.3 to 2, mean 0 on its data.

    Weights: THUDM/ImageReward's ImageReward.pt, Apache-2.0, on BLIP's ViT-L/16 (BSD-3-Clause). Input: 224 x 224, bicubic, a
    centre crop, CLIP's mean and deviation; 35 tokens of BERT.

    source.model is `TOKENIZER#ImageReward.pt`: BERT's tokenizer (folder or hub name, default google-bert/bert-base-uncased, which
    the authors take) and the checkpoint. All sizes are read off the checkpoint.
    """

    default = "google-bert/bert-base-uncased"

    def __init__(self, source: RewardSource) -> None:
        name, _, checkpoint = (source.model or "").partition("#")
        name = name or self.default
        if not checkpoint:
            raise ValueError(
                f"reward_models: imagereward={source.model} names no checkpoint; write imagereward={name}#ImageReward.pt"
            )
        self.device = source.device
        state = from_image_reward(read_checkpoint(Path(checkpoint), source.allow_pickle))
        try:
            self.model = Rater(state)
        except KeyError as error:
            raise ValueError(f"reward_models: {checkpoint} is no checkpoint of ImageReward: {error.args[0]} is missing") from error
        fill(self.model, state, Path(checkpoint), "ImageReward")
        self.model = self.model.eval().requires_grad_(False).to(source.device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"reward_models: the tokenizer {name} could not be loaded ({error}); give a folder or a hub name"
            ) from error
        # BLIP's two, beside BERT's: no prompt has them as a rule, but a prompt that does is read as the authors' code reads it
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        words = self.model.text.config.vocab_size
        if len(self.tokenizer) != words:
            raise ValueError(
                f"reward_models: the tokenizer {name} knows {len(self.tokenizer)} words with BLIP's two, {checkpoint} {words}; "
                f"write imagereward={self.default}#{checkpoint}"
            )
        self.preprocess = Preprocess(self.model.size, "torchvision")

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score of each image for its prompt, [I]."""
        text = self.tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").to(
            self.device
        )
        pixels = self.preprocess(images.float().to(self.device))
        return (self.model(pixels, text["input_ids"], text["attention_mask"]) - MEAN) / STD
