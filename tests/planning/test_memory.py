"""The memory model, compared with what a policy holds."""

import pytest
import torch

from flowgrain import Trainer
from flowgrain.config import load_config
from flowgrain.models.acceleration import QuantizedCopy
from flowgrain.training.memory import Layout, memory
from flowgrain.training.sizes import model_size

FLUX = {"model.name": "flux", "method.kl_weight": 0.0}


def held_bytes(*modules):
    """Bytes of the distinct parameters of modules."""
    parameters = {p.data_ptr(): p for module in modules for p in module.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values())


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("g2rpo", {"method.kl_weight": 0.1, "training.ema_decay": 0.9}),
        ("g2rpo", {"lora.rank": 4}),
        ("g2rpo", {"runtime.dtype": "bfloat16"}),
        ("g2rpo", {"runtime.dtype": "bfloat16", "lora.rank": 4, "training.ema_decay": 0.9}),
        ("diffusionnft", {"runtime.dtype": "bfloat16"}),
        ("diffusionnft", {"lora.rank": 4}),
    ],
)
def test_a_policy_holds_what_the_model_says(method, changes, tmp_path):
    config = load_config(method, {"evaluation.rewards": [], **changes})
    trainer = Trainer(config, tmp_path)
    policy, size = trainer.policy, model_size(config.model)
    parts = memory(config, size, policy.dtype).parts
    model = held_bytes(policy.model)
    assert parts["weights"] == model
    trained = sum(p.numel() for p in policy.parameters.values())
    assert (parts["gradients"], parts["AdamW"]) == (4 * trained, 8 * trained)
    assert parts.get("EMA", 0) == (0 if policy.ema is None else 4 * trained)
    assert parts.get("reference", 0) == (held_bytes(policy.reference) if policy.reference else 0)
    # Parameters of a copy that are not shared with the model:
    assert parts.get("old policy", 0) == (
        held_bytes(policy.model, policy.old) - model if policy.old else 0
    )
    assert parts.get("sampling copy", 0) == held_bytes(policy.model, policy.sampler) - model
    assert parts["VAE"] == held_bytes(trainer.backbone.vae)


def test_ranks_of_a_context_group_hold_the_latents_of_the_same_prompts():
    config = load_config("flux/g2rpo")
    divided = config.with_changes({"runtime.context_parallel": 2})
    size, dtype = model_size(config.model), torch.bfloat16
    whole, half = (memory(config, size, dtype, gpus).parts["latents"] for gpus in (4, 8))
    assert memory(divided, size, dtype, 8).parts["latents"] == whole == 2 * half


def test_latents_are_those_of_a_rollout(tiny, tmp_path):
    trainer = Trainer(tiny, tmp_path)
    rollout = trainer.collector.collect(1).rollout
    parts = memory(tiny, model_size(tiny.model), torch.float32).parts
    kept = {*rollout.tree.leaves, *rollout.tree.edges, *rollout.tree.trained_parents}
    latent = trainer.backbone.latent_shape
    assert parts["latents"] >= 4 * len(kept) * torch.Size(latent).numel()
    assert parts["latents"] <= 1.2 * 4 * len(kept) * torch.Size(latent).numel()


def test_a_quantized_copy_is_smaller():
    config = load_config("g2rpo", {**FLUX, "sampling.tail_weights": "int8"})
    size = model_size(config.model)
    parts = memory(config, size, torch.bfloat16).parts
    assert size.transformer < parts["quantized copy"] < parts["sampling copy"]
    explore = {"sampling.explore.candidates": 24, "sampling.explore.tail_weights": "int8"}
    for changes, copies in (({}, 1), ({"sampling.explore.tail_cache": "first_block:0.1"}, 2)):
        both = memory(config.with_changes({**explore, **changes}), size, torch.bfloat16).parts
        assert both["quantized copy"] == copies * parts["quantized copy"]
    candidates = memory(load_config("g2rpo", {**FLUX, **explore}), size, torch.bfloat16).parts
    assert candidates["quantized copy"] == parts["quantized copy"]


@pytest.mark.parametrize("changes", [{}, {"runtime.dtype": "bfloat16"}, {"lora.rank": 4}])
def test_a_quantized_copy_has_the_size_of_the_model(tiny, tmp_path, changes):
    config = tiny.with_changes(changes)
    policy, size = Trainer(config, tmp_path).policy, model_size(config.model)
    names = policy.copies.block_names
    quantized = QuantizedCopy(policy.sampler, names, "int8", policy.dtype)
    config = config.with_changes({"sampling.tail_weights": "int8"})
    assert memory(config, size, policy.dtype).parts["quantized copy"] == quantized.size


def test_layouts():
    def layout(gpus, **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        return Layout.of(load_config("g2rpo", {**FLUX, **changes}), gpus)

    assert layout(1) == Layout(lora=False, replica=False, shards=1)
    assert layout(4) == Layout(lora=False, replica=True, shards=4)
    assert layout(16) == Layout(lora=False, replica=True, shards=8)
    lora = {"lora__rank": 32, "optimizer__learning_rate": 1e-4}
    assert layout(8, **lora) == Layout(lora=True, replica=True, shards=1)
    sharded = layout(8, **lora, runtime__rollout_weights="sharded")
    assert sharded == Layout(lora=True, replica=False, shards=8)


def test_sharding_divides_parameters():
    config = load_config("g2rpo", FLUX)
    one, eight = (memory(config, model_size(config.model), torch.bfloat16, n) for n in (1, 8))
    assert eight.parts["weights"] == one.parts["weights"] / 8
    assert eight.parts["AdamW"] == one.parts["AdamW"] / 8
    assert eight.parts["gradients"] == one.parts["gradients"] / 8  # reduced often
    update = config.with_changes({"runtime.gradient_reduction": "update"})
    whole = memory(update, model_size(config.model), torch.bfloat16, 8)
    assert whole.parts["gradients"] == one.parts["gradients"]
    assert eight.parts["sampling copy"] == one.parts["sampling copy"]  # a replica
    assert not one.fits(141e9)
    assert eight.fits(141e9)


def test_a_decoder_with_gradient_is_counted():
    """Per pixel, the decoder of SD3.5 keeps 5.75 thousand numbers, at any size."""

    def held(**changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        config = load_config("refl", {"model.name": "sd3", "lora.rank": 0, **changes})
        return memory(config, model_size(config.model), torch.bfloat16).parts

    kept = held(model__gradient_checkpointing=False)["decoder activations"]
    assert kept == pytest.approx(4 * 5748 * 512 * 512, rel=1e-3)
    assert 0.5 * kept < held()["decoder activations"] < 0.7 * kept
    twice = held(model__gradient_checkpointing=False, method__decode_batch_size=2)
    assert twice["decoder activations"] == 2 * kept
    half = held(model__gradient_checkpointing=False, model__vae_dtype="bfloat16")
    assert half["decoder activations"] == kept / 2
    other = load_config("g2rpo", FLUX)
    assert "decoder activations" not in memory(other, model_size(other.model), torch.float32).parts


def test_the_activations_of_the_bundled_decoder_are_those_that_autograd_saves(tmp_path):
    config = load_config("draft", {"rewards": ["towers"], "evaluation.rewards": []})
    trainer = Trainer(config, tmp_path)
    saved = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = (tensor.numel() * tensor.element_size(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        latents = torch.zeros(1, *trainer.backbone.latent_shape, requires_grad=True)
        trainer.backbone.decode(latents)
    parts = memory(config, model_size(config.model), torch.float32).parts
    total = sum(size for size, _ in saved.values())
    assert total == pytest.approx(parts["decoder activations"], rel=0.1)
