"""Rewards of the bundled shapes model: the exact oracle, and two learned models that can be hacked.

Letters: I images, B batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from flowgrain.data import Prompt
from flowgrain.rewards.base import Explanation
from flowgrain.shapes.grammar import MAX_WORDS, VOCABULARY, tokenize
from flowgrain.shapes.oracle import judge

WEIGHTS = Path(__file__).parent.parent / "shapes" / "weights"
_END = len(VOCABULARY)  # token at the end of a prompt for the text tower


class Oracle:
    """The exact score of the shapes world in 0..1, by segmentation of the image.

    See `flowgrain.shapes.oracle`.
    """

    mean_of_parts = False

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        """Scores [I] of images [I, 3, H, W] in 0..1."""
        return judge(images.float().cpu().numpy(), [prompt.text for prompt in prompts])[0]

    def explain(self, images: Tensor, prompts: Sequence[Prompt]) -> Explanation:
        """The scores. By kind of failure: 1 for images that show it, otherwise 0."""
        texts = [prompt.text for prompt in prompts]
        scores, failures = judge(images.float().cpu().numpy(), texts)
        return Explanation(scores, {kind: torch.from_numpy(failures[kind]) for kind in failures})


def build_towers() -> CLIPModel:
    """A small CLIP model (Radford et al. 2021) with random weights.

    It reads images of 32 x 32 pixels as 4 x 4 patches. Its embeddings have 64 dimensions.
    """
    shared = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "projection_dim": 64,
    }
    text = {
        "vocab_size": _END + 1,
        "max_position_embeddings": MAX_WORDS + 1,
        "num_hidden_layers": 2,
        "eos_token_id": _END,
    }
    vision = {"image_size": 32, "patch_size": 4, "num_hidden_layers": 3}
    config = CLIPConfig(
        text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=64
    )
    return CLIPModel(config)


def tower_tokens(texts: Sequence[str]) -> Tensor:
    """Token ids [I, MAX_WORDS + 1] of prompts, each with the end token."""
    rows = []
    for text in texts:
        words = [word for word in tokenize(text) if word]
        rows.append([*words, _END, *[0] * (MAX_WORDS - len(words))])
    return torch.tensor(rows)


class Towers:
    """Similarity of image and prompt in a small CLIP model, trained on shapes.

    The scale is linear: 0 is the mean of wrong prompts, 1 the mean of right prompts.

    Args:
        folder: directory with the trained models.
    """

    differentiable = True

    def __init__(self, folder: Path = WEIGHTS, /) -> None:
        model = CLIPModel.from_pretrained(folder / "towers")
        self.model: Any = model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [I] of images [I, 3, 32, 32] in 0..1."""
        device = self.model.device
        tokens = tower_tokens([prompt.text for prompt in prompts]).to(device)
        out = self.model(input_ids=tokens, pixel_values=images.float().to(device) * 2 - 1)
        cosine = (out.image_embeds * out.text_embeds).sum(-1)
        low, high = self.model.config.wrong_mean, self.model.config.right_mean
        scores: Tensor = (cosine - low) / (high - low)
        return scores


class PreferenceModel(nn.Module):
    """A convolutional network that reads image and prompt together.

    Args:
        width: channels of the first layer.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.word = nn.Embedding(len(VOCABULARY), 24)
        self.text = nn.Sequential(
            nn.Linear(24 * MAX_WORDS, 128), nn.SiLU(), nn.Linear(128, 4 * width)
        )
        self.low = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        )
        self.high = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 4, 2, 1),
            nn.SiLU(),
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(2 * width * 16, 64), nn.SiLU(), nn.Linear(64, 1)
        )

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Scores [B] of images [B, 3, 32, 32] in 0..1 and token ids [B, MAX_WORDS]."""
        text = self.text(self.word(tokens).flatten(1))
        scale, shift = text[:, :, None, None].chunk(2, 1)
        features = self.low(images * 2 - 1) * (1 + scale) + shift
        scores: Tensor = self.head(self.high(features)).squeeze(1)
        return scores


class Preference:
    """Bradley-Terry score of a small model, trained on pairs of images of the same prompt.

    The score is unbounded, and only differences have a meaning. Correct renderings have a mean of
    -13.9. Renderings of other prompts have a mean of -18.8.

    Args:
        folder: directory with the trained models.
    """

    differentiable = True

    def __init__(self, folder: Path = WEIGHTS, /) -> None:
        self.model = PreferenceModel().eval().requires_grad_(False)
        self.model.load_state_dict(load_file(folder / "preference.safetensors"))

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [I] of images [I, 3, 32, 32] in 0..1."""
        device = self.model.word.weight.device
        tokens = torch.tensor([tokenize(prompt.text) for prompt in prompts], device=device)
        scores: Tensor = self.model(images.float().to(device), tokens)
        return scores
