"""A backbone small enough to be checked a trajectory at a time: six numbers a latent, four pixels an image."""

import torch
from torch import nn

PROMPTS = ["zero", "one", "two", "three"]


class ToyNet(nn.Module):
    """v = W2 tanh(W1 [x, sigma, prompt])."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.w1 = nn.Parameter(0.5 * torch.randn(8, 16, generator=generator))
        self.w2 = nn.Parameter(0.5 * torch.randn(16, 6, generator=generator))

    def forward(self, x, sigma, number):
        into = torch.cat([x.flatten(1), sigma[:, None].to(x), number[:, None].to(x) / 4], 1)
        return (torch.tanh(into @ self.w1) @ self.w2).reshape(x.shape)

    def save_pretrained(self, folder):
        folder.mkdir(parents=True)
        torch.save(self.state_dict(), folder / "weights.pt")


class Toy:
    """See backbones.base.Backbone."""

    latent_shape = (2, 3)
    lora_targets: list[str] = []
    embedded_guidance = False

    def __init__(self) -> None:
        self.transformer = ToyNet()

    @property
    def blocks(self):
        return []

    def to(self, device):
        self.transformer.to(device)

    def check(self, prompts):
        for number, prompt in enumerate(prompts, 1):
            if prompt not in PROMPTS:
                raise ValueError(f"prompt {number}: {prompt!r} is none of {PROMPTS}")

    def bundled_prompts(self, split):
        return PROMPTS

    def encode(self, prompts):
        return {"number": torch.tensor([PROMPTS.index(p) if p else 0 for p in prompts])}

    def velocity(self, transformer, x, sigma, cond):
        return transformer(x, sigma, cond["number"])

    def decode(self, latents):
        return torch.sigmoid(latents).mean(1)[:, :, None, None].expand(-1, 3, 2, 2)


def red(images, prompts):
    """A reward that is not linear in the latent, and differs by prompt."""
    colour = images[:, :, 0, 0]
    return colour[:, 0] - colour[:, 1] ** 2 + 0.3 * colour[:, 2] * torch.tensor([PROMPTS.index(p) for p in prompts])


def green(images, prompts):
    """A second reward."""
    return (images[:, 1, 0, 0] - 0.4).abs()
