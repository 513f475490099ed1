"""Methods that train on finished images: draws, anchors, and losses of whole groups."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_trainer import SEED, STEP, P, compare_gradients, toy_config, toy_trainer

from flowgrain.config import load_config
from flowgrain.core.regression import (
    Noised,
    Quantities,
    crd_loss,
    dgpo_loss,
    dpo_loss,
    flow_awr_energy,
    group_softmax,
    linearized,
    ram_loss,
    squared_error,
)
from flowgrain.core.sde import sigma_grid
from flowgrain.data import latent_noise
from flowgrain.methods import METHODS, ForwardProcess, Repair
from flowgrain.settings import SettingsError
from flowgrain.training.step import rollout_loss, update

EXACT = [name for name in METHODS if issubclass(METHODS.get(name), ForwardProcess)]
FORWARD = [name for name in EXACT if not issubclass(METHODS.get(name), Repair)]
"""The methods that add noise to images again."""
OPTIONS = {
    "awm-image": ("awm", {"method.ratio": "image", "method.updates_per_rollout": 2}),
    "awm-elbo": ("awm", {"method.kl_weighting": "elbo", "method.weighting": "t_squared"}),
    "awm-huber": ("awm", {"method.weighting": "huber", "method.updates_per_rollout": 3}),
    "ram-trained": ("ram", {"method.residual": "trained", "method.eta": 0.5}),
    "flowawr-hard": ("flowawr", {"method.gating": "hard", "method.logit_clip": 2.0}),
    "vgrpo-two": ("vgrpo", {"method.updates_per_rollout": 2, "method.shared_draws": False}),
    "dgpo-slow": ("dgpo", {"method.anchor": "slow", "method.clip_kl": True, "method.beta": 3.0}),
    "dgpo-no-clip": ("dgpo", {"method.clip_range": None, "method.levels": "uniform"}),
    "crd-softmax": ("crd", {"method.temperature": 0.5, "method.matching": "bce"}),
    "crd-plain": ("crd", {"method.normalized_error": False, "method.adaptive_kl": False}),
    "dpo-guided": ("diffusion_dpo", {"sampling.guidance_scale": 3.0, "method.beta": 5.0}),
    "diffusionnft-two": ("diffusionnft", {"method.updates_per_rollout": 2}),
}
CASES = {name: (name, {}) for name in FORWARD} | OPTIONS


def moved_trainer(name, out, changes=None):
    """A trainer whose trained policy is neither the old policy nor the reference."""
    method, options = CASES[name]
    config = toy_config(method, {"method.tail_order": 1, **options, **(changes or {})})
    trainer = toy_trainer(config, out)
    with torch.no_grad():
        for p in trainer.policy.model.parameters():
            p += 0.05 * torch.sin(torch.arange(p.numel()).reshape(p.shape))
    trainer.policy.refresh()
    return trainer


def draws_of(trainer, batch):
    """Noise levels, noises and images [I, N, ...] of a batch, written without the trainer's code.

    Every draw is derived from the number of the image, or of the group if draws are shared.
    """
    method, sigmas = trainer.method, trainer.sigmas.numpy()
    leaves, prompt = batch.tree.leaves, batch.tree.prompt[batch.tree.leaves]
    owner = prompt if method.shares_draws else np.arange(len(leaves))
    kind = "forward of group" if method.shares_draws else "forward"
    random = np.random.default_rng([SEED, STEP])
    levels = method.draw_levels(random, len(set(owner.tolist())), sigmas)
    x0 = batch.rollout.at(leaves)
    eps = [
        torch.stack([latent_noise((2, 3), kind, SEED, STEP, o, int(n)) for n in levels.number[o]])
        for o in owner.tolist()
    ]
    return torch.from_numpy(levels.sigma[owner]), torch.stack(eps), x0, prompt


def noised_inputs(trainer, batch, images):
    """Inputs of the velocities for the draws of `images`, and their targets u."""
    sigma, eps, x0, prompt = draws_of(trainer, batch)
    n = sigma.shape[1]
    x0, eps, t = x0[images].repeat_interleave(n, 0), eps[images].flatten(0, 1), sigma[images]
    t = t.flatten()
    state = (1 - t)[:, None, None] * x0 + t[:, None, None] * eps
    row_prompt = torch.from_numpy(prompt)[images].repeat_interleave(n)
    cond = {key: value[row_prompt] for key, value in batch.cond.items()}
    guided = trainer.method.trains_guided
    guidance = trainer.config.sampling.guidance_scale if guided else 1.0
    return (state, t, cond, guidance), eps - x0


def whole_loss(trainer, batch, images, start):
    """The mean loss of the draws of `images`, in one graph.

    Args:
        start: quantities [I, N] of the trained policy before the first update.
    """
    method, policy = trainer.method, trainer.policy
    inputs, target = noised_inputs(trainer, batch, images)
    n = method.num_levels(trainer.config.sampling.num_steps)
    prompt = batch.tree.prompt[batch.tree.leaves]
    reference = policy.reference_velocity(*inputs) if method.needs_reference else None
    old = policy.old_velocity(*inputs) if method.needs_old else None
    v = policy.train_velocity(*inputs)
    advantage = batch.advantage[images]
    x = Noised(v, target, inputs[1], advantage.repeat_interleave(n), old, reference)
    quantity = method.quantity(x)
    before = quantity.detach() if start is None else start[images].flatten()
    if method.compares_slow:
        before = method.quantity(replace(x, v=old))
    x = replace(x, old_quantity=before)
    if method.reduces:
        group = torch.from_numpy(np.unique(prompt[images], return_inverse=True)[1])
        anchor = None
        if method.reduces_reference:
            anchor = method.quantity(replace(x, v=reference)).reshape(-1, n)
        q = Quantities(quantity.reshape(-1, n), before.reshape(-1, n), anchor, advantage, group)
        loss = method.group_loss(q).flatten()
    else:
        loss = method.loss(x)
    added = method.regularizer(x)
    return (loss if added is None else loss + added).mean(), quantity.detach().reshape(-1, n)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_one_graph_at_any_batch_size(name, size, tmp_path, monkeypatch):
    changes = {"training.micro_batch_size": size, "method.kl_weight": 0.2}
    trainer = moved_trainer(name, tmp_path, changes)
    batch = trainer.collector.collect(STEP)
    shares = rollout_loss(
        trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas
    ).updates
    leaves = batch.tree.leaves
    every = np.arange(len(leaves))
    with torch.no_grad():
        start = whole_loss(trainer, batch, every, None)[1]

    def naive(number):
        images = np.searchsorted(leaves, shares[number].rows)
        return whole_loss(trainer, batch, images, start if number else None)[0]

    distances = compare_gradients(trainer, monkeypatch, naive)
    metrics = update(
        trainer.config, trainer.method, trainer.policy, trainer.optimizer, batch, trainer.sigmas
    )
    assert len(distances) == len(shares)
    # float32: the two-pass gradient rounds every row once more.
    assert max(distances) < 2e-4
    trained = sum(len(share.rows) for share in shares)
    assert trained == (2 * P if trainer.method.name == "diffusion_dpo" else len(leaves))
    assert metrics["train_forward_passes"] == trained * len(start[0])


@pytest.mark.parametrize("name", FORWARD)
def test_draws_are_shared_by_the_group_or_not(name, tmp_path):
    if "shared_draws" not in METHODS.get(name).model_fields:
        return
    for shared in (True,) if name == "diffusion_dpo" else (False, True):
        changes = {"method.shared_draws": shared, "method.levels": "uniform"}
        trainer = moved_trainer(name, tmp_path, changes)
        batch = trainer.collector.collect(STEP)
        losses = rollout_loss(trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas)
        rows = [losses._rows(0, place) for place in range(len(losses.updates[0].micro_batches))]
        x, sigma = (torch.cat([row.inputs[place] for row in rows]) for place in (0, 1))
        noise = x + (1 - sigma)[:, None, None] * torch.cat([row.target for row in rows])
        n = losses.num_draws
        for values, same in ((sigma, shared or name == "crd"), (noise[:, 0, 0], shared)):
            counted = values[: len(losses.updates[0].rows) * n].reshape(P, -1, n)
            assert torch.allclose(counted, counted[:, :1], rtol=0, atol=1e-5) == same


@pytest.mark.parametrize("levels", ["binned_grid", "grid", "uniform"])
@pytest.mark.parametrize("num_steps", [10, 20, 28])
def test_the_images_of_a_group_have_the_same_levels_in_crd(num_steps, levels):
    method = METHODS.get("crd")(levels=levels, group_size=4)
    sigmas = sigma_grid(num_steps, 3.0).numpy()
    found = method.draw_levels(np.random.default_rng(0), 12, sigmas)
    groups = found.sigma.reshape(3, 4, -1)
    assert (groups == groups[:, :1]).all()
    assert found.number.shape == found.sigma.shape
    if num_steps > 10 or levels != "binned_grid":  # with 10 steps, every bin has one level
        assert (groups[0] != groups[1]).any()


def test_the_anchors_of_a_method_exist_only_if_it_needs_them(tmp_path):
    for name, changes, old, reference in (
        ("vgrpo", {"method.kl_weight": 0.0}, False, False),
        ("awm", {"method.ema_weight": 0.0, "method.kl_weight": 0.0}, False, False),
        ("awm", {}, True, True),
        ("ram", {"method.residual": "trained", "method.kl_weight": 0.0}, False, True),
        ("dgpo", {"method.anchor": "slow", "method.kl_weight": 0.0}, True, False),
        ("diffusionnft", {"method.kl_weight": 0.0}, True, False),
        ("diffusion_dpo", {"method.kl_weight": 0.0}, True, False),
    ):
        policy = toy_trainer(toy_config(name, changes), tmp_path / name).policy
        assert (policy.old is not None, policy.reference is not None) == (old, reference), name


def test_who_samples(tmp_path):
    """With an old policy that only anchors, the trained policy samples."""
    for name, samples in (("diffusionnft", True), ("flowawr", True), ("diffusion_dpo", True)):
        assert METHODS.get(name)().old_samples == samples
    trainer = moved_trainer("awm", tmp_path)
    cond = trainer.policy.encode(["zero"])
    inputs = (torch.ones(1, 2, 3), torch.full((1,), 0.5), cond, 1.0)
    sampled = trainer.policy.rollout_velocity(*inputs)
    torch.testing.assert_close(sampled, trainer.policy.train_velocity(*inputs).detach())
    assert not torch.equal(sampled, trainer.policy.old_velocity(*inputs))


def test_sft_trains_the_images_with_the_highest_reward():
    config = load_config("sft", {"method.group_size": 4, "optimizer.learning_rate": 1e-3})
    tree = config.tree().repeat(3)
    nan = float("nan")
    rewards = torch.tensor([0.1, 0.7, nan, 0.7, 0.5, 0.5, 0.5, 0.5, nan, nan, nan, nan])
    weights = config.method.credit(tree, rewards, config.method.normalization())
    assert weights.tolist() == [0, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]


# ------------------------------------------------------------------------------ Diffusion-DPO


def naive_dpo(q, best, worst, beta):
    """-log sigmoid(-beta / 2 [(l_w - l_ref,w) - (l_l - l_ref,l)]) of every draw."""
    better, worse = (q.trained[i] - q.reference[i] for i in (best, worst))
    return -torch.nn.functional.logsigmoid(-beta / 2 * (better - worse))


def test_the_loss_of_a_pair_does_not_depend_on_its_order():
    torch.manual_seed(0)
    trained, reference = torch.rand(6, 5).requires_grad_(), torch.rand(6, 5)
    advantage, group = (
        torch.tensor([0.3, 2.0, -1.0, -1.5, 0.7, 0.7]),
        torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    q = Quantities(trained, reference, reference, advantage, group)
    loss = dpo_loss(q, 3.0)
    pairs = torch.stack([naive_dpo(q, 1, 0, 3.0), naive_dpo(q, 2, 3, 3.0)])
    torch.testing.assert_close(loss[:4], pairs.repeat_interleave(2, 0))
    assert (loss[4:] == 0).all()  # equal rewards
    ours = torch.autograd.grad(loss.mean(), trained, retain_graph=True)[0]
    theirs = torch.autograd.grad(pairs.sum() / 15, trained)[0]
    torch.testing.assert_close(ours, theirs)


@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 3), st.integers(0, 2**31))
def test_a_pair_is_the_best_and_the_worst_image(size, groups, different, seed):
    advantage = torch.randint(different + 1, (groups * size,), generator=torch.manual_seed(seed))
    group = torch.arange(groups).repeat_interleave(size)
    chosen = METHODS.get("diffusion_dpo")().selected(advantage.float(), group)
    for number in range(groups):
        of_group, values = chosen[group == number], advantage[group == number]
        assert of_group.sum() == 2
        assert sorted(values[of_group].tolist()) == [values.min(), values.max()]


def test_a_prompt_without_a_best_image_has_no_gradient(tmp_path):
    """Its draws count, so that the number of forward passes does not depend on the rewards."""
    changes = {"method.kl_weight": 0.0, "method.draws": 3}
    trainer = moved_trainer("diffusion_dpo", tmp_path, changes)
    batch = trainer.collector.collect(STEP)

    def trained(advantage):
        losses = rollout_loss(
            trainer.config,
            trainer.method,
            trainer.policy,
            replace(batch, advantage=advantage),
            trainer.sigmas,
        )
        (share,) = losses.updates
        places = range(len(share.micro_batches))
        loss = torch.cat([losses.terms(0, place)["loss"] for place in places]).sum() / share.count
        gradient = torch.autograd.grad(loss, list(trainer.policy.model.parameters()))
        return share.count, loss.item(), torch.cat([g.flatten() for g in gradient])

    everything = trained(batch.advantage)
    none = trained(torch.zeros_like(batch.advantage))
    assert everything[0] == none[0] == 2 * P * 3
    assert everything[1] > 0 == none[1]
    assert everything[2].abs().max() > 0 == none[2].abs().max()


def test_the_reference_samples_and_is_replaced(tmp_path):
    changes = {"method.reference_every": 2, "method.draws": 2}
    trainer = toy_trainer(toy_config("diffusion_dpo", changes), tmp_path)
    policy = trainer.policy
    inputs = (torch.ones(1, 2, 3), torch.full((1,), 0.5), policy.encode(["one"]), 1.0)
    start = policy.old_velocity(*inputs)
    trainer.step(1)
    assert torch.equal(policy.old_velocity(*inputs), start)
    assert torch.equal(policy.rollout_velocity(*inputs), start)
    assert not torch.equal(policy.train_velocity(*inputs), start)
    trainer.step(2)
    torch.testing.assert_close(
        policy.old_velocity(*inputs), policy.train_velocity(*inputs).detach(), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("setting", ["tail_cache=taylorseer:2", "tail_weights=int8"])
def test_approximate_images_are_refused(name, setting):
    changes = ["optimizer.learning_rate=1e-4", f"sampling.{setting}"]
    with pytest.raises(SettingsError, match=rf"sampling\.{setting}: .* Sample them exactly"):
        load_config(name, changes)


# ------------------------------------------------------------------------------- noise levels


@given(
    levels=st.sampled_from(["grid", "binned_grid", "uniform", "binned", "toward_noise"]),
    draws=st.integers(1, 12),
    first=st.floats(0, 0.6),
    width=st.floats(0.2, 0.4),
    num_steps=st.integers(6, 30),
)
def test_noise_levels_are_in_their_range(levels, draws, first, width, num_steps):
    method = METHODS.get("vgrpo")(levels=levels, draws=draws, level_range=(first, first + width))
    method.check(num_steps)
    sigmas = sigma_grid(num_steps, 3.0).numpy()
    found = method.draw_levels(np.random.default_rng(0), 7, sigmas)
    assert found.sigma.shape == found.number.shape == (7, method.num_levels(num_steps))
    assert found.sigma.dtype == np.float32
    assert all(len(set(row)) == len(row) for row in found.number.tolist())
    if "grid" in levels:
        low, high = int(first * num_steps), int((first + width) * num_steps)
        assert set(found.sigma.ravel().tolist()) <= set(sigmas[low:high].tolist())
    else:
        assert (found.sigma >= first - 1e-6).all()
        assert (found.sigma <= first + width + 1e-6).all()
    if levels == "grid":
        assert all(len(set(row)) == len(row) for row in found.sigma.tolist())
    if levels in ("binned", "binned_grid"):
        order = np.diff(found.sigma, axis=1)
        assert (order >= 0).all() if levels == "binned" else (order <= 0).all()


def test_logit_normal_levels_are_places_of_the_grid():
    method = METHODS.get("diffusion_dpo")(draws=50)
    sigmas = sigma_grid(1000, 3.0).numpy()
    found = method.draw_levels(np.random.default_rng(0), 2000, sigmas)
    place = found.sigma / (3 - 2 * found.sigma)  # without the shift
    logit = np.log(place / (1 - place))
    assert logit.mean() == pytest.approx(0, abs=0.01)
    assert logit.std() == pytest.approx(1, abs=0.01)
    narrow = METHODS.get("diffusion_dpo")(draws=50, level_range=(0.0, 0.5))
    found = narrow.draw_levels(np.random.default_rng(0), 100, sigmas)
    assert sigmas[500] <= found.sigma.min() < found.sigma.max() <= 1


def test_the_density_toward_noise_is_2t():
    method = METHODS.get("ram")(draws=50)
    found = method.draw_levels(np.random.default_rng(0), 4000, sigma_grid(10, 1.0).numpy())
    for t in (0.25, 0.5, 0.75):
        assert (found.sigma < t).mean() == pytest.approx(t**2, abs=0.005)


def test_awm_draws_the_published_bins():
    method = METHODS.get("awm")()
    sigmas = sigma_grid(14, 3.0).numpy()
    found = method.draw_levels(np.random.default_rng(0), 2000, sigmas).sigma
    index = 14 - np.searchsorted(sigmas[::-1], found)
    bins = [(1, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12)]
    for place, (low, high) in enumerate(bins):
        assert set(index[:, place].tolist()) == set(range(low, high))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method.level_range=[0.5,0.5]"], "two rising numbers"),
        (["method.level_range=[0.9,0.91]"], "contains no level of a grid"),
        (["method.draws=0"], "method.draws=0"),
    ],
)
def test_impossible_draws(changes, message):
    with pytest.raises(SettingsError, match=message):
        load_config("dgpo", changes)


# ------------------------------------------------------------- values that a loss depends on


@pytest.mark.parametrize("name", ["dgpo", "crd"])
def test_the_old_quantity_is_that_of_the_slow_policy(name, tmp_path, monkeypatch):
    trainer = moved_trainer(name, tmp_path, {"method.updates_per_rollout": 1})
    batch = trainer.collector.collect(STEP)
    cls, seen = type(trainer.method), []
    group_loss = cls.group_loss
    monkeypatch.setattr(cls, "group_loss", lambda m, q: seen.append(q) or group_loss(m, q))
    losses = rollout_loss(trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas)
    losses.prepare()
    losses.terms(0, 0)
    inputs, target = noised_inputs(trainer, batch, np.arange(len(batch.tree.leaves)))
    zeros = torch.zeros(len(target))
    old, trained = (
        trainer.method.quantity(Noised(velocity(*inputs), target, inputs[1], zeros))
        for velocity in (trainer.policy.old_velocity, trainer.policy.train_velocity)
    )
    assert not torch.allclose(old, trained, rtol=1e-3)
    torch.testing.assert_close(seen[0].old.flatten(), old)
    torch.testing.assert_close(seen[0].trained.flatten(), trained.detach())


@pytest.mark.parametrize(("name", "guidance"), [("diffusion_dpo", 1), ("sft", 1), ("awm", 3)])
def test_the_guidance_of_the_losses(name, guidance, tmp_path):
    trainer = moved_trainer(name, tmp_path, {"sampling.guidance_scale": 3.0})
    batch = trainer.collector.collect(STEP)
    losses = rollout_loss(trainer.config, trainer.method, trainer.policy, batch, trainer.sigmas)
    assert losses._rows(0, 0).inputs[3] == guidance


def noised(v, target, advantage, **given):
    """Draws with one value per velocity, at t = 1/2."""
    rows = torch.tensor(v, dtype=torch.float32)
    t = torch.full((len(v),), 0.5)
    return Noised(rows[:, None], torch.tensor(target)[:, None], t, torch.tensor(advantage), **given)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_awm_divides_the_advantage_by_its_clip(scale):
    method = METHODS.get("awm")(advantage_scale=scale)
    x = noised([0.0, 0.0], [1.0, 1.0], [5.0, -1.0])  # the ratio is 1
    torch.testing.assert_close(method.loss(x), scale * torch.tensor([-1.0, 0.2]))
    q = torch.ones(2, 3)
    loss = method.group_loss(Quantities(q, q, None, x.advantage, torch.tensor([0, 0])))
    torch.testing.assert_close(loss, scale * torch.tensor([[-1.0], [0.2]]).expand(2, 3))


def test_awm_with_one_ratio_per_image_has_a_first_pass_only_for_later_updates():
    first, two = (METHODS.get("awm")(ratio="image", updates_per_rollout=n) for n in (1, 2))
    assert (first.reduces, two.reduces) == (False, True)


def test_the_elbo_weight_of_awm_is_bounded():
    method = METHODS.get("awm")(kl_weighting="elbo", kl_weight=1.0, ema_weight=0.0)
    x = replace(noised([1.0] * 3, [0.0] * 3, [0.0] * 3), sigma=torch.tensor([0.0, 0.01, 1.0]))
    weight = method.regularizer(replace(x, reference=torch.zeros(3, 1)))
    assert weight.isfinite().all()
    assert weight[0] == pytest.approx(1 / (2 * 0.49 * 0.01))
    assert weight[1] == pytest.approx(0.99 / (2 * 0.49 * 0.01))


@pytest.mark.parametrize("clipped", [False, True])
def test_dgpo_clips_the_kl_of_images_outside_of_the_trust_region(clipped):
    method = METHODS.get("dgpo")(clip_kl=clipped, clip_range=0.1, kl_weight=1.0)
    # Squared errors 1. The old errors make the ratios e, 1 and 1/e.
    x = noised([1.0] * 3, [0.0] * 3, [1.0, 1.0, 1.0], reference=torch.zeros(3, 1))
    x = replace(x, v=x.v.requires_grad_(), old_quantity=torch.tensor([2.0, 1.0, 0.0]))
    kl = method.regularizer(x)
    assert kl.tolist() == [1.0, 1.0, 1.0]
    gradient = torch.autograd.grad(kl.sum(), x.v)[0].flatten()
    assert gradient.tolist() == [0.0 if clipped else 2.0, 2.0, 2.0]


def test_eta_scales_the_move_of_ram():
    x = noised([0.0], [1.0], [2.0], old=torch.zeros(1, 1), reference=torch.zeros(1, 1))
    assert METHODS.get("ram")(eta=3.0).loss(x).item() == 36  # (eta A (u - v_old))^2


def test_flowawr_clips_the_normalized_rewards():
    changes = {"method.group_size": 4, "method.logit_clip": 1.0, "method.std_epsilon": 1e-8}
    config = load_config("flowawr", changes)
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0])  # normalized: -1 / sqrt(3), ..., sqrt(3)
    energy = config.method.credit(config.tree(), rewards, config.method.normalization())
    logits = torch.tensor([*[-(3**-0.5)] * 3, 1.0], dtype=energy.dtype)
    torch.testing.assert_close(energy, 4 * logits.softmax(0) - 1, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- losses

values = st.lists(st.floats(-3, 3), min_size=6, max_size=6)


def quantities(numbers):
    shape = torch.tensor(numbers).reshape(3, 2).double()
    group = torch.tensor([0, 0, 1])
    return Quantities(shape.exp(), shape.exp() + 0.1, shape.exp() - 0.2, shape[:, 0], group)


@given(values)
def test_linearized_losses_have_the_gradient_of_the_losses(numbers):
    q = quantities(numbers)
    for loss in (
        lambda q: dgpo_loss(q, 5.0, 0.01),
        lambda q: crd_loss(q, q.advantage.sigmoid(), 2.0, None, "mse"),
        lambda q: crd_loss(q, q.advantage.sigmoid(), 2.0, 0.3, "bce"),
        lambda q: (q.old - q.trained).mean(1, keepdim=True).exp().expand_as(q.trained),
    ):
        found, derivative = linearized(loss, q)
        trained = q.trained.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(replace(q, trained=trained)).sum(), trained)
        torch.testing.assert_close(derivative, expected)
        torch.testing.assert_close(found, loss(q))


@given(values)
def test_the_loss_of_a_group_does_not_depend_on_other_groups(numbers):
    q = quantities(numbers)
    other = replace(q, trained=q.trained + torch.tensor([[0.0], [0.0], [1.0]]).double())
    for loss in (
        lambda q: dgpo_loss(q, 5.0, 0.01),
        lambda q: crd_loss(q, q.advantage.sigmoid(), 2.0, 0.5, "mse"),
    ):
        torch.testing.assert_close(loss(q)[:2], loss(other)[:2])


@given(values)
def test_softmax_and_energy_of_groups(numbers):
    advantage, group = torch.tensor(numbers), torch.tensor([0, 0, 1, 1, 1, 2])
    weight = group_softmax(advantage, group)
    for number in range(3):
        torch.testing.assert_close(weight[group == number], advantage[group == number].softmax(0))
    energy = flow_awr_energy(advantage, group, "soft")
    sums = torch.zeros(3).index_add(0, group, energy)
    torch.testing.assert_close(sums, torch.zeros(3), atol=1e-5, rtol=0)
    assert energy[5] == 0


def test_ram_has_the_gradient_of_the_reference_distance_and_the_weighted_error():
    """grad of ||v - v_ref||^2 + eta A ||v - u||^2, if the residual is that of v (eq. 17)."""
    torch.manual_seed(0)
    v, u, reference = (torch.randn(4, 3, 2) for _ in range(3))
    advantage = torch.randn(4)
    v.requires_grad_()
    x = Noised(v, u, torch.rand(4), advantage, reference=reference)
    ours = torch.autograd.grad(ram_loss(x, 0.7).sum(), v)[0]
    whole = squared_error(v, reference) + 0.7 * advantage * squared_error(v, u)
    torch.testing.assert_close(ours, torch.autograd.grad(whole.sum(), v)[0])


def test_flowawr_leaves_out_images_without_a_score():
    config = load_config("flowawr", {"method.group_size": 4})
    tree = config.tree()
    rewards = torch.tensor([0.1, float("nan"), 0.7, 0.4])
    how = config.method.normalization()
    energy = config.method.credit(tree, rewards, how)
    assert energy[1] == 0
    assert energy.sum() == pytest.approx(0, abs=1e-5)
    assert energy[2] > 0 > energy[0]


def test_the_slow_policy_of_crd_starts_at_a_quarter():
    method = METHODS.get("crd")()
    assert method.decay(0) == pytest.approx(0.25)
    assert method.decay(10) == pytest.approx(0.3)
    assert method.decay(10_000) == 0.999
