"""Rewards with tiny CLIP models, compared with transformers and with the network of open_clip."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.comparison import golden
from gradients import check_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from twins import clip_tokenizer, siglip_tokenizer

from flowgrain.data import as_prompts
from flowgrain.rewards import RewardConfig, build_reward
from flowgrain.rewards.open_clip import clip_config, from_open_clip
from flowgrain.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess, fit, read_preprocess
from flowgrain.settings import SettingsError

TEXTS = ["a red cat", "two dogs", "bird"]
PROMPTS = as_prompts(TEXTS)
HEADS, WIDTH, LAYERS, SIZE, PATCH = 2, 16, 2, 24, 8


def tiny_config(**text):
    """The configuration of a tiny CLIP model. `text` changes the text model."""
    both = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": "gelu",
    }
    text = {
        "vocab_size": 60,
        "max_position_embeddings": 20,
        "bos_token_id": 52,
        "eos_token_id": 53,
        **text,
    }
    vision = {"image_size": SIZE, "patch_size": PATCH}
    return CLIPConfig(
        text_config={**both, **text}, vision_config={**both, **vision}, projection_dim=8
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with a tiny CLIP model."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("clip")
    CLIPModel(tiny_config()).save_pretrained(where)
    clip_tokenizer().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    """A directory with a tiny CLIP model and HPS checkpoint that read every byte of a prompt."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("bytes")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(where)
    model = CLIPModel(
        tiny_config(
            vocab_size=len(vocab),
            max_position_embeddings=77,
            bos_token_id=len(vocab) - 2,
            eos_token_id=len(vocab) - 1,
        )
    )
    with torch.no_grad():  # larger than by default, so that every token matters
        model.text_model.embeddings.token_embedding.weight.normal_()
    model.save_pretrained(where)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, where / "hps.safetensors")
    return where


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(1))


def build(name, path, **options):
    return build_reward(RewardConfig(name=name, path=str(path), **options))


@pytest.mark.parametrize("name", ["clip", "pickscore", "hps", "aesthetic"])
def test_the_gradient_of_a_score(bytes_folder, images, tmp_path, name):
    options = {}
    if name == "hps":
        options = {"checkpoint": str(bytes_folder / "hps.safetensors")}
    if name == "aesthetic":
        torch.manual_seed(2)
        head = {"layers.0.weight": torch.randn(1, 8), "layers.0.bias": torch.zeros(1)}
        save_file(head, tmp_path / "head.safetensors")
        options = {"checkpoint": str(tmp_path / "head.safetensors")}
    reward = build(name, bytes_folder, **options)
    check_gradient(reward, 0.2 + 0.6 * images, PROMPTS)  # no pixel is clamped


def test_clip_score_is_the_cosine(folder, images):
    scores = build("clip", folder)(images, PROMPTS)
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = (fit(images, SIZE, "crop") - torch.tensor(OPENAI_MEAN)[:, None, None]) / torch.tensor(
        OPENAI_STD
    )[:, None, None]
    tokens = clip_tokenizer()(TEXTS, padding="max_length", max_length=20, return_tensors="pt")
    with torch.no_grad():
        out = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=pixels,
        )
    torch.testing.assert_close(
        scores, (out.image_embeds * out.text_embeds).sum(-1), atol=1e-6, rtol=1e-5
    )


def text_embeds(name, folder, texts):
    """Embeddings of texts by the reward `name`, with the same parameters for all names."""
    options = {"checkpoint": str(folder / "hps.safetensors")} if name == "hps" else {}
    return build(name, folder, **options).text_embeds(texts)


DIRTY = {
    "cats &amp; dogs": "cats & dogs",
    "cats &amp;amp; dogs": "cats & dogs",
    "caf\u00c3\u00a9 au lait": "caf\u00e9 au lait",
    "a sign that says \u201copen\u201d": 'a sign that says "open"',
    "it\u2019s late": "it's late",
    "\ufb01ne \uff26\uff35\uff2c\uff2c": "fine full",
    "&lt;b&gt;BOLD&lt;/b&gt;&nbsp;": "<b>bold</b>",
}


@pytest.mark.parametrize("name", ["clip", "hps"])
def test_prompts_are_cleaned_as_in_open_clip(bytes_folder, name):
    cleaned = text_embeds("pickscore", bytes_folder, [*DIRTY.values()])
    assert torch.equal(text_embeds(name, bytes_folder, [*DIRTY]), cleaned)
    raw = text_embeds("pickscore", bytes_folder, [*DIRTY])
    assert ((raw - cleaned).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize(("name", "key"), [("clip", "lower"), ("hps", "hps_lower")])
def test_golden_texts_reach_the_model(bytes_folder, name, key):
    cases = golden("text_cleaning")["cases"]
    expected = text_embeds("pickscore", bytes_folder, [case[key] for case in cases])
    assert torch.equal(text_embeds(name, bytes_folder, [case["text"] for case in cases]), expected)


def test_pickscore_reads_prompts_as_transformers_does(bytes_folder):
    tokenizer, model = CLIPTokenizer.from_pretrained(bytes_folder), CLIPModel
    tokens = tokenizer([*DIRTY], padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        out = model.from_pretrained(bytes_folder).eval().get_text_features(**tokens).pooler_output
    torch.testing.assert_close(
        text_embeds("pickscore", bytes_folder, [*DIRTY]), F.normalize(out, dim=-1)
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text([chr(i) for i in range(32, 127) if i != ord("&")], max_size=50), min_size=1)
)
def test_plain_ascii_prompts_keep_their_scores(bytes_rewards, prompts):
    """Runs with such prompts have the same rewards as before prompts were cleaned."""
    clip, hps, raw = (reward.text_embeds(prompts) for reward in bytes_rewards)
    assert torch.equal(clip, raw)
    assert torch.equal(hps, raw)


@pytest.fixture(scope="module")
def bytes_rewards(bytes_folder):
    """`clip`, `hps` and a reward that does not clean prompts, with the same parameters."""
    hps = build("hps", bytes_folder, checkpoint=str(bytes_folder / "hps.safetensors"))
    return build("clip", bytes_folder), hps, build("pickscore", bytes_folder)


SHAPES = [(40, 56), (20, 24), (24, 24), (100, 31), (31, 100), (45, 40), (24, 27)]


def picture(size: tuple[int, int], noise: bool = False) -> Image.Image:
    """An image of height and width `size`: smooth, or noise, which overshoots when resized."""
    dots = np.random.default_rng(0).integers(
        0, 256, (*size, 3) if noise else (5, 5, 3), dtype=np.uint8
    )
    return Image.fromarray(dots).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def resized(image: Image.Image, height: int, width: int, bound: bool) -> torch.Tensor:
    """Bicubic resizing of floats by Pillow in two passes, [1, 3, height, width].

    With `bound`, each pass is clamped to 0..1.
    """
    channels = tensor(image)[0].numpy()
    for size in ((width, image.height), (width, height)):
        channels = np.stack(
            [
                np.array(Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC))
                for channel in channels
            ]
        )
        channels = channels.clip(0, 1) if bound else channels
    return torch.from_numpy(channels)[None]


PROCESSORS = {
    "clip": (
        CLIPImageProcessorPil,
        {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}},
    ),
    "clip, larger before the crop": (
        CLIPImageProcessorPil,
        {"size": {"shortest_edge": 28}, "crop_size": SIZE},
    ),
    "clip, bilinear": (CLIPImageProcessorPil, {"size": SIZE, "crop_size": SIZE, "resample": 2}),
    "clip, squashed (DFN5B)": (
        CLIPImageProcessorPil,
        {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False},
    ),
    "clip, squashed and cut": (
        CLIPImageProcessorPil,
        {"size": {"height": 28, "width": 28}, "crop_size": SIZE},
    ),
    "clip, its own mean": (
        CLIPImageProcessorPil,
        {"size": SIZE, "crop_size": SIZE, "image_mean": [0.4] * 3, "image_std": [0.2] * 3},
    ),
    "clip, not normalized": (
        CLIPImageProcessorPil,
        {"size": SIZE, "crop_size": SIZE, "do_normalize": False},
    ),
    "siglip": (SiglipImageProcessorPil, {"size": {"height": SIZE, "width": SIZE}}),
}


# For tall images, Pillow may swap the two passes. This changes noise, because it overshoots.
@pytest.mark.parametrize(
    ("size", "noise"), [(s, False) for s in SHAPES] + [(s, True) for s in SHAPES if s[0] <= s[1]]
)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_processor(name, size, noise):
    """The processors of transformers round to bytes after each of two passes.

    The second pass amplifies the error of the first, to at most 1.5/255 before normalization.
    """
    make, config = PROCESSORS[name]
    processor = make(**config)
    expected = processor(images=picture(size, noise), return_tensors="pt")["pixel_values"]
    ours = read_preprocess(processor.to_dict(), SIZE, name == "siglip")
    pixels = ours(tensor(picture(size, noise)))
    assert pixels.shape == expected.shape
    assert (pixels - expected).abs().max() <= 1.5 / 255 / min(ours.std)


def test_the_defaults_are_those_of_the_processors():
    assert read_preprocess({}, 224, siglip=False) == read_preprocess(
        CLIPImageProcessorPil().to_dict(), 224, siglip=False
    )
    assert read_preprocess({}, 224, siglip=True) == read_preprocess(
        SiglipImageProcessorPil().to_dict(), 224, siglip=True
    )
    assert (
        read_preprocess({"size": 378, "crop_size": 378}, 378, siglip=False).edge == 378
    )  # the format of old model repositories


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
def test_an_unsupported_config_is_an_error(folder, tmp_path, config):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError,
        match=r"rewards\[clip\]\.path=.*preprocessor_config\.json: \w+=.* is not supported: ",
    ):
        build("clip", tmp_path / "model")


def test_clip_score_follows_the_models_config(folder, images, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    PROCESSORS["clip, squashed (DFN5B)"][0](
        **PROCESSORS["clip, squashed (DFN5B)"][1]
    ).save_pretrained(tmp_path / "model")
    reward = build("clip", tmp_path / "model")
    assert reward.preprocess == Preprocess(SIZE, "squash", SIZE)
    assert not torch.equal(reward(images, PROMPTS), build("clip", folder)(images, PROMPTS))


@pytest.mark.parametrize("size", SHAPES)
def test_cropped_as_torchvision_does(size):
    """The longer side is rounded down, and the offset of the center half to even."""
    height, width = (int(SIZE * side / min(size)) for side in size)
    whole = resized(picture(size, noise=True), height, width, bound=True)
    top, left = round((height - SIZE) / 2), round((width - SIZE) / 2)
    expected = whole[..., top : top + SIZE, left : left + SIZE]
    torch.testing.assert_close(
        fit(tensor(picture(size, noise=True)), SIZE, "torchvision"), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("size", SHAPES)
def test_hps_pads_with_black(size):
    """The shorter side is rounded, floats may overshoot, and the first bar is the narrower one."""
    height, width = (round(side * SIZE / max(size)) for side in size)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    expected = torch.zeros(1, 3, SIZE, SIZE)
    expected[..., top : top + height, left : left + width] = resized(
        picture(size, noise=True), height, width, bound=False
    )
    torch.testing.assert_close(
        fit(tensor(picture(size, noise=True)), SIZE, "pad"), expected, atol=1e-5, rtol=0
    )


def test_siglip_score_is_the_cosine(tmp_path):
    """With the tokenizer of SigLIP (lower case, no punctuation, no mask) and its processor.

    The tokenizer keeps the letters of an HTML entity: prompts are not cleaned before.
    """
    pytest.importorskip("sentencepiece")
    tokenizer = siglip_tokenizer(tmp_path)
    torch.manual_seed(0)
    both = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    text = {
        "vocab_size": 60,
        "max_position_embeddings": 12,
        "projection_size": WIDTH,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    vision = {"image_size": SIZE, "patch_size": PATCH}
    SiglipModel(
        SiglipConfig(text_config={**both, **text}, vision_config={**both, **vision})
    ).save_pretrained(tmp_path)
    processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor.save_pretrained(tmp_path)
    images = [picture((40, 56)), picture((56, 40)), picture((30, 30))]
    prompts = ["A red &amp; cat!", "two dogs", "a bird, on a tree, and a bird on a tree"]
    batch = torch.cat([tensor(image.resize((48, 32))) for image in images])
    scores = build("clip", tmp_path)(batch, as_prompts(prompts))
    tokens = tokenizer(
        prompts, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    pixels = processor(images=[i.resize((48, 32)) for i in images], return_tensors="pt")[
        "pixel_values"
    ]
    with torch.no_grad():
        out = SiglipModel.from_pretrained(tmp_path).eval()(
            input_ids=tokens["input_ids"], pixel_values=pixels
        )
    expected = (out.image_embeds * out.text_embeds).sum(-1)
    assert expected.std() > 0.01
    torch.testing.assert_close(scores, expected, atol=2e-3, rtol=0)  # the processor rounds to bytes


def test_a_tokenizer_that_needs_a_package_is_named(folder, monkeypatch):
    def needy(name):
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr("flowgrain.rewards.clip.AutoTokenizer.from_pretrained", needy)
    with pytest.raises(
        ValueError, match=r"\.path=.* SentencePiece .* pip install 'flowgrain\[siglip\]'"
    ):
        build("clip", folder)


def open_clip_state(seed: int) -> dict[str, torch.Tensor]:
    """Random parameters with the names of open_clip."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return 0.3 * torch.randn(shape, generator=g)

    state = {
        "logit_scale": normal(),
        "text_projection": normal(WIDTH, 8), "visual.proj": normal(WIDTH, 8),
        "positional_embedding": normal(20, WIDTH), "token_embedding.weight": normal(60, WIDTH),
        "ln_final.weight": normal(WIDTH) + 1, "ln_final.bias": normal(WIDTH),
        "visual.class_embedding": normal(WIDTH),
        "visual.conv1.weight": normal(WIDTH, 3, PATCH, PATCH),
        "visual.positional_embedding": normal((SIZE // PATCH) ** 2 + 1, WIDTH),
    }  # fmt: skip
    for name in ("visual.ln_pre", "visual.ln_post"):
        state |= {f"{name}.weight": normal(WIDTH) + 1, f"{name}.bias": normal(WIDTH)}
    for tower in ("", "visual."):
        for i in range(LAYERS):
            block = f"{tower}transformer.resblocks.{i}"
            for ln in ("ln_1", "ln_2"):
                state |= {
                    f"{block}.{ln}.weight": normal(WIDTH) + 1,
                    f"{block}.{ln}.bias": normal(WIDTH),
                }
            for name, shape in (
                ("attn.in_proj_", (48, WIDTH)),
                ("attn.out_proj.", (WIDTH, WIDTH)),
                ("mlp.c_fc.", (32, WIDTH)),
                ("mlp.c_proj.", (WIDTH, 32)),
            ):
                state |= {
                    f"{block}.{name}weight": normal(*shape),
                    f"{block}.{name}bias": normal(shape[0]),
                }
    return state


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def open_clip_forward(state, pixels, tokens, activation=F.gelu):
    """The ViT and the text model of open_clip, from their definition."""

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    def tower(x, prefix, mask):
        for i in range(LAYERS):
            b = f"{prefix}transformer.resblocks.{i}"
            y = norm(x, f"{b}.ln_1").transpose(0, 1)
            y, _ = F.multi_head_attention_forward(
                y, y, y, WIDTH, HEADS,
                state[f"{b}.attn.in_proj_weight"], state[f"{b}.attn.in_proj_bias"],
                None, None, False, 0.0,
                state[f"{b}.attn.out_proj.weight"], state[f"{b}.attn.out_proj.bias"],
                attn_mask=mask, need_weights=False,
            )  # fmt: skip
            x = x + y.transpose(0, 1)
            y = activation(
                F.linear(
                    norm(x, f"{b}.ln_2"), state[f"{b}.mlp.c_fc.weight"], state[f"{b}.mlp.c_fc.bias"]
                )
            )
            x = x + F.linear(y, state[f"{b}.mlp.c_proj.weight"], state[f"{b}.mlp.c_proj.bias"])
        return x

    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = (
        torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
        + state["visual.positional_embedding"]
    )
    image = (
        norm(tower(norm(x, "visual.ln_pre"), "visual.", None)[:, 0], "visual.ln_post")
        @ state["visual.proj"]
    )
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
        with pytest.raises(SettingsError, match=r"rewards\[hps\]\.checkpoint=.*allow_pickle=true"):
            build("hps", folder, checkpoint=str(path))
    scores = build("hps", folder, checkpoint=str(path), allow_pickle=True)(images, PROMPTS)
    pixels = (fit(images, SIZE, "pad") - torch.tensor(OPENAI_MEAN)[:, None, None]) / torch.tensor(
        OPENAI_STD
    )[:, None, None]
    tokens = clip_tokenizer()(TEXTS, padding="max_length", max_length=20, return_tensors="pt")[
        "input_ids"
    ]
    image, text = open_clip_forward(state, pixels, tokens)
    torch.testing.assert_close(scores, (image * text).sum(-1), atol=1e-5, rtol=1e-4)


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 8,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": SIZE,
            "layers": LAYERS,
            "width": WIDTH,
            "head_width": WIDTH // HEADS,
            "patch_size": PATCH,
            "mlp_ratio": 2.0,
        },
        "text_cfg": {
            "context_length": 20,
            "vocab_size": 60,
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
            "mlp_ratio": 2.0,
        },
    },
    "preprocess_cfg": {
        "mean": OPENAI_MEAN,
        "std": OPENAI_STD,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}


@pytest.fixture
def open_clip_folder(tmp_path):
    """A function that saves an open_clip repository with a tokenizer, but no config.json."""

    def save(name="open_clip", config=OPEN_CLIP):
        where = tmp_path / name
        clip_tokenizer().save_pretrained(where)
        (where / "open_clip_config.json").write_text(json.dumps(config))
        torch.save(open_clip_state(3), where / "open_clip_pytorch_model.bin")
        return where

    return save


def build_open_clip(where, name="clip"):
    checkpoint = str(where / "open_clip_pytorch_model.bin")
    return build(name, where, checkpoint=checkpoint, allow_pickle=True)


@pytest.mark.parametrize("transformers_files", [False, True])
def test_clip_reads_open_clips_repositories(folder, images, open_clip_folder, transformers_files):
    """The model and the preprocessing of open_clip_config.json, with or without config.json."""
    where = open_clip_folder()
    if transformers_files:  # its activation is gelu
        shutil.copy(folder / "config.json", where)
    scores = build_open_clip(where)(images, PROMPTS)
    pixels = (
        fit(images, SIZE, "squash") - torch.tensor(OPENAI_MEAN)[:, None, None]
    ) / torch.tensor(OPENAI_STD)[:, None, None]
    tokens = clip_tokenizer()(TEXTS, padding="max_length", max_length=20, return_tensors="pt")
    expected = [
        (image * text).sum(-1)
        for activation in (quick_gelu, F.gelu)
        for image, text in [
            open_clip_forward(open_clip_state(3), pixels, tokens["input_ids"], activation)
        ]
    ]
    torch.testing.assert_close(scores, expected[0], atol=1e-5, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # the activation matters


def test_a_pickle_of_clip_must_be_allowed(open_clip_folder):
    where = open_clip_folder()
    with pytest.raises(SettingsError, match=r"rewards\[clip\]\.checkpoint=.*allow_pickle=true"):
        build("clip", where, checkpoint=str(where / "open_clip_pytorch_model.bin"))


def test_the_preprocessing_of_open_clip(open_clip_folder):
    mean = [0.4, 0.5, 0.6]
    changed = {"mean": mean, "interpolation": "bilinear", "resize_mode": "shortest"}
    where = open_clip_folder(config=OPEN_CLIP | {"preprocess_cfg": changed})
    expected = Preprocess(SIZE, "torchvision", resample="bilinear", mean=tuple(mean))
    assert build_open_clip(where).preprocess == expected
    CLIPImageProcessorPil(size=SIZE, crop_size=SIZE).save_pretrained(where)  # takes precedence
    assert build_open_clip(where).preprocess == Preprocess(SIZE, "crop", SIZE)
    defaults = open_clip_folder("defaults", {"model_cfg": OPEN_CLIP["model_cfg"]})
    assert build_open_clip(defaults).preprocess == Preprocess(SIZE, "torchvision")


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("preprocess_cfg", {"resize_mode": "longest"}, "resize_mode=longest is not supported"),
        ("preprocess_cfg", {"interpolation": "random"}, "interpolation=random is not supported"),
        ("model_cfg", {"vision_cfg": {"timm_model_name": "x"}}, "timm_model_name is not supported"),
        ("model_cfg", {"text_cfg": {}}, "vocab_size is missing"),
    ],
)
def test_an_unsupported_open_clip_config_is_an_error(open_clip_folder, section, change, message):
    where = open_clip_folder(config=OPEN_CLIP | {section: OPEN_CLIP[section] | change})
    with pytest.raises(
        SettingsError, match=rf"rewards\[clip\]\.path=.*open_clip_config\.json: {message}"
    ):
        build_open_clip(where)


def test_an_open_clip_config_that_is_not_json_is_an_error(open_clip_folder):
    where = open_clip_folder()
    (where / "open_clip_config.json").write_text("{")
    with pytest.raises(SettingsError, match=r"rewards\[clip\]\.path=.*cannot be loaded"):
        build_open_clip(where)


def test_the_model_of_g2rpo_has_the_size_of_vit_h_14():
    """The model_cfg of apple/DFN5B-CLIP-ViT-H-14. open_clip lists ViT-H-14 with 986.11 M."""
    config = clip_config(
        {
            "embed_dim": 1024,
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": 224,
                "layers": 32,
                "width": 1280,
                "head_width": 80,
                "patch_size": 14,
            },
            "text_cfg": {
                "context_length": 77,
                "vocab_size": 49408,
                "width": 1024,
                "heads": 16,
                "layers": 24,
            },
        }
    )
    with torch.device("meta"):
        model = CLIPModel(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(986.11e6, abs=5e3)
    assert config.vision_config.num_attention_heads == 16
    assert config.vision_config.hidden_act == config.text_config.hidden_act == "quick_gelu"


def test_wrong_checkpoints_are_named(folder, tmp_path):
    state = open_clip_state(0)
    with pytest.raises(ValueError, match=r"visual\.stem is not a key"):
        from_open_clip({**state, "visual.stem": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"ln_3\.weight is not a parameter of a block"):
        from_open_clip({"visual.transformer.resblocks.0.ln_3.weight": torch.zeros(1)})
    path = str(tmp_path / "part.safetensors")
    save_file({**state, "visual.stem": torch.zeros(1)}, path)
    with pytest.raises(SettingsError, match=r"rewards\[hps\]\.checkpoint=.*visual\.stem is not a"):
        build("hps", folder, checkpoint=path)
    del state["visual.proj"]
    save_file(state, path)
    with pytest.raises(SettingsError, match="1 tensors are missing"):
        build("hps", folder, checkpoint=path)
    with pytest.raises(SettingsError, match=r"rewards\[clip\]\.path=.*nowhere.*cannot be loaded"):
        build("clip", tmp_path / "nowhere")


def test_hps_reads_checkpoints_with_the_names_of_transformers(folder, images, tmp_path):
    state = open_clip_state(3)
    save_file(state, tmp_path / "open_clip.safetensors")
    save_file(from_open_clip(state), tmp_path / "transformers.safetensors")
    scores = [
        build("hps", folder, checkpoint=str(tmp_path / f"{name}.safetensors"))(images, PROMPTS)
        for name in ("open_clip", "transformers")
    ]
    assert torch.equal(*scores)


def test_a_checkpoint_of_the_hub(folder, images, tmp_path, monkeypatch):
    save_file(open_clip_state(3), tmp_path / "hps.safetensors")
    requests = []

    def download(repository, file):
        requests.append((repository, file))
        return str(tmp_path / "hps.safetensors")

    monkeypatch.setattr("flowgrain.rewards.checkpoints.hf_hub_download", download)
    remote = build("hps", folder, checkpoint="org/repo/hps.safetensors")
    local = build("hps", folder, checkpoint=str(tmp_path / "hps.safetensors"))
    assert requests == [("org/repo", "hps.safetensors")]
    assert torch.equal(remote(images, PROMPTS), local(images, PROMPTS))


def test_aesthetic_is_its_head_on_the_embedding(folder, images, tmp_path):
    g = torch.Generator().manual_seed(0)
    sizes = {0: (6, 8), 2: (4, 6), 4: (1, 4)}
    head = {f"layers.{i}.weight": torch.randn(*shape, generator=g) for i, shape in sizes.items()}
    head |= {f"layers.{i}.bias": torch.randn(shape[0], generator=g) for i, shape in sizes.items()}
    save_file(head, tmp_path / "head.safetensors")
    reward = build("aesthetic", folder, checkpoint=str(tmp_path / "head.safetensors"))
    x = reward.image_embeds(images)
    for i in sizes:
        x = x @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    torch.testing.assert_close(reward(images, PROMPTS), x.squeeze(1), atol=1e-5, rtol=1e-4)
    save_file({"weight": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    with pytest.raises(
        SettingsError, match=r"\[aesthetic\]\.checkpoint=.*not a head of linear lay"
    ):
        build("aesthetic", folder, checkpoint=str(tmp_path / "wrong.safetensors"))


def test_a_run_trains_with_clip(folder, tiny, tmp_path):
    from flowgrain import Trainer

    rewards = [{"name": "clip", "path": str(folder), "weight": 2.0}, {"name": "oracle"}]
    config = tiny.with_changes({"rewards": rewards, "training.max_steps": 1})
    metrics = Trainer(config, tmp_path).train()[-1]
    assert -1 <= metrics["reward/clip"] <= 1
    assert metrics["failed/clip"] == 0
