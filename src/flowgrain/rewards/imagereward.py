"""ImageReward (Xu et al. 2023): a BLIP model that reads image and prompt together, and a head.

Letters: I images, H x W pixels, D width of the model. The checkpoint of the authors is loaded into
the BLIP classes of transformers.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from flowgrain.data import Prompt
from flowgrain.rewards.checkpoints import linear_head, load_state, loading, read_checkpoint
from flowgrain.rewards.options import OptionError, check_device
from flowgrain.rewards.preprocess import Preprocess

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the model's output on the authors' data."""
MAX_TOKENS = 35
"""Tokens of a prompt. Longer prompts are truncated, as in the authors' `score`."""
_HEAD_WIDTH = 64  # of an attention head, in both towers and all sizes of BLIP

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
    """The authors' state dict, renamed for `ImageRewardModel`.

    The projections of BLIP do not affect the score and are left out.

    Raises:
        ValueError: a key does not belong to ImageReward.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        block = re.fullmatch(r"blip\.visual_encoder\.blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        vision = re.fullmatch(r"blip\.visual_encoder\.(.+?)(\.weight|\.bias)?", key)
        if key.startswith(_UNUSED):
            continue
        if block and block[2] in _BLOCK:
            renamed[f"vision.encoder.layers.{block[1]}.{_BLOCK[block[2]]}.{block[3]}"] = value
        elif vision and vision[1] in _VISION:
            renamed[f"vision.{_VISION[vision[1]]}{vision[2] or ''}"] = value
        elif key.startswith("blip.text_encoder."):
            renamed["text." + key.removeprefix("blip.text_encoder.")] = value
        elif key.startswith("mlp.layers."):
            renamed["head." + key.removeprefix("mlp.layers.")] = value
        else:
            raise ValueError(f"{key} is not a key of ImageReward's checkpoint")
    return renamed


class ImageRewardModel(nn.Module):
    """The network of ImageReward, with the sizes of `state`.

    Args:
        state: tensors by name, from `from_image_reward`.

    Raises:
        KeyError: a tensor that determines a size is missing.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        patches = state["vision.embeddings.patch_embedding.weight"]  # (D, 3, patch, patch)
        # one position per patch, and one for the class token
        across = math.isqrt(state["vision.embeddings.position_embedding"].shape[1] - 1)
        self.size = across * patches.shape[-1]
        self.vision = BlipVisionModel(_vision_config(state, self.size))
        self.text = BlipTextModel(_text_config(state), add_pooling_layer=False)
        head = {key: value for key, value in state.items() if key.startswith("head.")}
        self.head = linear_head({key.removeprefix("head."): value for key, value in head.items()})

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Outputs [I], not yet standardized.

        Args:
            pixels: normalized images [I, 3, H, W].
            tokens: token ids [I, MAX_TOKENS].
            mask: attention mask [I, MAX_TOKENS].
        """
        image = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(
                image.shape[:2], dtype=torch.long, device=image.device
            ),
        ).last_hidden_state
        outputs: Tensor = self.head(text[:, 0]).squeeze(-1)  # state of the class token
        return outputs


def _vision_config(state: Mapping[str, Tensor], size: int) -> BlipVisionConfig:
    patches = state["vision.embeddings.patch_embedding.weight"]  # (D, 3, patch, patch)
    return BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count_layers(state, "vision.encoder.layers"),
        num_attention_heads=patches.shape[0] // _HEAD_WIDTH,
        image_size=size,
        patch_size=patches.shape[-1],
        layer_norm_eps=1e-6,  # as in timm; the default of transformers is 1e-5
    )


def _text_config(state: Mapping[str, Tensor]) -> BlipTextConfig:
    words = state["text.embeddings.word_embeddings.weight"]  # (vocabulary, D)
    return BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=state["vision.embeddings.patch_embedding.weight"].shape[0],
        intermediate_size=state["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_count_layers(state, "text.encoder.layer"),
        num_attention_heads=words.shape[1] // _HEAD_WIDTH,
        max_position_embeddings=state["text.embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        is_decoder=True,  # adds cross attention; `forward` still uses the mask of an encoder
    )


def _count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    keys = (key for key in state if key.startswith(f"{prefix}."))
    return len({key[len(prefix) + 1 :].partition(".")[0] for key in keys})


class ImageReward:
    """ImageReward v1.0 (Xu et al. 2023, arXiv:2304.05977): a model of human preference.

    Scores are in standard deviations on the authors' data, about -2.3 to 2, with mean 0. License:
    Apache-2.0, based on BLIP ViT-L/16 (BSD-3-Clause). Input: 224 x 224 pixels, bicubic, center
    crop, and 35 BERT tokens.

    The published checkpoint is a pickle file and needs `allow_pickle=True`.

    Args:
        checkpoint: path of a file, or ORG/REPO/FILE on the Hugging Face Hub, with the authors'
            names. All sizes are read from it.
        path: directory or Hugging Face repository of the BERT tokenizer.
        device: "cpu", "cuda" or "cuda:INDEX".
        allow_pickle: read the tensors of a checkpoint that is not a .safetensors file.
    """

    differentiable = True

    def __init__(
        self,
        checkpoint: str = "THUDM/ImageReward/ImageReward.pt",
        path: str = "google-bert/bert-base-uncased",
        device: str = "cpu",
        allow_pickle: bool = False,
    ) -> None:
        self.device = check_device(device)
        model = load_model(checkpoint, allow_pickle)
        self.model = model.eval().requires_grad_(False).to(device)
        with loading(path):
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        # BLIP adds two special tokens to BERT. They only matter for prompts that contain them.
        self.tokenizer.add_special_tokens(
            {"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]}
        )
        words = model.text.config.vocab_size
        if len(self.tokenizer) != words:
            raise OptionError(
                f"path={path}: the tokenizer has {len(self.tokenizer)} tokens, "
                f"including two of BLIP, but {checkpoint} has {words}. "
                "Use the tokenizer of the checkpoint."
            )
        self.preprocess = Preprocess(model.size, "torchvision")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [I] of images [I, 3, H, W] in 0..1."""
        text = self.tokenizer(
            [prompt.text for prompt in prompts],
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        pixels = self.preprocess(images.float().to(self.device))
        outputs: Tensor = self.model(pixels, text["input_ids"], text["attention_mask"])
        return (outputs - MEAN) / STD


def load_model(checkpoint: str, allow_pickle: bool) -> ImageRewardModel:
    """The network of ImageReward with the parameters of a checkpoint.

    Raises:
        OptionError: the checkpoint cannot be read, or is not a checkpoint of ImageReward.
    """
    state = read_checkpoint(checkpoint, allow_pickle)
    try:
        state = from_image_reward(state)
        model = ImageRewardModel(state)
    except ValueError as error:
        raise OptionError(f"checkpoint={checkpoint}: {error}.") from error
    except KeyError as error:
        raise OptionError(
            f"checkpoint={checkpoint}: not a checkpoint of ImageReward: {error.args[0]} is missing."
        ) from error
    load_state(model, state, checkpoint, "ImageReward")
    return model
