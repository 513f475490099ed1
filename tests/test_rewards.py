"""CLIP-like rewards on tiny models: against transformers' own features, open_clip's forward written out, and their failures."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from twins import clip_tokenizer, siglip_tokenizer

from flowgrain import SettingsError
from flowgrain.rewards import RewardSource, load_reward
from flowgrain.rewards.clip import OPENAI_MEAN, OPENAI_STD, Preprocess, fit, from_open_clip, read_preprocess
from flowgrain.config.schema import settings
from flowgrain.training.trainer import Run

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


SHAPES = [(40, 56), (20, 24), (24, 24), (100, 31), (31, 100), (45, 40), (24, 27)]


def picture(size: tuple[int, int], noise: bool = False) -> Image.Image:
    """A picture in bytes, of height and width `size`: smooth, or noise, whose resizing overshoots."""
    dots = np.random.default_rng(0).integers(0, 256, (*size, 3) if noise else (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(dots).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def resized(image: Image.Image, height: int, width: int, bound: bool) -> torch.Tensor:
    """Pillow's bicubic resizing of floats, across and then down, [1, 3, height, width]; with `bound` each pass ends in 0..1."""
    found = tensor(image)[0].numpy()
    for size in ((width, image.height), (width, height)):
        found = np.stack([np.array(Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC)) for channel in found])
        found = found.clip(0, 1) if bound else found
    return torch.from_numpy(found)[None]


PROCESSORS = {
    "clip": (CLIPImageProcessorPil, {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}),
    "clip, larger before the crop": (CLIPImageProcessorPil, {"size": {"shortest_edge": 28}, "crop_size": SIZE}),
    "clip, bilinear": (CLIPImageProcessorPil, {"size": SIZE, "crop_size": SIZE, "resample": 2}),
    "clip, squashed (DFN5B)": (CLIPImageProcessorPil, {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False}),
    "clip, squashed and cut": (CLIPImageProcessorPil, {"size": {"height": 28, "width": 28}, "crop_size": SIZE}),
    "clip, its own mean": (
        CLIPImageProcessorPil,
        {"size": SIZE, "crop_size": SIZE, "image_mean": [0.4] * 3, "image_std": [0.2] * 3},
    ),
    "clip, not normalised": (CLIPImageProcessorPil, {"size": SIZE, "crop_size": SIZE, "do_normalize": False}),
    "siglip": (SiglipImageProcessorPil, {"size": {"height": SIZE, "width": SIZE}}),
}


# of tall images Pillow may take the passes the other way round, which shows where they overshoot: in noise
@pytest.mark.parametrize(("size", "noise"), [(s, False) for s in SHAPES] + [(s, True) for s in SHAPES if s[0] <= s[1]])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_models_own_processor(name, size, noise):
    """transformers' processors resize bytes, rounded by half a byte in each of two passes, the first of which the second can
    make more of: 1.5/255 of a pixel, over the deviation.
    """
    make, config = PROCESSORS[name]
    processor = make(**config)
    expected = processor(images=picture(size, noise), return_tensors="pt")["pixel_values"]
    ours = read_preprocess(processor.to_dict(), SIZE, name == "siglip")
    found = ours(tensor(picture(size, noise)))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1.5 / 255 / min(ours.std)


def test_without_a_config_the_processors_of_clip_and_siglip_are_followed():
    assert read_preprocess({}, 224, siglip=False) == read_preprocess(CLIPImageProcessorPil().to_dict(), 224, siglip=False)
    assert read_preprocess({}, 224, siglip=True) == read_preprocess(SiglipImageProcessorPil().to_dict(), 224, siglip=True)
    assert read_preprocess({"size": 378, "crop_size": 378}, 378, siglip=False).edge == 378  # of before transformers 4.25


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"shortest_edge": 224}, "crop_size": 224},
        {"size": {"height": 24, "width": 30}, "do_center_crop": False},
        {"size": {"shortest_edge": 24}, "do_center_crop": False},
        {"size": {"shortest_edge": 24, "longest_edge": 30}},
        {"resample": 1},
        {"do_resize": False},
        {"do_rescale": False},
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(folder, tmp_path, config):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"reward_models: .*preprocessor_config\.json: \w+=.* cannot be followed: "):
        load_reward("clip", RewardSource(str(tmp_path / "model")))


def test_clip_score_follows_the_models_config(folder, images, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    PROCESSORS["clip, squashed (DFN5B)"][0](**PROCESSORS["clip, squashed (DFN5B)"][1]).save_pretrained(tmp_path / "model")
    reward = load_reward("clip", RewardSource(str(tmp_path / "model")))
    assert reward.preprocess == Preprocess(SIZE, "squash", SIZE)
    assert not torch.equal(reward(images, PROMPTS), load_reward("clip", RewardSource(str(folder)))(images, PROMPTS))


@pytest.mark.parametrize("size", SHAPES)
def test_cropped_as_torchvision_does(size):
    """Shorter side, the other one cut to a whole number; then the centre, half a pixel to the even one (CLIP's own package)."""
    height, width = (int(SIZE * side / min(size)) for side in size)
    there = resized(picture(size, noise=True), height, width, bound=True)
    top, left = round((height - SIZE) / 2), round((width - SIZE) / 2)
    expected = there[..., top : top + SIZE, left : left + SIZE]
    torch.testing.assert_close(fit(tensor(picture(size, noise=True)), SIZE, "torchvision"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SHAPES)
def test_hps_pads_with_black(size):
    """HPS-v2's own rule: the longer side, rounded; floats, which may overshoot; the bar before is the narrower one."""
    height, width = (round(side * SIZE / max(size)) for side in size)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    expected = torch.zeros(1, 3, SIZE, SIZE)
    expected[..., top : top + height, left : left + width] = resized(picture(size, noise=True), height, width, bound=False)
    torch.testing.assert_close(fit(tensor(picture(size, noise=True)), SIZE, "pad"), expected, atol=1e-5, rtol=0)


def test_siglip_score_is_the_cosine(tmp_path):
    """Whole: SigLIP's tokenizer (lower case, no punctuation, padded to the model's length without a mask) and its processor."""
    pytest.importorskip("sentencepiece")
    tokenizer = siglip_tokenizer(tmp_path)
    torch.manual_seed(0)
    both = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    text = {"vocab_size": 60, "max_position_embeddings": 12, "projection_size": WIDTH, "bos_token_id": 2, "eos_token_id": 1}
    vision = {"image_size": SIZE, "patch_size": PATCH}
    SiglipModel(SiglipConfig(text_config={**both, **text}, vision_config={**both, **vision})).save_pretrained(tmp_path)
    processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(tmp_path)
    images = [picture((40, 56)), picture((56, 40)), picture((30, 30))]
    prompts = ["A red cat!", "two dogs", "a bird, on a tree, and a bird on a tree"]
    found = load_reward("clip", RewardSource(str(tmp_path)))(torch.cat([tensor(i.resize((48, 32))) for i in images]), prompts)
    tokens = tokenizer(prompts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    pixels = processor(images=[i.resize((48, 32)) for i in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = SiglipModel.from_pretrained(tmp_path).eval()(input_ids=tokens["input_ids"], pixel_values=pixels)
    expected = (out.image_embeds * out.text_embeds).sum(-1)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # the processor rounds to bytes


def test_a_tokenizer_that_needs_a_package_is_named(folder, monkeypatch):
    def needy(name):
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr("flowgrain.rewards.clip.AutoTokenizer.from_pretrained", needy)
    with pytest.raises(ValueError, match=r"reward_models: .* SentencePiece .* pip install 'flowgrain\[siglip\]'"):
        load_reward("clip", RewardSource(str(folder)))


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
