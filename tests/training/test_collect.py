"""Collecting a rollout batch: chunks of prompts, rewards in the background, and batch sizes."""

import functools
import threading

import pytest
import torch
from toy import Toy, green, red

from flowgrain import Trainer
from flowgrain.rewards import Scorer


def brightness(images, prompts):
    return images.mean((1, 2, 3)).tolist()


def less_red(images, prompts):
    return (1 - images[:, 0]).mean((1, 2))


def in_the_foreground(kind, rewards, batch_sizes, background):
    assert background
    return kind(rewards, batch_sizes, background=False)


def test_rewards_of_a_chunk_are_computed_while_the_next_is_sampled(tiny, tmp_path):
    """The reward of the first chunk waits for the second chunk. The numbers are the same."""
    second = threading.Event()
    waited = []

    def patient(images, prompts):
        if not waited:
            waited.append(second.wait(20))
        return brightness(images, prompts)

    config = tiny.with_changes({"training.prompts_per_step": 3})
    chunked = config.with_changes({"sampling.prompts_per_chunk": 2})
    plain = {"mine": brightness, "other": less_red}
    whole = Trainer(config, tmp_path / "a", rewards=plain).collector.collect(1)
    trainer = Trainer(chunked, tmp_path / "b", rewards={"mine": patient, "other": less_red})
    decode, decoded = trainer.backbone.decode, []

    def announced_decode(latents):
        decoded.append(len(latents))
        if sum(decoded) > len(whole.images) * 2 // 3:
            second.set()
        return decode(latents)

    trainer.backbone.decode = announced_decode
    parts = trainer.collector.collect(1)
    assert waited == [True]
    # Other rows share a model call.
    torch.testing.assert_close(parts.images, whole.images, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts.advantage, whole.advantage, atol=1e-3, rtol=0)
    edges = whole.rollout.tree.edges
    torch.testing.assert_close(parts.rollout.at(edges), whole.rollout.at(edges), atol=1e-5, rtol=0)
    inline = Trainer(chunked, tmp_path / "c", rewards=plain)
    with pytest.MonkeyPatch.context() as patch:
        scorer = functools.partial(in_the_foreground, Scorer)
        patch.setattr("flowgrain.training.collect.Scorer", scorer)
        same = inline.collector.collect(1)
    for name in ("mine", "other"):
        assert torch.equal(same.scores[name].values, parts.scores[name].values)
    assert torch.equal(same.advantage, parts.advantage)


def test_batch_sizes_of_models_and_rewards_are_the_settings(tiny):
    config = tiny.with_changes(
        {
            "sampling.batch_size": 5,
            "training.micro_batch_size": 1,
            "rewards": [{"name": "red", "batch_size": 7}, "green"],
        }
    )
    calls = {"red": [], "green": [], "velocity": [], "gradient": []}

    def counted(name, reward):
        def count(images, prompts):
            calls[name].append(len(images))
            return reward(images, prompts)

        return count

    class Counting(Toy):
        def velocity(self, transformer, x, sigma, cond):
            calls["gradient" if torch.is_grad_enabled() else "velocity"].append(len(x))
            return super().velocity(transformer, x, sigma, cond)

    rewards = {"red": counted("red", red), "green": counted("green", green)}
    trainer = Trainer(config, backbone=Counting(), rewards=rewards)
    metrics = trainer.step(1)
    assert metrics["decodes"] == 26
    assert calls["red"] == [7, 7, 7, 5]
    assert calls["green"] == [26]
    assert max(calls["velocity"]) == 5
    assert set(calls["gradient"]) == {1}


@pytest.mark.parametrize("mix", ["advantage", "reward"])
def test_weights_of_rewards_scale_their_part_of_the_total(tiny, mix):
    """Weights 1 and nearly 0 of two rewards give the advantages of the first alone."""
    changes = {"method.reward_mix": mix, "rewards": ["red", {"name": "green", "weight": 1e-9}]}
    both = Trainer(tiny.with_changes(changes), backbone=Toy(), rewards={"red": red, "green": green})
    one = Trainer(
        tiny.with_changes({"method.reward_mix": mix}), backbone=Toy(), rewards={"red": red}
    )
    advantage = both.collector.collect(1).advantage
    torch.testing.assert_close(advantage, one.collector.collect(1).advantage, atol=1e-6, rtol=0)


def test_images_can_be_decoded_in_smaller_batches(tiny, tmp_path):
    """A large VAE needs more memory than sampling. The batch has no effect on the images."""
    trainers = [Trainer(tiny, tmp_path / "a")]
    trainers.append(Trainer(tiny.with_changes({"sampling.decode_batch_size": 2}), tmp_path / "b"))
    decoded = [[], []]
    for trainer, sizes in zip(trainers, decoded, strict=True):
        decode = trainer.backbone.decode
        trainer.backbone.decode = functools.partial(recorded, decode, sizes)
    whole, small = (trainer.collector.collect(1) for trainer in trainers)
    assert max(decoded[1]) == 2 < max(decoded[0])
    assert sum(decoded[0]) == sum(decoded[1])
    torch.testing.assert_close(small.images, whole.images, atol=1e-5, rtol=0)
    evaluation = trainers[1].evaluate(num_steps=2, num_images=4)
    assert len(evaluation.images) == 4
    assert decoded[1][-2:] == [2, 2]


def recorded(decode, sizes, latents):
    sizes.append(len(latents))
    return decode(latents)
