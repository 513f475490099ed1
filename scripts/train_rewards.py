"""Trains the two learned rewards of the shapes world, on renderings and their corruptions. Good, and not perfect.

python scripts/train_rewards.py towers|preference [--steps 2500] [--out src/flowgrain/shapes/weights]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from flowgrain.rewards.shapes import WEIGHTS, Preference, PreferenceModel, Towers, build_towers, tower_tokens
from flowgrain.shapes.grammar import COLOURS, NUMBERS, RELATIONS, SHAPES, Scene, parse, prompts, tokenize
from flowgrain.shapes.oracle import judge
from flowgrain.shapes.render import render

OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def corrupt(scene: Scene, rng: np.random.Generator, times: int) -> Scene:
    """`scene` with `times` faults: a colour or a shape changed, an object lost or added, a relation turned round."""
    objects, relation = list(scene.objects), scene.relation
    for _ in range(times):
        fault = rng.integers(5 if relation else 4)
        place = int(rng.integers(len(objects))) if objects else 0
        if fault == 3 or not objects:
            if len(objects) < 5 and relation is None:
                objects.append((int(rng.integers(len(COLOURS))), int(rng.integers(len(SHAPES)))))
        elif fault == 0:
            objects[place] = ((objects[place][0] + int(rng.integers(1, len(COLOURS)))) % len(COLOURS), objects[place][1])
        elif fault == 1:
            objects[place] = (objects[place][0], (objects[place][1] + int(rng.integers(1, len(SHAPES)))) % len(SHAPES))
        elif fault == 2:
            objects.pop(place)
            relation = None
        elif relation is not None:
            relation = OPPOSITE[relation]
    return Scene(tuple(objects), relation)


def corrupt_prompt(prompt: str, rng: np.random.Generator) -> str:
    """A prompt that differs from `prompt` in one word, or in the order of its two things."""
    words = prompt.split()
    while True:
        i = int(rng.integers(len(words)))
        word = words[i]
        for family in (COLOURS, SHAPES, tuple(s + "s" for s in SHAPES), NUMBERS[1:], RELATIONS):
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


class Pictures:
    """Renderings as a decoder would show them: through the autoencoder, with some noise in the latent."""

    def __init__(self, folder: Path) -> None:
        self.vae = AutoencoderTiny.from_pretrained(folder / "vae").eval().requires_grad_(False)

    def __call__(self, scenes: list[Scene], rng: np.random.Generator) -> torch.Tensor:
        images = torch.from_numpy(render(scenes, rng))
        strength = torch.from_numpy(rng.choice([0.0, 0.1, 0.25, 0.45], size=len(scenes)).astype(np.float32))
        z = self.vae.encode(images * 2 - 1).latents
        z = z + strength[:, None, None, None] * torch.randn_like(z)
        return (self.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)


def draw(rng: np.random.Generator, n: int) -> list[str]:
    return [prompts("train")[i] for i in rng.integers(len(prompts("train")), size=n)]


def train_towers(steps: int, out: Path) -> None:
    """Contrastive (InfoNCE) with two corrupted prompts and one corrupted image for every pair."""
    rng, pictures, n = np.random.default_rng(0), Pictures(out), 48
    model = build_towers()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps, pct_start=0.1)
    begin = time.time()
    for step in range(1, steps + 1):
        texts = draw(rng, n)
        scenes = [parse(p) for p in texts]
        images = pictures([*scenes, *(corrupt(s, rng, 1) for s in scenes)], rng)
        wrong = [corrupt_prompt(p, rng) for p in texts for _ in range(2)]
        result = model(input_ids=tower_tokens([*texts, *wrong]), pixel_values=images * 2 - 1)
        scale = model.logit_scale.exp().clamp(max=50)
        image, text = result.image_embeds, result.text_embeds
        by_image = scale * torch.cat([image[:n] @ text[:n].T, (image[:n, None] * text[n:].view(n, 2, -1)).sum(-1)], 1)
        by_text = scale * torch.cat([text[:n] @ image[:n].T, (text[:n] * image[n:]).sum(-1, keepdim=True)], 1)
        target = torch.arange(n)
        loss = F.cross_entropy(by_image, target) + F.cross_entropy(by_text, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            with torch.no_grad():
                held = list(prompts("held-out"))[:256]
                wrong = [corrupt_prompt(p, rng) for p in held]
                result = model(
                    input_ids=tower_tokens([*held, *wrong]), pixel_values=pictures([parse(p) for p in held], rng) * 2 - 1
                )
                right = (result.image_embeds * result.text_embeds[:256]).sum(-1)
                other = (result.image_embeds * result.text_embeds[256:]).sum(-1)
            model.config.right_mean, model.config.wrong_mean = right.mean().item(), other.mean().item()
            accuracy = (right > other).float().mean()
            print(f"{step} loss {loss.item():.3f} held-out accuracy {accuracy:.3f} {time.time() - begin:.0f}s", flush=True)
            model.save_pretrained(out / "towers")


def pairs(rng: np.random.Generator, pictures: Pictures, chosen: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two images of each prompt with 0 to 3 faults each, and their oracle scores."""
    scenes = [[corrupt(parse(p), rng, int(rng.integers(4))) for p in chosen] for _ in range(2)]
    a, b = (pictures(s, rng) for s in scenes)
    return a, b, torch.from_numpy(judge(a.numpy(), chosen)[0] - judge(b.numpy(), chosen)[0])


def train_preference(steps: int, out: Path) -> None:
    """Bradley-Terry: -log sigmoid(score of the better - score of the worse), over pairs that the oracle tells apart."""
    rng, pictures = np.random.default_rng(1), Pictures(out)
    model = PreferenceModel()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    begin = time.time()
    for step in range(1, steps + 1):
        chosen = draw(rng, 96)
        a, b, margin = pairs(rng, pictures, chosen)
        tokens = torch.tensor([tokenize(p) for p in chosen])
        difference = model(a, tokens) - model(b, tokens)
        told = margin.abs() > 0.02
        loss = F.softplus(-difference * margin.sign())[told].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            with torch.no_grad():
                held = list(prompts("held-out"))[:512]
                a, b, margin = pairs(rng, pictures, held)
                tokens = torch.tensor([tokenize(p) for p in held])
                right = ((model(a, tokens) - model(b, tokens)) * margin > 0)[margin.abs() > 0.02].float().mean()
            print(f"{step} loss {loss.item():.3f} held-out accuracy {right:.3f} {time.time() - begin:.0f}s", flush=True)
            save_file(model.state_dict(), out / "preference.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["towers", "preference"])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    {"towers": train_towers, "preference": train_preference}[args.which](args.steps, args.out)
    reward = {"towers": Towers, "preference": Preference}[args.which](args.out)
    held = list(prompts("held-out"))[:128]
    images = torch.from_numpy(render([parse(p) for p in held], np.random.default_rng(5)))
    print("true renderings:", reward(images, held).mean().item(), "shuffled:", reward(images, held[1:] + held[:1]).mean().item())


if __name__ == "__main__":
    main()
