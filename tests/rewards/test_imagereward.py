"""ImageReward with a tiny checkpoint, compared with the authors' network written out here."""

import pytest
import torch
import torch.nn.functional as F
from gradients import check_gradient
from safetensors.torch import save_file
from twins import bert_tokenizer

from flowgrain.data import as_prompts
from flowgrain.rewards import RewardConfig, build_reward
from flowgrain.rewards.imagereward import from_image_reward
from flowgrain.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, fit
from flowgrain.settings import SettingsError

SEEN, READ, LAYERS, SIZE, PATCH = 192, 128, 2, 24, 8
WORDS = 59  # 57 words of the tokenizer, [DEC] and [ENC]
# The missing numbers are dropout layers.
HEAD = {0: (12, READ), 2: (8, 12), 4: (6, 8), 6: (4, 6), 7: (1, 4)}
PROMPTS = ["a red cat", "bird [ENC]", "two dogs " * 12]  # the last has more than 35 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("bert")
    bert_tokenizer().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def state():
    """Random parameters with the authors' names, with the projections of BLIP and position_ids."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        # small, so that the epsilon of the layer norms matters
        "blip.visual_encoder.cls_token": 0.01 * torch.randn(1, 1, SEEN, generator=g),
        "blip.visual_encoder.pos_embed": 0.01
        * torch.randn(1, (SIZE // PATCH) ** 2 + 1, SEEN, generator=g),
        "blip.visual_encoder.patch_embed.proj.weight": 1e-4
        * torch.randn(SEEN, 3, PATCH, PATCH, generator=g),
        "blip.visual_encoder.patch_embed.proj.bias": 1e-4 * torch.randn(SEEN, generator=g),
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        "blip.text_encoder.embeddings.word_embeddings.weight": torch.randn(
            WORDS, READ, generator=g
        ),
        "blip.text_encoder.embeddings.position_embeddings.weight": torch.randn(
            40, READ, generator=g
        ),
    }

    def linear(name, rows, columns):
        tensors[f"{name}.weight"] = torch.randn(rows, columns, generator=g) / columns**0.5
        tensors[f"{name}.bias"] = 0.1 * torch.randn(rows, generator=g)

    def norm(name, width):
        tensors[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=g)
        tensors[f"{name}.bias"] = 0.3 * torch.randn(width, generator=g)

    for i in range(LAYERS):
        block = f"blip.visual_encoder.blocks.{i}"
        for name, rows, columns in (
            ("attn.qkv", 3 * SEEN, SEEN),
            ("attn.proj", SEEN, SEEN),
            ("mlp.fc1", 80, SEEN),
            ("mlp.fc2", SEEN, 80),
        ):
            linear(f"{block}.{name}", rows, columns)
        norm(f"{block}.norm1", SEEN)
        norm(f"{block}.norm2", SEEN)
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for attention, width in (("attention", READ), ("crossattention", SEEN)):
            linear(f"{layer}.{attention}.self.query", READ, READ)
            linear(f"{layer}.{attention}.self.key", READ, width)
            linear(f"{layer}.{attention}.self.value", READ, width)
            linear(f"{layer}.{attention}.output.dense", READ, READ)
            norm(f"{layer}.{attention}.output.LayerNorm", READ)
        linear(f"{layer}.intermediate.dense", 96, READ)
        linear(f"{layer}.output.dense", READ, 96)
        norm(f"{layer}.output.LayerNorm", READ)
    norm("blip.visual_encoder.norm", SEEN)
    norm("blip.text_encoder.embeddings.LayerNorm", READ)
    linear("blip.vision_proj", 16, SEEN)
    linear("blip.text_proj", 16, READ)
    for number, shape in HEAD.items():
        linear(f"mlp.layers.{number}", *shape)
    return tensors


def attention(q, k, v, mask=None):
    """Softmax attention in heads of 64, [I, tokens, width]."""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
    weights = q @ k.mT / 8
    if mask is not None:
        weights = weights.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)


def the_authors_forward(state, pixels, tokens, mask):
    """The ViT of timm (pre-norm, eps 1e-6), BERT with cross attention (post-norm, eps 1e-12)."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    v = "blip.visual_encoder"
    x = (
        F.conv2d(
            pixels,
            state[f"{v}.patch_embed.proj.weight"],
            state[f"{v}.patch_embed.proj.bias"],
            PATCH,
        )
        .flatten(2)
        .mT
    )
    x = torch.cat([state[f"{v}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{v}.pos_embed"]
    for i in range(LAYERS):
        b = f"{v}.blocks.{i}"
        x = x + linear(
            attention(*linear(norm(x, f"{b}.norm1", 1e-6), f"{b}.attn.qkv").chunk(3, -1)),
            f"{b}.attn.proj",
        )
        x = x + linear(F.gelu(linear(norm(x, f"{b}.norm2", 1e-6), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    seen = norm(x, f"{v}.norm", 1e-6)

    t = "blip.text_encoder"
    x = (
        state[f"{t}.embeddings.word_embeddings.weight"][tokens]
        + state[f"{t}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    )
    x = norm(x, f"{t}.embeddings.LayerNorm", 1e-12)
    for i in range(LAYERS):
        b = f"{t}.encoder.layer.{i}"
        for name, other, hide in (("attention", None, mask), ("crossattention", seen, None)):
            source = x if other is None else other
            q, k, w = (
                linear(y, f"{b}.{name}.self.{part}")
                for part, y in (("query", x), ("key", source), ("value", source))
            )
            x = norm(
                x + linear(attention(q, k, w, hide), f"{b}.{name}.output.dense"),
                f"{b}.{name}.output.LayerNorm",
                1e-12,
            )
        y = linear(F.gelu(linear(x, f"{b}.intermediate.dense")), f"{b}.output.dense")
        x = norm(x + y, f"{b}.output.LayerNorm", 1e-12)
    x = x[:, 0]
    for number in HEAD:
        x = linear(x, f"mlp.layers.{number}")
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def build(path, checkpoint, **options):
    config = RewardConfig(name="imagereward", path=str(path), checkpoint=str(checkpoint), **options)
    return build_reward(config)


def tokens_of(prompts):
    """35 tokens: [CLS], one per letter (##x inside a word), [SEP], then [PAD]."""
    rows = []
    for prompt in prompts:
        ids = []
        for word in prompt.split():
            ids += (
                [58]
                if word == "[ENC]"
                else [5 + ord(c) - 97 + (26 if i else 0) for i, c in enumerate(word)]
            )
        ids = [2, *ids[:33], 3]
        rows.append(ids + [0] * (35 - len(ids)))
    return torch.tensor(rows)


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_it_is_the_authors_network(folder, state, tmp_path, kind):
    path = tmp_path / ("ImageReward.safetensors" if kind == "safetensors" else "ImageReward.pt")
    (save_file if kind == "safetensors" else torch.save)(state, path)
    if kind == "pickle":
        with pytest.raises(SettingsError, match=r"\[imagereward\]\.checkpoint=.*allow_pickle=true"):
            build(folder, path)
    images = torch.rand(3, 3, 40, 45, generator=torch.Generator().manual_seed(1))
    scores = build(folder, path, allow_pickle=True)(images, as_prompts(PROMPTS))
    pixels = (
        fit(images, SIZE, "torchvision") - torch.tensor(OPENAI_MEAN)[:, None, None]
    ) / torch.tensor(OPENAI_STD)[:, None, None]
    tokens = tokens_of(PROMPTS)
    expected = the_authors_forward(state, pixels, tokens, tokens != 0)
    assert expected.std() > 0.05  # different scores, so the comparison means something
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_the_gradient_of_a_score(folder, state, tmp_path):
    """With larger patch weights, so that finite differences of float32 scores have digits."""
    key = "blip.visual_encoder.patch_embed.proj.weight"
    save_file({**state, key: 100 * state[key]}, tmp_path / "ImageReward.safetensors")
    reward = build(folder, tmp_path / "ImageReward.safetensors")
    images = 0.2 + 0.6 * torch.rand(3, 3, 40, 45, generator=torch.Generator().manual_seed(1))
    check_gradient(reward, images, as_prompts(PROMPTS), tolerance=0.1)


def test_wrong_checkpoints_are_named(folder, state, tmp_path):
    def loaded(tensors, tokenizer=folder):
        save_file(tensors, tmp_path / "wrong.safetensors")
        return build(tokenizer, tmp_path / "wrong.safetensors")

    with pytest.raises(SettingsError, match=r"blip\.visual_encoder\.blocks\.0\.gamma is not a key"):
        loaded({**state, "blip.visual_encoder.blocks.0.gamma": torch.zeros(1)})
    with pytest.raises(
        SettingsError, match=r"0 tensors are missing and 1 are unexpected \(first: text\.pooler\)"
    ):
        loaded({**state, "blip.text_encoder.pooler": torch.zeros(1)})
    key = "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"
    with pytest.raises(
        SettingsError,
        match=r"1 tensors are missing and 0 .*\(first: .*layer\.1\.crossattention\.self\.key\.bias",
    ):
        loaded({name: value for name, value in state.items() if name != key})
    with pytest.raises(SettingsError, match="the first layer of the head is missing"):
        loaded({name: value for name, value in state.items() if not name.startswith("mlp")})
    with pytest.raises(SettingsError, match="size mismatch"):
        loaded({**state, "blip.visual_encoder.norm.weight": torch.zeros(3)})
    with pytest.raises(
        SettingsError, match=r"\.path=.*has 59 tokens, including two of BLIP, .* 60"
    ):
        loaded(
            {**state, "blip.text_encoder.embeddings.word_embeddings.weight": torch.zeros(60, READ)}
        )
    with pytest.raises(
        SettingsError, match=r"rewards\[imagereward\]\.path=.*nowhere: the model cannot be loaded"
    ):
        loaded(state, tokenizer=tmp_path / "nowhere")
    with pytest.raises(
        SettingsError, match=r"\[imagereward\]\.checkpoint=here: there is no such f"
    ):
        build(folder, "here")


def test_unused_parameters_are_left_out(state):
    named = from_image_reward(state)
    assert len(named) == len(state) - 5
    assert not any(
        "vision_proj" in key or "text_proj" in key or "position_ids" in key for key in named
    )
