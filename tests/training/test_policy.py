"""The policy and its copies: reference, sampler in bfloat16, EMA, guidance, and the export."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from toy import Toy, red

from flowgrain import SettingsError, Trainer
from flowgrain.models.shapes import WEIGHTS, ShapesBackbone
from flowgrain.training.policy import Policy


@pytest.mark.parametrize("rank", [0, 4])
def test_reference_guidance_and_kl(tiny, tmp_path, rank):
    changes = {
        "method.kl_weight": 0.1,
        "lora.rank": rank,
        "sampling.guidance_scale": 2.0,
        "optimizer.learning_rate": 1e-2,
    }
    trainer = Trainer(tiny.with_changes(changes), tmp_path)
    model = trainer.policy.model
    base = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    assert trainer.step(1)["kl"] == pytest.approx(0, abs=1e-9)
    assert trainer.step(2)["kl"] > 0
    if rank:
        for name, parameter in model.named_parameters():
            assert "lora" in name or torch.equal(parameter, base[name]), name


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"lora.rank": 4}, 2.0),  # alpha defaults to twice the rank
        ({"lora.rank": 4, "lora.alpha": 4.0}, 1.0),
        ({"lora.rank": 8, "lora.alpha": 4.0}, 0.5),
    ],
)
def test_rank_and_alpha_of_the_adapter(tiny, changes, scale):
    policy = Trainer(tiny.with_changes(changes)).policy
    shapes = {min(parameter.shape) for parameter in policy.parameters.values()}
    assert shapes == {changes["lora.rank"]}
    layer = policy.model.transformer_blocks[0].attn.to_q
    assert layer.scaling["default"] == scale
    assert policy.reference is None
    assert policy.sampler is policy.model


def test_bfloat16_sampling_keeps_float32_master_parameters(tiny, tmp_path):
    trainer = Trainer(tiny.with_changes({"runtime.dtype": "bfloat16"}), tmp_path)
    metrics = trainer.step(1)
    policy = trainer.policy
    assert metrics["ratio/max"] == 1
    assert {p.dtype for p in policy.parameters.values()} == {torch.float32}
    assert {p.dtype for p in policy.sampler.parameters()} == {torch.bfloat16}
    pairs = zip(policy.sampler.parameters(), policy.model.parameters(), strict=True)
    assert all(torch.equal(a, b.bfloat16()) for a, b in pairs)


@pytest.mark.parametrize("changes", [{}, {"lora.rank": 4, "training.checkpoint_every": 1}])
def test_float16_scales_the_loss(tiny, tmp_path, changes):
    """The gradient is that of float32 training, up to rounding: within 10%."""
    config = tiny.with_changes({"runtime.dtype": "float16", **changes})
    trainer = Trainer(config, tmp_path / "whole")
    metrics = trainer.step(1)
    assert metrics["ratio/max"] == 1
    assert metrics["updates/skipped"] == 0
    assert metrics["grad_norm"] > 0
    parameters = trainer.policy.parameters
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    stored = {p.dtype for p in trainer.policy.sampler.parameters() if not p.requires_grad}
    assert stored == {torch.float16}
    scaler = trainer.optimizer.scaler
    assert scaler.get_scale() == 65536
    exact = Trainer(tiny.with_changes(changes), tmp_path / "exact")
    assert metrics["grad_norm"] == pytest.approx(exact.step(1)["grad_norm"], rel=0.1)


def test_float16_lowers_the_scale_when_gradients_overflow(tiny, tmp_path):
    config = tiny.with_changes({"runtime.dtype": "float16", "lora.rank": 2})
    trainer = Trainer(config, tmp_path)
    optimizer = trainer.optimizer
    before = [p.detach().clone() for p in trainer.policy.parameters.values()]
    for _ in range(20):
        optimizer.backward(sum(p.sum() for p in trainer.policy.parameters.values()) * 1e38)
        assert optimizer.step([torch.zeros(())])[1]
    # 65536 is halved 16 times before it counts as a sign of divergence.
    assert optimizer.scaler.get_scale() == 65536 / 2**20
    assert optimizer.skipped_in_a_row == 4
    after = trainer.policy.parameters.values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.scaler.state_dict()["_growth_tracker"] == 0
    trainer.save(None)
    again = Trainer(config, tmp_path)
    again.restore()
    assert again.optimizer.scaler.get_scale() == 65536 / 2**20


def test_float16_counts_updates_with_a_broken_loss(tiny, tmp_path):
    """The scale is not the reason for a NaN loss."""
    trainer = Trainer(tiny.with_changes({"runtime.dtype": "float16"}), tmp_path)
    optimizer = trainer.optimizer
    for _ in range(3):
        optimizer.backward(sum(p.sum() for p in trainer.policy.parameters.values()))
        assert optimizer.step([torch.tensor(float("nan"))])[1]
    assert optimizer.diverged
    assert optimizer.scaler.get_scale() == 65536


def test_layers_that_take_lora(tiny):
    targets = ["attn.to_q", "attn.to_v"]
    policy = Trainer(tiny.with_changes({"lora.rank": 2, "lora.target_modules": targets})).policy
    assert {".".join(name.split(".")[2:4]) for name in policy.parameters} == set(targets)
    with pytest.raises(SettingsError) as error:
        Trainer(tiny.with_changes({"lora.rank": 2, "lora.target_modules": ["to_z"]}))
    message = str(error.value)
    assert message.startswith("lora.target_modules=to_z: no linear layer of the model")
    assert "Did you mean 'to_out.0'?" in message
    partly = {"lora.rank": 2, "lora.target_modules": ["attn.to_q", "attn.to_kk"]}
    with pytest.raises(SettingsError, match=r"target_modules=attn\.to_kk: .*'attn\.to_k'"):
        Trainer(tiny.with_changes(partly))


def test_an_ema_swap_restores_the_trained_parameters(tiny, tmp_path):
    changes = {"training.ema_decay": 0.9, "optimizer.learning_rate": 1e-2}
    trainer = Trainer(tiny.with_changes(changes), tmp_path)
    trainer.step(1)
    trainer.step(2)
    parameters = trainer.policy.parameters
    before = {name: p.clone() for name, p in parameters.items()}
    with trainer.policy.averaged():
        assert any(not torch.equal(p, before[name]) for name, p in parameters.items())
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_the_ema_is_updated_every_few_updates(tiny, tmp_path):
    changes = {
        "training.ema_decay": 0.9,
        "training.ema_every": 3,
        "method.updates_per_rollout": 2,
        "optimizer.learning_rate": 1e-2,
    }
    trainer = Trainer(tiny.with_changes(changes), tmp_path, backbone=Toy(), rewards={"red": red})
    ema, seen = trainer.policy.ema, []
    for step in (1, 2, 3):
        trainer.step(step)
        seen.append(ema.optimization_step)
    assert seen == [0, 3, 6]  # after 2, 4 and 6 updates
    # Flow-GRPO's code: min((1 + n) / (10 + n), decay), with n updates before this one.
    assert [ema.get_decay(updates) for updates in (3, 6)] == [3 / 12, 6 / 15]


@pytest.mark.parametrize("rank", [0, 4])
def test_the_export_loads_in_plain_diffusers(tiny, tmp_path, rank):
    changes = {"lora.rank": rank, "optimizer.learning_rate": 1e-2}
    trainer = Trainer(tiny.with_changes(changes), tmp_path)
    trainer.step(1)
    trainer.step(2)
    ours = trainer.sample(["three green circles"], num_steps=4)
    folder = trainer.export()
    if rank:
        plain = SD3Transformer2DModel.from_pretrained(WEIGHTS / "transformer")
        plain.load_lora_adapter(str(folder / "lora"), prefix="transformer", use_safetensors=True)
    else:
        plain = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    backbone = ShapesBackbone.load()
    backbone.transformer = plain.eval()
    fresh = Trainer(tiny, tmp_path / "other", backbone=backbone)
    again = fresh.sample(["three green circles"], num_steps=4)
    torch.testing.assert_close(again, ours, atol=1e-5, rtol=0)
    base = Trainer(tiny, tmp_path / "base").sample(["three green circles"], num_steps=4)
    assert (base - ours).abs().max() > 1e-3


def test_embedded_guidance_is_part_of_the_conditioning(tiny, tmp_path):
    """A backbone like FLUX.1-dev: the scale is an input, and a row is one forward pass."""
    seen = []

    class Embedded(ShapesBackbone):
        embedded_guidance = True

        def velocity(self, transformer, x, sigma, cond):
            seen.append(cond["guidance"])
            return super().velocity(transformer, x, sigma, cond)

    config = tiny.with_changes({"sampling.guidance_scale": 3.5})
    trainer = Trainer(config, tmp_path, backbone=Embedded.load())
    seen.clear()  # the check of the backbone
    metrics = trainer.step(1)
    assert all((scale == 3.5).all() for scale in seen)
    passes = metrics["forward_passes"] + metrics["train_forward_passes"]
    assert sum(len(scale) for scale in seen) == passes


def test_evaluation_may_use_another_guidance_scale(tiny, tmp_path):
    changes = {"sampling.guidance_scale": 2.0, "evaluation.guidance_scale": 1.0}
    own = Trainer(tiny.with_changes(changes), tmp_path)
    same = Trainer(tiny.with_changes({"sampling.guidance_scale": 2.0}), tmp_path)
    without = Trainer(tiny, tmp_path)
    images = [t.sample(["two red circles"]) for t in (own, same, without)]
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])


def test_copies_that_do_not_exist_are_errors(tiny):
    trainer = Trainer(tiny, backbone=Toy(), rewards={"red": red})
    inputs = torch.zeros(1, 2, 3), torch.ones(1), {"number": torch.zeros(1)}, 1.0
    with pytest.raises(RuntimeError, match="needs no reference"):
        trainer.policy.reference_velocity(*inputs)
    with pytest.raises(RuntimeError, match="no old copy"):
        trainer.policy.old_velocity(*inputs)


def test_lora_needs_a_backbone_that_supports_it(tiny):
    with pytest.raises(SettingsError, match=r"lora\.rank=2: .*Use lora\.rank=0"):
        Trainer(tiny.with_changes({"lora.rank": 2}), backbone=Toy(), rewards={"red": red})


def test_a_policy_that_only_samples_has_one_transformer(tiny):
    config = tiny.with_changes({"runtime.dtype": "bfloat16", "training.ema_decay": 0.9})
    policy = Policy.for_sampling(config, ShapesBackbone.load(), torch.device("cpu"))
    assert len(policy.copies.distinct()) == 1
    assert policy.ema is None
    assert not policy.parameters
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
