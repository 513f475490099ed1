"""Feature caches and quantized copies: less work, small errors, and the model stays as it was."""

import sys
from pathlib import Path

import pytest
import torch
import twins
from toy import ToyNet

from flowgrain import SettingsError
from flowgrain.models import Dtypes, ModelConfig, load_backbone, take
from flowgrain.models.acceleration import QuantizedCopy, check_tails, feature_cache

ASIDE = Path(sys.prefix) / "aside"
CPU = torch.device("cpu")


@pytest.fixture
def torchao(monkeypatch):
    """torchao, which is installed into a separate directory."""
    monkeypatch.syspath_prepend(ASIDE)
    return pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """All backbones by name, the published ones as tiny twins."""
    root = tmp_path_factory.mktemp("twins")
    twins.save_all(root)
    size = {"height": 32, "width": 48, "max_prompt_tokens": 32}
    configs = {"shapes": ModelConfig()}
    for name in ("sd3", "flux", "flux2", "qwen_image", "zimage"):
        configs[name] = ModelConfig(name=name, path=str(root / name), **size)
    return {name: load_backbone(config, Dtypes()) for name, config in configs.items()}


class Trajectory:
    """Euler steps of a batch with a model of a backbone."""

    def __init__(self, backbone, steps=8):
        self.backbone, self.sigmas = backbone, torch.linspace(0.9, 0.0, steps + 1)
        texts = (backbone.bundled_prompts("train") or ["a red cat", "two dogs"])[:2]
        self.cond = take(backbone.encode(texts), torch.tensor([0, 0, 1]))
        if backbone.embedded_guidance:
            self.cond["guidance"] = torch.full((3,), 3.5)
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(3, *backbone.latent_shape, generator=generator)

    def velocity(self, model, x, sigma):
        return self.backbone.velocity(model, x, sigma.expand(len(x)), self.cond)

    @torch.no_grad()
    def run(self, model, step=None):
        """The latents of all steps [steps, 3, *L]."""
        x, states = self.noise, []
        for number, (sigma, end) in enumerate(zip(self.sigmas[:-1], self.sigmas[1:], strict=True)):
            if step is None:
                v = self.velocity(model, x, sigma)
            else:
                with step(number > 0):
                    v = self.velocity(model, x, sigma)
            x = x + (end - sigma) * v
            states.append(x)
        return torch.stack(states)


def count_calls(backbone):
    """A list that gets one entry per call of an attention layer of the last block, and its hook."""
    attention = next(
        module
        for name, module in backbone.blocks[-1].named_modules()
        if "att" in name and isinstance(module, torch.nn.Linear)
    )
    calls = []
    return calls, attention.register_forward_hook(lambda *_: calls.append(1))


CACHES = [
    *(
        (name, "taylorseer:2")
        for name in ("shapes", "sd3", "flux", "flux2", "qwen_image", "zimage")
    ),
    ("shapes", "taylorseer:3"),
    *((name, "first_block:0.9") for name in ("flux", "qwen_image")),
]


@pytest.mark.parametrize(("name", "setting"), CACHES)
def test_a_cache_saves_calls_and_leaves_no_trace(backbones, name, setting):
    backbone = backbones[name]
    model, trajectory = backbone.transformer, Trajectory(backbones[name])
    kind = type(model)
    calls, hook = count_calls(backbone)
    exact = trajectory.run(model)
    steps = len(calls)
    assert steps == 8
    with feature_cache(model, setting) as step:
        first = trajectory.run(model, step)
        cached = len(calls) - steps
        again = trajectory.run(model, step)  # The cache is cleared at the start of a trajectory.
    assert cached < 0.8 * steps
    assert torch.equal(first, again)
    assert torch.equal(first[0], exact[0])  # The first step is always exact.
    error = (first - exact).norm() / exact.norm()
    assert 0 < error < 0.2
    assert type(model) is kind
    calls.clear()
    assert torch.equal(trajectory.run(model), exact)
    assert len(calls) == steps
    hook.remove()


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_a_cache_with_threshold_zero_is_exact(backbones, name):
    trajectory = Trajectory(backbones[name])
    model = backbones[name].transformer
    exact = trajectory.run(model)
    with feature_cache(model, "first_block:0.0") as step:
        assert torch.equal(trajectory.run(model, step), exact)


def test_no_cache(backbones):
    trajectory = Trajectory(backbones["shapes"])
    model = backbones["shapes"].transformer
    with feature_cache(model, "none") as step:
        assert torch.equal(trajectory.run(model, step), trajectory.run(model))


def test_caches_of_different_kinds_after_each_other(backbones):
    """Each cache finds its own layers. An error inside the context also removes the hooks."""
    trajectory = Trajectory(backbones["flux"])
    model = backbones["flux"].transformer
    exact = trajectory.run(model)
    results = {}
    for setting in ("first_block:0.9", "taylorseer:3", "taylorseer:2", "first_block:0.9"):
        with feature_cache(model, setting) as step:
            result = trajectory.run(model, step)
        assert not torch.equal(result, exact)
        assert torch.equal(results.setdefault(setting, result), result)

    def fail():
        with feature_cache(model, "taylorseer:2") as step, step(False):
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert torch.equal(trajectory.run(model), exact)


def names_of_blocks(backbone):
    modules = backbone.transformer.named_modules()
    return [name for name, m in modules if any(m is block for block in backbone.blocks)]


def relative_error(trajectory, copy, expected):
    dtype = copy.dtype
    x, sigma = trajectory.noise.to(dtype), trajectory.sigmas[2]
    with torch.no_grad():
        v = trajectory.velocity(copy.model, x, sigma).float()
    return float((v - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["shapes", "sd3", "flux", "flux2", "qwen_image", "zimage"])
def test_a_quantized_copy_follows_updates(backbones, torchao, name):
    """Symmetric int8 per row has an error of about 1%, also with the reduced range without VNNI."""
    backbone, trajectory = backbones[name], Trajectory(backbones[name])
    model = backbone.transformer
    copy = QuantizedCopy(model, names_of_blocks(backbone), "int8", torch.float32)
    assert len(copy.layers) >= 6 * len(backbone.blocks)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert copy.size < whole
    copy.to(CPU)
    assert copy.size < whole
    for layer in copy.layers:
        assert type(copy.model.get_submodule(layer).weight).__name__ != "Parameter"
        assert type(model.get_submodule(layer).weight).__name__ == "Parameter"

    def exact(parameters):
        with torch.no_grad():
            arguments = (trajectory.noise, trajectory.sigmas[2].expand(3), trajectory.cond)
            saved = {n: p.clone() for n, p in model.named_parameters()}
            for n, p in model.named_parameters():
                p.copy_(parameters[n])
            v = backbone.velocity(model, *arguments)
            for n, p in model.named_parameters():
                p.copy_(saved[n])
        return v

    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    new = {n: p * 1.1 if p.ndim == 2 else p for n, p in old.items()}
    before, after = exact(old), exact(new)
    moved = float((after - before).norm() / before.norm())
    assert moved > 0.05
    assert 0 < relative_error(trajectory, copy, before) < 0.05
    copy.update(new)
    assert 0 < relative_error(trajectory, copy, after) < min(0.05, moved / 2)
    other = QuantizedCopy(model, names_of_blocks(backbone), "int8", torch.float32).to(CPU)
    other.update(new)
    assert relative_error(trajectory, other, after) == relative_error(trajectory, copy, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_copy_keeps_lora_layers(torchao, dtype):
    from peft import LoraConfig

    backbone = load_backbone(ModelConfig(), Dtypes())
    trajectory, model = Trajectory(backbone), backbone.transformer
    adapter = LoraConfig(r=2, init_lora_weights="gaussian", target_modules=backbone.lora_targets)
    model.add_adapter(adapter)
    copy = QuantizedCopy(model, names_of_blocks(backbone), "int8", dtype).to(CPU)
    assert not [layer for layer in copy.layers if "lora_" in layer]
    assert [layer for layer in copy.layers if layer.endswith("base_layer")]
    lora = {n: p for n, p in model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for parameter in lora.values():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        arguments = (trajectory.noise, trajectory.sigmas[2].expand(3), trajectory.cond)
        expected = backbone.velocity(model, *arguments)
    assert relative_error(trajectory, copy, expected) > 0.05
    copy.update(lora)
    assert 0 < relative_error(trajectory, copy, expected) < 0.05
    for name, parameter in lora.items():
        assert torch.equal(copy.model.get_parameter(name), parameter.to(dtype))


def test_int8_products_are_exact_in_the_reduced_range():
    """The range that is used if products saturate: -64..63 is exact with every kernel."""
    for value in (-64, 63):
        a = torch.full((8, 64), value, dtype=torch.int8)
        b = torch.full((64, 8), value, dtype=torch.int8)
        assert torch.equal(torch._int_mm(a, b), a.int() @ b.int())


def check(model, tail_cache="none", tail_weights="same", sharded=False):
    check_tails(
        tail_cache=tail_cache,
        tail_weights=tail_weights,
        model=model,
        device=CPU,
        sharded=sharded,
    )


def test_settings_that_cannot_be_used(backbones, monkeypatch):
    sd3, flux = backbones["sd3"].transformer, backbones["flux"].transformer
    check(sd3, sharded=True)
    check(flux, "first_block:0.1")
    check(sd3, "taylorseer:3")
    remedy = (
        r"the weights are sharded\. Set runtime\.rollout_weights=replica, or remove this setting\."
    )
    with pytest.raises(SettingsError, match=rf"sampling.tail_cache=taylorseer:3: .*{remedy}"):
        check(sd3, "taylorseer:3", sharded=True)
    with pytest.raises(SettingsError, match=rf"sampling.tail_weights=int8: .*{remedy}"):
        check(sd3, tail_weights="int8", sharded=True)
    with pytest.raises(
        SettingsError, match=r"tail_cache=first_block:0\.1: .* support SD3Trans.*3\."
    ):
        check(sd3, "first_block:0.1")
    with pytest.raises(SettingsError, match=r"taylorseer:2: ToyNet has no attention .* Use none"):
        check(ToyNet(), "taylorseer:2")
    with pytest.raises(
        SettingsError, match=r"int8: the blocks of ToyNet have no attention .* same"
    ):
        QuantizedCopy(ToyNet(), [], "int8", torch.float32)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    check(sd3, tail_weights="int8")
    with pytest.raises(SettingsError, match=r"needs a GPU of compute capability 8\.9 .* not cpu\."):
        check(sd3, tail_weights="float8")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"torchao is not installed.*'flowgrain\[quantize\]'"):
        check(sd3, tail_weights="int8")
