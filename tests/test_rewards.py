"""CLIP-like rewards on tiny models: against transformers' own features, open_clip's forward written out, and their failures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel
from twins import clip_tokenizer

from flowgrain import SettingsError
from flowgrain.rewards import RewardSource, load_reward
from flowgrain.rewards.clip import OPENAI_MEAN, OPENAI_STD, fit, from_open_clip
from flowgrain.settings import settings
from flowgrain.train import Run

PROMPTS = ["a red cat", "two dogs", "bird"]
HEADS, WIDTH, LAYERS, SIZE, PATCH = 2, 16, 2, 24, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP as a folder of transformers."""
    torch.manual_seed(0)
    both = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": "gelu",
    }
    text = {"vocab_size": 60, "max_position_embeddings": 20, "bos_token_id": 52, "eos_token_id": 53}
    vision = {"image_size": SIZE, "patch_size": PATCH}
    config = CLIPConfig(text_config={**both, **text}, vision_config={**both, **vision}, projection_dim=8)
    where = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(where)
    clip_tokenizer().save_pretrained(where)
    return where


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(1))


def test_clip_score_is_the_cosine(folder, images):
    found = load_reward("clip", RewardSource(str(folder)))(images, PROMPTS)
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = (fit(images, SIZE, "crop") - torch.tensor(OPENAI_MEAN)[:, None, None]) / torch.tensor(OPENAI_STD)[:, None, None]
    tokens = clip_tokenizer()(PROMPTS, padding="max_length", max_length=20, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    torch.testing.assert_close(found, (out.image_embeds * out.text_embeds).sum(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(40, 56), (20, 24), (24, 24), (100, 31)])
def test_images_are_fitted_as_pillow_does(size):
    """Bicubic with antialiasing, shortest side, centre crop: what the originals do by Pillow on bytes; 2.5 / 255 of rounding."""
    shape = (size[0], size[1], 3)
    smooth = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(smooth).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    assert np.array(picture).shape == shape
    scale = SIZE / min(size)
    there = picture.resize((round(size[1] * scale), round(size[0] * scale)), Image.Resampling.BICUBIC)
    left, top = (there.width - SIZE) // 2, (there.height - SIZE) // 2
    expected = np.array(there.crop((left, top, left + SIZE, top + SIZE))) / 255
    ours = fit(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255, SIZE, "crop")[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).max() <= 2.5 / 255


def test_hps_pads_with_black():
    found = fit(torch.ones(1, 3, 20, 40), SIZE, "pad")
    assert found.shape == (1, 3, SIZE, SIZE)
    assert (found[..., :6, :] == 0).all()
    assert (found[..., -6:, :] == 0).all()
    assert (found[..., 6:-6, :] > 0.99).all()


def open_clip_state(seed: int) -> dict[str, torch.Tensor]:
    """Random weights under open_clip's names."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return 0.3 * torch.randn(shape, generator=g)

    state = {
        "logit_scale": normal(), "text_projection": normal(WIDTH, 8), "visual.proj": normal(WIDTH, 8),
        "positional_embedding": normal(20, WIDTH), "token_embedding.weight": normal(60, WIDTH),
        "ln_final.weight": normal(WIDTH) + 1, "ln_final.bias": normal(WIDTH),
        "visual.class_embedding": normal(WIDTH), "visual.conv1.weight": normal(WIDTH, 3, PATCH, PATCH),
        "visual.positional_embedding": normal((SIZE // PATCH) ** 2 + 1, WIDTH),
    }  # fmt: skip
    for name in ("visual.ln_pre", "visual.ln_post"):
        state |= {f"{name}.weight": normal(WIDTH) + 1, f"{name}.bias": normal(WIDTH)}
    for tower in ("", "visual."):
        for i in range(LAYERS):
            block = f"{tower}transformer.resblocks.{i}"
            for ln in ("ln_1", "ln_2"):
                state |= {f"{block}.{ln}.weight": normal(WIDTH) + 1, f"{block}.{ln}.bias": normal(WIDTH)}
            for name, shape in (
                ("attn.in_proj_", (48, WIDTH)),
                ("attn.out_proj.", (WIDTH, WIDTH)),
                ("mlp.c_fc.", (32, WIDTH)),
                ("mlp.c_proj.", (WIDTH, 32)),
            ):
                state |= {f"{block}.{name}weight": normal(*shape), f"{block}.{name}bias": normal(shape[0])}
    return state


def open_clip_forward(state, pixels, tokens):
    """open_clip's ViT and text tower, from their definition."""

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    def tower(x, prefix, mask):
        for i in range(LAYERS):
            b = f"{prefix}transformer.resblocks.{i}"
            y = norm(x, f"{b}.ln_1").transpose(0, 1)
            y, _ = F.multi_head_attention_forward(
                y, y, y, WIDTH, HEADS, state[f"{b}.attn.in_proj_weight"], state[f"{b}.attn.in_proj_bias"], None, None, False, 0.0,
                state[f"{b}.attn.out_proj.weight"], state[f"{b}.attn.out_proj.bias"], attn_mask=mask, need_weights=False,
            )  # fmt: skip
            x = x + y.transpose(0, 1)
            y = F.gelu(F.linear(norm(x, f"{b}.ln_2"), state[f"{b}.mlp.c_fc.weight"], state[f"{b}.mlp.c_fc.bias"]))
            x = x + F.linear(y, state[f"{b}.mlp.c_proj.weight"], state[f"{b}.mlp.c_proj.bias"])
        return x

    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    image = norm(tower(norm(x, "visual.ln_pre"), "visual.", None)[:, 0], "visual.ln_post") @ state["visual.proj"]
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"][: tokens.shape[1]]
    causal = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
    x = norm(tower(x, "", causal), "ln_final")
    text = x[torch.arange(len(x)), (tokens == 53).int().argmax(1)] @ state["text_projection"]
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_hps_reads_open_clips_checkpoints(folder, images, tmp_path, kind):
    state = open_clip_state(3)
    if kind == "safetensors":
        path = tmp_path / "hps.safetensors"
        save_file(state, path)
    else:
        path = tmp_path / "hps.pt"
        torch.save({"state_dict": state, "epoch": 3}, path)
        with pytest.raises(ValueError, match="reward_pickles=true"):
            load_reward("hps", RewardSource(f"{folder}#{path}"))
    found = load_reward("hps", RewardSource(f"{folder}#{path}", allow_pickle=True))(images, PROMPTS)
    pixels = (fit(images, SIZE, "pad") - torch.tensor(OPENAI_MEAN)[:, None, None]) / torch.tensor(OPENAI_STD)[:, None, None]
    tokens = clip_tokenizer()(PROMPTS, padding="max_length", max_length=20, return_tensors="pt")["input_ids"]
    image, text = open_clip_forward(state, pixels, tokens)
    torch.testing.assert_close(found, (image * text).sum(-1), atol=1e-5, rtol=1e-4)


def test_wrong_checkpoints_are_named(folder, tmp_path):
    state = open_clip_state(0)
    with pytest.raises(ValueError, match=r"visual\.stem is no key"):
        from_open_clip({**state, "visual.stem": torch.zeros(1)})
    del state["visual.proj"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="1 tensors are missing"):
        load_reward("hps", RewardSource(f"{folder}#{tmp_path / 'part.safetensors'}"))
    with pytest.raises(SettingsError, match="could not be loaded"):
        Run(settings({"rewards": "clip", "reward_models": f"clip={tmp_path / 'nowhere'}"}))


def test_aesthetic_is_its_head_on_the_embedding(folder, images, tmp_path):
    g = torch.Generator().manual_seed(0)
    sizes = {0: (6, 8), 2: (4, 6), 4: (1, 4)}
    head = {f"layers.{i}.weight": torch.randn(*shape, generator=g) for i, shape in sizes.items()}
    head |= {f"layers.{i}.bias": torch.randn(shape[0], generator=g) for i, shape in sizes.items()}
    save_file(head, tmp_path / "head.safetensors")
    reward = load_reward("aesthetic", RewardSource(f"{folder}#{tmp_path / 'head.safetensors'}"))
    x = reward.image_embeds(images)
    for i in sizes:
        x = x @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    torch.testing.assert_close(reward(images, PROMPTS), x.squeeze(1), atol=1e-5, rtol=1e-4)


def test_a_run_trains_on_clip(folder, tiny, tmp_path):
    s = settings({**tiny.model_dump(), "rewards": "clip:2,oracle:1", "reward_models": f"clip={folder}"})
    metrics = Run(s, tmp_path).step(1)
    assert -1 <= metrics["reward/clip"] <= 1
    assert metrics["failed/clip"] == 0
