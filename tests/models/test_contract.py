"""The contract of a backbone, checked when it is loaded or given from Python."""

import re
import types

import pytest
import torch
from torch import nn
from toy import Toy, ToyNet, red

from flowgrain import SettingsError, Trainer
from flowgrain.core.sde import sigma_grid
from flowgrain.models import (
    BACKBONES,
    Backbone,
    Dtypes,
    ModelConfig,
    Shift,
    check_backbone,
    check_training,
    load_backbone,
    register_backbone,
)
from flowgrain.registry import load_plugin

MEMBERS = [name for name in vars(Backbone) if not name.startswith("_")]

PLUGIN = '''
"""A backbone in a plugin file: the velocity is a linear map of the latent."""

import torch
from torch import nn

from flowgrain.models import NoLora, register_backbone


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(12, 12)

    def forward(self, x):
        return self.map(x.flatten(1)).reshape(x.shape)

    def save_pretrained(self, folder):
        folder.mkdir(parents=True)
        torch.save(self.state_dict(), folder / "weights.pt")


@register_backbone("linear_toy")
class LinearToy:
    vae = None
    latent_shape = (3, 2, 2)
    lora_targets = []
    lora_format = NoLora
    embedded_guidance = False
    blocks = []

    def __init__(self, model, dtypes):
        self.model, self.dtypes = model, dtypes
        self.transformer = Linear().to(dtypes.transformer)

    @classmethod
    def load(cls, model, dtypes):
        return cls(model, dtypes)

    def load_lora(self, path):
        self.lora_format.lora_state_dict(path)

    def natural_shift(self, num_steps):
        return 1.0, None

    def to(self, device):
        self.transformer.to(device)

    def check(self, texts):
        pass

    def bundled_prompts(self, split):
        return ["a", "b"]

    def encode(self, texts):
        return {"length": torch.tensor([len(text) for text in texts])}

    def velocity(self, transformer, x, sigma, cond):
        return transformer(x)

    def DECODE(self, latents):
        return latents.sigmoid().float()
'''


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """Backbones that a test registers are removed afterwards."""
    monkeypatch.setattr(BACKBONES, "_objects", dict(BACKBONES._objects))


def members_of(backbone, **changes):
    members = {name: getattr(backbone, name) for name in MEMBERS}
    return types.SimpleNamespace(**{**members, **changes})


def test_the_toy_follows_the_contract():
    toy = Toy()
    assert check_backbone(toy) is toy
    assert {"transformer", "vae", "natural_shift", "load_lora", "decode"} <= set(MEMBERS)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_missing_member_is_named(name):
    backbone = members_of(Toy())
    delattr(backbone, name)
    with pytest.raises(
        ValueError,
        match=rf"^backbone SimpleNamespace \(.*types\.py\): member '{name}' is missing\. ",
    ):
        check_backbone(backbone)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_of_another_type_is_named(name):
    with pytest.raises(ValueError, match=f"member '{name}' is 3.5. Define it as a"):
        check_backbone(members_of(Toy(), **{name: 3.5}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer": nn.Linear(2, 2)}, "'transformer'.* a method save_pretrained"),
        ({"latent_shape": [2, 3]}, r"'latent_shape' is \[2, 3\]. Define it as a tuple of positive"),
        ({"latent_shape": (2, 0)}, r"'latent_shape' is \(2, 0\)"),
        ({"latent_shape": ()}, r"'latent_shape' is \(\)"),
        ({"natural_shift": lambda steps: None}, "'natural_shift' returns None"),
        ({"natural_shift": lambda steps: ("3", None)}, "'natural_shift' returns .*'3'"),
        ({"natural_shift": lambda: 1}, "'natural_shift' raises TypeError: .*argument"),
        ({"bundled_prompts": lambda split: "abc"}, "'bundled_prompts' returns 'abc'"),
        ({"lora_targets": "to_q"}, "'lora_targets' is 'to_q'. Define it as a list of strings"),
        ({"lora_format": dict}, "'lora_format'.* or NoLora"),
        ({"blocks": [nn.Linear(2, 2)]}, "'blocks' contains other modules"),
        ({"embedded_guidance": 1}, "'embedded_guidance' is 1. Define it as a bool"),
        ({"vae": "none"}, "'vae' is 'none'. Define it as a torch.nn.Module or None"),
    ],
)
def test_a_wrong_member_is_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        check_backbone(members_of(Toy(), **changes))


def test_an_error_inside_a_property_is_shown():
    class Broken(Toy):
        @property
        def blocks(self):
            return self.transformer.layers

    with pytest.raises(ValueError, match=r"'blocks' is missing .*no attribute 'layers'"):
        check_backbone(Broken())


def test_a_property_that_raises_another_error():
    class Broken(Toy):
        @property
        def lora_format(self):
            return {}["format"]

    with pytest.raises(ValueError, match=r"member 'lora_format' raises KeyError: 'format'"):
        check_backbone(Broken())


class ToyWithoutExport(nn.Module):
    """A transformer that can be trained, but not exported."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ToyNet()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encode": lambda self, texts: [1]}, r"'encode' returns \[1\]. Define it as a method"),
        ({"encode": lambda self, texts: {}}, "'encode' returns {}"),
        (
            {"encode": lambda self, texts: {"n": torch.zeros(1)}},
            r"'encode' returns {'n': a tensor \[1\] of",
        ),
        ({"encode": lambda self, texts: 1 / 0}, "'encode' raises ZeroDivisionError"),
        (
            {"velocity": lambda self, net, x, sigma, cond: x[:, :1]},
            r"'velocity' returns a tensor \[2, 1, 3\] of float32. .* here \[2, 2, 3\]",
        ),
        ({"velocity": lambda self, net, x, sigma: x}, "'velocity' raises TypeError"),
        ({"decode": lambda self, x: x}, r"'decode' returns a tensor \[1, 2, 3\]"),
        (
            {"decode": lambda self, x: torch.zeros(len(x), 3, 4, 4, dtype=torch.uint8)},
            "'decode' returns .* of uint8. Define it as a method that returns float32 images",
        ),
        ({"decode": lambda self, x: torch.zeros(1, 1, 4, 4)}, r"'decode' returns a tensor \[1, 1,"),
    ],
)
def test_results_are_checked_before_training(tiny, tmp_path, changes, message):
    backbone = type("Wrong", (Toy,), changes)()
    with pytest.raises(
        SettingsError, match=rf"backbone Wrong \({re.escape(__file__)}\): member {message}"
    ):
        Trainer(tiny, tmp_path / "run", backbone=backbone, rewards={"red": red})
    assert not (tmp_path / "run").exists()


def test_a_transformer_without_what_training_needs(tiny, tmp_path):
    backbone = Toy()
    with pytest.raises(ValueError, match=r"'transformer' has no method to_json_string"):
        check_training(backbone, lora=False, sharded=True)
    backbone.lora_targets = ["w1"]
    lora = tiny.with_changes({"lora.rank": 2})
    with pytest.raises(SettingsError, match=r"a method add_adapter, which lora.rank needs"):
        Trainer(lora, tmp_path / "run", backbone=backbone, rewards={"red": red})
    backbone.transformer = ToyWithoutExport()
    with pytest.raises(SettingsError, match=r"'transformer' is ToyWithoutExport.* save_pretrained"):
        Trainer(tiny, tmp_path / "run", backbone=backbone, rewards={"red": red})
    assert not (tmp_path / "run").exists()


def test_a_backbone_without_lora_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"does not support LoRA\. Use lora.rank=0"):
        Toy().load_lora(tmp_path)
    with pytest.raises(ValueError, match="does not support LoRA"):
        Toy.lora_format.save_lora_weights(
            tmp_path, transformer_lora_layers={}, transformer_lora_adapter_metadata={}
        )


def test_a_backbone_from_a_plugin_file(tmp_path):
    (tmp_path / "linear.py").write_text(PLUGIN.replace("DECODE", "decode"))
    load_plugin(tmp_path / "linear.py")
    load_plugin(tmp_path / "linear.py")  # no effect
    assert "linear_toy" in BACKBONES
    model = ModelConfig(name="Linear-Toy", height=16, width=24)
    assert model.name == "linear_toy"
    backbone = load_backbone(model, Dtypes(torch.bfloat16))
    assert backbone.model is model
    assert backbone.transformer.map.weight.dtype == torch.bfloat16
    x = torch.zeros(2, *backbone.latent_shape)
    backbone.transformer.float()
    v = backbone.velocity(backbone.transformer, x, torch.ones(2), backbone.encode(["a", ""]))
    assert v.shape == x.shape
    assert torch.equal(backbone.decode(x), torch.full_like(x, 0.5))
    # Its natural_shift returns a plain pair.
    assert torch.equal(sigma_grid(4, *backbone.natural_shift(4)), sigma_grid(4, 1.0))


def test_an_incomplete_backbone_from_a_plugin_file(tmp_path):
    (tmp_path / "broken.py").write_text(PLUGIN.replace("DECODE", "decoder"))
    load_plugin(tmp_path / "broken.py")
    place = re.escape(str(tmp_path / "broken.py"))
    with pytest.raises(
        ValueError, match=rf"backbone LinearToy \({place}\): member 'decode' is missing"
    ):
        load_backbone(ModelConfig(name="linear_toy"), Dtypes())


def test_a_backbone_that_cannot_be_loaded():
    register_backbone("constant")(type("Constant", (), {}))
    with pytest.raises(ValueError, match=r"constant: <class .* has no class method load"):
        load_backbone(ModelConfig(name="constant"), Dtypes())


def test_names_of_backbones():
    assert list(BACKBONES)[:6] == ["shapes", "sd3", "flux", "flux2", "qwen_image", "zimage"]
    with pytest.raises(SettingsError, match="A backbone named 'flux' already exists"):
        register_backbone("flux")(Toy)
    register_backbone("toy")(Toy)
    assert isinstance(load_backbone(ModelConfig(name="toy"), Dtypes()), Toy)
    with pytest.raises(
        SettingsError, match=r"model.name=sd4: there is no such.*Did you mean 'sd3'"
    ):
        load_backbone(ModelConfig(name="sd4"), Dtypes())


def test_settings_of_the_model():
    fields = ModelConfig.model_fields
    assert all(field.description for field in fields.values())
    kept = {name for name, field in fields.items() if field.json_schema_extra["keep"]}
    assert {"name", "path", "revision", "height", "width", "vae_dtype", "encoder_dtype"} <= kept
    assert ModelConfig(name="Qwen-Image").name == "qwen_image"
    assert ModelConfig(name="new").name == "new"  # A plugin can be loaded later.
    for wrong in (
        {"height": 4},
        {"vae_dtype": "float64"},
        {"long_prompts": "cut"},
        {"weights": "x"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ModelConfig(**wrong)


def test_the_bundled_model(tmp_path):
    backbone = load_backbone(ModelConfig(), Dtypes())
    assert backbone.latent_shape == (4, 8, 8)
    assert backbone.natural_shift(16) == Shift(3.0, terminal=None, sigma_min=None)
    assert len(backbone.blocks) == 4
    texts = backbone.bundled_prompts("train")[:2]
    backbone.check(texts)
    with pytest.raises(
        ValueError, match="prompt 2: the shapes model cannot read the prompt 'a cat'"
    ):
        backbone.check([texts[0], "a cat"])
    cond = backbone.encode([*texts, ""])
    assert {name: tuple(value.shape) for name, value in cond.items()} == {
        "words": (3, 6, 64),
        "pooled": (3, 64),
    }
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = backbone.velocity(backbone.transformer, x, torch.tensor([0.9, 0.5, 0.1]), cond)
    assert v.shape == x.shape
    images = backbone.decode(x)
    assert images.shape == (3, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1

    backbone.save(tmp_path / "copy")
    again = load_backbone(ModelConfig(path=str(tmp_path / "copy")), Dtypes())
    assert torch.equal(again.decode(x), images)
    with pytest.raises(SettingsError, match=r"model.path=.*contains no words.safetensors"):
        load_backbone(ModelConfig(path=str(tmp_path)), Dtypes())
