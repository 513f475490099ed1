"""Rewards of the bundled world: the exact oracle, and two learned models that can be fooled."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from flowgrain.rewards.base import Explained
from flowgrain.shapes.grammar import MAX_WORDS, VOCABULARY, tokenize
from flowgrain.shapes.oracle import judge

WEIGHTS = Path(__file__).parent.parent / "shapes" / "weights"
_END = len(VOCABULARY)  # token that closes a prompt for the text tower


class Oracle:
    """Exact score in 0..1 by segmentation; see `flowgrain.shapes.oracle`."""

    mean_of_parts = False

    def __call__(self, images: Tensor, prompts: list[str]) -> NDArray[np.float32]:
        return judge(images.float().cpu().numpy(), prompts)[0]

    def explain(self, images: Tensor, prompts: list[str]) -> Explained:
        """The scores, and which images show each kind of failure."""
        scores, failures = judge(images.float().cpu().numpy(), prompts)
        return Explained(scores, {kind: torch.from_numpy(shown) for kind, shown in failures.items()})


def build_towers() -> CLIPModel:
    """Two small transformers, of the make of CLIP (Radford et al. 2021): 4x4 patches, embeddings of 64."""
    both = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "projection_dim": 64}
    text = {"vocab_size": _END + 1, "max_position_embeddings": MAX_WORDS + 1, "num_hidden_layers": 2, "eos_token_id": _END}
    vision = {"image_size": 32, "patch_size": 4, "num_hidden_layers": 3}
    return CLIPModel(CLIPConfig(text_config={**both, **text}, vision_config={**both, **vision}, projection_dim=64))


def tower_tokens(prompts: list[str]) -> Tensor:
    """Tokens [I, MAX_WORDS + 1] of prompts, each closed by the end token."""
    rows = []
    for prompt in prompts:
        words = [word for word in tokenize(prompt) if word]
        rows.append([*words, _END, *[0] * (MAX_WORDS - len(words))])
    return torch.tensor(rows)


class Towers:
    """Image-text similarity of a small two-tower model, scaled so that 0 is a wrong prompt's mean and 1 a right one's."""

    def __init__(self, folder: Path = WEIGHTS) -> None:
        self.model = CLIPModel.from_pretrained(folder / "towers").eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        device = self.model.device
        out = self.model(input_ids=tower_tokens(prompts).to(device), pixel_values=images.float().to(device) * 2 - 1)
        cosine = (out.image_embeds * out.text_embeds).sum(-1)
        low, high = self.model.config.wrong_mean, self.model.config.right_mean
        return (cosine - low) / (high - low)


class PreferenceModel(nn.Module):
    """A convolutional net that reads image and prompt together: images [B, 3, 32, 32], tokens [B, MAX_WORDS] -> score [B]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.word = nn.Embedding(len(VOCABULARY), 24)
        self.text = nn.Sequential(nn.Linear(24 * MAX_WORDS, 128), nn.SiLU(), nn.Linear(128, 4 * width))
        self.low = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1), nn.SiLU(), nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        )
        self.high = nn.Sequential(
            nn.SiLU(), nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.SiLU(), nn.Conv2d(2 * width, 2 * width, 4, 2, 1), nn.SiLU()
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(2 * width * 16, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        scale, shift = self.text(self.word(tokens).flatten(1))[:, :, None, None].chunk(2, 1)
        features = self.low(images * 2 - 1) * (1 + scale) + shift
        return self.head(self.high(features)).squeeze(1)


class Preference:
    """Bradley-Terry score of a small model trained on pairs of images of one prompt; unbounded; only differences mean something.

    True renderings score -13.9 on average, those of another prompt -18.8.
    """

    def __init__(self, folder: Path = WEIGHTS) -> None:
        self.model = PreferenceModel().eval().requires_grad_(False)
        self.model.load_state_dict(load_file(folder / "preference.safetensors"))

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        device = self.model.word.weight.device
        return self.model(images.float().to(device), torch.tensor([tokenize(p) for p in prompts], device=device))
