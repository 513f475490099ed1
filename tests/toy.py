"""A backbone small enough to check single trajectories: latents of 6 numbers, 4-pixel images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowgrain.data import Prompt
from flowgrain.models import Conditioning, Dtypes, ModelConfig, NoLora, Shift
from flowgrain.rewards import differentiable

PROMPTS = ["zero", "one", "two", "three"]


class ToyNet(nn.Module):
    """v = W2 tanh(W1 [x, sigma, prompt])."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.w1 = nn.Parameter(0.5 * torch.randn(8, 16, generator=generator))
        self.w2 = nn.Parameter(0.5 * torch.randn(16, 6, generator=generator))

    def forward(self, x: Tensor, sigma: Tensor, number: Tensor) -> Tensor:
        into = torch.cat([x.flatten(1), sigma[:, None].to(x), number[:, None].to(x) / 4], 1)
        return (torch.tanh(into @ self.w1) @ self.w2).reshape(x.shape)

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        torch.save(self.state_dict(), folder / "weights.pt")


class Toy:
    """A `Backbone` without VAE, without LoRA and with four prompts."""

    vae = None
    latent_shape = (2, 3)
    lora_targets: list[str] = []
    lora_format = NoLora
    embedded_guidance = False

    def __init__(self) -> None:
        self.transformer = ToyNet()

    @classmethod
    def load(cls, model: ModelConfig, dtypes: Dtypes) -> "Toy":
        return cls()

    @property
    def blocks(self) -> list[nn.Module]:
        return []

    def load_lora(self, path: Path) -> None:
        self.lora_format.lora_state_dict(path)

    def natural_shift(self, num_steps: int) -> Shift:
        return Shift(3.0)

    def to(self, device: torch.device) -> None:
        self.transformer.to(device)

    def check(self, texts: Sequence[str]) -> None:
        for number, text in enumerate(texts, 1):
            if text not in PROMPTS:
                raise ValueError(f"prompt {number}: {text!r} is not in {PROMPTS}")

    def bundled_prompts(self, split: str) -> list[str]:
        return PROMPTS

    def encode(self, texts: Sequence[str]) -> Conditioning:
        return {"number": torch.tensor([PROMPTS.index(text) if text else 0 for text in texts])}

    def velocity(self, transformer: nn.Module, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        v: Tensor = transformer(x, sigma, cond["number"])
        return v

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(latents).mean(1)[:, :, None, None].expand(-1, 3, 2, 2)


@differentiable
def red(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward that is not linear in the latent and depends on the prompt."""
    color = images[:, :, 0, 0]
    number = torch.tensor([PROMPTS.index(prompt.text) for prompt in prompts])
    return color[:, 0] - color[:, 1] ** 2 + 0.3 * color[:, 2] * number


@differentiable
def green(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A second reward."""
    return (images[:, 1, 0, 0] - 0.4).abs()
