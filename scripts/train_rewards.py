"""Train the two learned rewards of the shapes world on renderings with faults.

python scripts/train_rewards.py towers|preference [--steps 2500] [--out FOLDER]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor, nn

from flowgrain.data import as_prompts
from flowgrain.rewards.shapes import (
    WEIGHTS,
    Preference,
    PreferenceModel,
    Towers,
    build_towers,
    tower_tokens,
)
from flowgrain.shapes.grammar import (
    COLORS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    Scene,
    parse,
    prompts,
    tokenize,
)
from flowgrain.shapes.oracle import judge
from flowgrain.shapes.render import render

OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
WORD_FAMILIES = (COLORS, SHAPES, tuple(s + "s" for s in SHAPES), NUMBERS[1:], RELATIONS)


def corrupt(scene: Scene, rng: np.random.Generator, count: int) -> Scene:
    """`scene` with `count` faults: another color, shape, number of objects or relation."""
    objects, relation = list(scene.objects), scene.relation
    for _ in range(count):
        fault = rng.integers(5 if relation else 4)
        i = int(rng.integers(len(objects))) if objects else 0
        if fault == 3 or not objects:
            if len(objects) < 5 and relation is None:
                objects.append((int(rng.integers(len(COLORS))), int(rng.integers(len(SHAPES)))))
        elif fault == 0:
            color = (objects[i][0] + int(rng.integers(1, len(COLORS)))) % len(COLORS)
            objects[i] = (color, objects[i][1])
        elif fault == 1:
            shape = (objects[i][1] + int(rng.integers(1, len(SHAPES)))) % len(SHAPES)
            objects[i] = (objects[i][0], shape)
        elif fault == 2:
            objects.pop(i)
            relation = None
        elif relation is not None:
            relation = OPPOSITE[relation]
    return Scene(tuple(objects), relation)


def corrupt_prompt(prompt: str, rng: np.random.Generator) -> str:
    """A prompt that differs from `prompt` in one word."""
    words = prompt.split()
    while True:
        i = int(rng.integers(len(words)))
        word = words[i]
        for family in WORD_FAMILIES:
            if word in family:
                other = [*words]
                other[i] = str(rng.choice([w for w in family if w != word and " " not in w]))
                try:
                    parse(" ".join(other))
                except ValueError:
                    continue
                return " ".join(other)
        if word in ("left", "right"):
            return prompt.replace(word, "right" if word == "left" else "left")


class Renderings:
    """Images of scenes as the backbone decodes them: from the autoencoder, with noisy latents.

    Args:
        folder: directory with the autoencoder.
    """

    def __init__(self, folder: Path) -> None:
        vae = AutoencoderTiny.from_pretrained(folder / "vae")
        self.vae = vae.eval().requires_grad_(False)

    def __call__(self, scenes: list[Scene], rng: np.random.Generator) -> Tensor:
        images = torch.from_numpy(render(scenes, rng))
        levels = rng.choice([0.0, 0.1, 0.25, 0.45], size=len(scenes)).astype(np.float32)
        z = self.vae.encode(images * 2 - 1).latents
        z = z + torch.from_numpy(levels)[:, None, None, None] * torch.randn_like(z)
        return (self.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)


def random_prompts(rng: np.random.Generator, count: int) -> list[str]:
    return [prompts("train")[i] for i in rng.integers(len(prompts("train")), size=count)]


class Training:
    """AdamW with a one-cycle schedule and clipped gradients."""

    def __init__(self, model: nn.Module, learning_rate: float, steps: int) -> None:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
        self.model, self.steps, self.begin = model, steps, time.time()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, learning_rate, steps, pct_start=0.1
        )

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()

    def is_due(self, step: int) -> bool:
        """Whether to evaluate and save after `step`."""
        return step % 250 == 0 or step == self.steps

    def print(self, step: int, loss: Tensor, accuracy: Tensor) -> None:
        seconds = time.time() - self.begin
        text = f"{step} loss {loss:.3f} held-out accuracy {accuracy:.3f} {seconds:.0f}s"
        print(text, flush=True)


def train_towers(steps: int, out: Path) -> None:
    """Train with InfoNCE, with two wrong prompts and one wrong image added to every pair."""
    rng, renderings, count = np.random.default_rng(0), Renderings(out), 48
    model = build_towers()
    training = Training(model, 1.5e-3, steps)
    target = torch.arange(count)
    for step in range(1, steps + 1):
        texts = random_prompts(rng, count)
        scenes = [parse(p) for p in texts]
        images = renderings([*scenes, *(corrupt(s, rng, 1) for s in scenes)], rng)
        wrong = [corrupt_prompt(p, rng) for p in texts for _ in range(2)]
        result = model(input_ids=tower_tokens([*texts, *wrong]), pixel_values=images * 2 - 1)
        scale = model.logit_scale.exp().clamp(max=50)
        image, text = result.image_embeds, result.text_embeds
        by_image = [image[:count] @ text[:count].T]
        by_image.append((image[:count, None] * text[count:].view(count, 2, -1)).sum(-1))
        loss = F.cross_entropy(scale * torch.cat(by_image, 1), target)
        by_text = [text[:count] @ image[:count].T]
        by_text.append((text[:count] * image[count:]).sum(-1, keepdim=True))
        loss = loss + F.cross_entropy(scale * torch.cat(by_text, 1), target)
        training.update(loss)
        if training.is_due(step):
            right, other = tower_similarities(model, renderings, rng)
            model.config.right_mean, model.config.wrong_mean = (
                right.mean().item(),
                other.mean().item(),
            )
            training.print(step, loss, (right > other).float().mean())
            model.save_pretrained(out / "towers")


@torch.no_grad()
def tower_similarities(
    model: nn.Module, renderings: Renderings, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Similarities [256] of held-out images to their prompts, and to prompts with a wrong word."""
    texts = list(prompts("held-out"))[:256]
    wrong = [corrupt_prompt(p, rng) for p in texts]
    images = renderings([parse(p) for p in texts], rng)
    result = model(input_ids=tower_tokens([*texts, *wrong]), pixel_values=images * 2 - 1)
    right = (result.image_embeds * result.text_embeds[:256]).sum(-1)
    other = (result.image_embeds * result.text_embeds[256:]).sum(-1)
    return right, other


def pairs(
    rng: np.random.Generator, renderings: Renderings, texts: list[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Two images of each prompt with 0 to 3 faults, and the difference of their oracle scores."""
    scenes = [[corrupt(parse(p), rng, int(rng.integers(4))) for p in texts] for _ in range(2)]
    a, b = (renderings(s, rng) for s in scenes)
    margin = judge(a.numpy(), texts)[0] - judge(b.numpy(), texts)[0]
    return a, b, torch.from_numpy(margin)


def train_preference(steps: int, out: Path) -> None:
    """Bradley-Terry loss -log sigmoid(better - worse), for pairs with different oracle scores."""
    rng, renderings = np.random.default_rng(1), Renderings(out)
    model = PreferenceModel()
    training = Training(model, 2e-3, steps)
    for step in range(1, steps + 1):
        texts = random_prompts(rng, 96)
        a, b, margin = pairs(rng, renderings, texts)
        tokens = torch.tensor([tokenize(p) for p in texts])
        difference = model(a, tokens) - model(b, tokens)
        different = margin.abs() > 0.02
        loss = F.softplus(-difference * margin.sign())[different].mean()
        training.update(loss)
        if training.is_due(step):
            with torch.no_grad():
                held_out = list(prompts("held-out"))[:512]
                a, b, margin = pairs(rng, renderings, held_out)
                tokens = torch.tensor([tokenize(p) for p in held_out])
                agree = (model(a, tokens) - model(b, tokens)) * margin > 0
            training.print(step, loss, agree[margin.abs() > 0.02].float().mean())
            save_file(model.state_dict(), out / "preference.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("which", choices=["towers", "preference"])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    {"towers": train_towers, "preference": train_preference}[args.which](args.steps, args.out)
    reward = {"towers": Towers, "preference": Preference}[args.which](args.out)
    texts = as_prompts(prompts("held-out")[:128])
    images = render([parse(p.text) for p in texts], np.random.default_rng(5))
    right, wrong = (
        reward(torch.from_numpy(images), order).mean().item()
        for order in (texts, texts[1:] + texts[:1])
    )
    print(f"mean reward of true renderings {right:.3f}, with the prompts of others {wrong:.3f}")


if __name__ == "__main__":
    main()
