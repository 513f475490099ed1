"""Shards and copies are filled from the files of a model, without a full copy in any process."""

import sys

import loading_work
import pytest
import torch
import twins
from loading_work import CPU, PARTS, loaded
from rank_pool import PYTHONPATH, RankPool

from flowgrain.distributed import SINGLE
from flowgrain.models import load_backbone
from flowgrain.training.copies import make_copies
from flowgrain.training.load import load_dtypes, load_empty

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")

SHARDED = {"runtime.rollout_weights": "sharded"}
REPLICA = {"runtime.rollout_weights": "replica"}
BFLOAT16 = {"runtime.dtype": "bfloat16"}
LORA = {"lora.rank": 2}
CASES = {
    "full": ("flow_grpo", SHARDED),
    "full, replica": ("flow_grpo", {**REPLICA, **BFLOAT16}),
    "full, reference": ("flow_grpo", {**SHARDED, "method.kl_weight": 0.1}),
    "full, old policy": ("diffusionnft", {**REPLICA}),
    "lora": ("flow_grpo", {**LORA, **REPLICA}),
    "lora, bfloat16": ("flow_grpo", {**LORA, **REPLICA, **BFLOAT16}),
    "lora, sharded": ("flow_grpo", {**LORA, **SHARDED}),
    "lora, sharded, old policy": ("diffusionnft", {**LORA, **SHARDED, **BFLOAT16}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("twins")
    twins.sd3(root / "sd3")  # has a persistent buffer
    twins.qwen_image(root / "qwen_image")  # has tensors that are not saved
    return root


@pytest.fixture(scope="module")
def pool():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        patch.setenv("OMP_NUM_THREADS", "1")
        pool = RankPool(2)
        yield pool
        pool.close()


class Diffusers:
    """A backbone whose transformer diffusers has loaded, in place of flowgrain."""

    def __init__(self, backbone, folder):
        self.transformer = type(backbone.transformer).from_pretrained(
            folder / "transformer", dtype=backbone.dtypes.transformer
        )
        self.lora_targets, self._class, self._backbone = backbone.lora_targets, type(backbone), None

    @property
    def blocks(self):
        return self._class.blocks.fget(self)

    def to(self, device):
        self.transformer.to(device)


def of_diffusers(path, method, changes):
    """The copies that are made of a transformer that diffusers has loaded."""
    config = loading_work.config_of(path, method, changes)
    backbone = load_backbone(config.model, load_dtypes(config))
    return loaded(path, method, changes, Diffusers(backbone, path))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("sd3", "lora, sharded, old policy"),
        *(pytest.param("sd3", case, marks=SLOW) for case in CASES),
        *(pytest.param("qwen_image", case, marks=SLOW) for case in CASES),
    ],
)
def test_the_copies_of_two_ranks(folders, pool, name, case):
    """Every tensor is that of diffusers, and a rank never holds more than its shards.

    Copies made of a transformer that diffusers has loaded have the same adapter.
    """
    method, changes = CASES[case]
    expected = of_diffusers(folders / name, method, changes)["parts"]
    one = loaded(folders / name, method, changes)
    two = pool.run(2, loaded, folders / name, method, changes)
    held, largest = 0, 0
    for part, values in two["parts"].items():
        for key, value in values["tensors"].items():
            of_diffuser = expected[part if part in expected else "model"]["tensors"][key]
            assert value.dtype == of_diffuser.dtype, (part, key)
            assert torch.equal(value, of_diffuser), (part, key)
    for part, values in one["parts"].items():
        assert values["tensors"].keys() == expected[part]["tensors"].keys()
        for key, value in values["tensors"].items():
            assert torch.equal(value, expected[part]["tensors"][key]), (part, key)
        assert values["trained"] == expected[part]["trained"]
    for part in distinct(two["parts"], changes, case):
        values = two["parts"][part]
        for key, value in values["tensors"].items():
            size = value.numel() * value.element_size()
            rows = -(-len(value) // 2) if value.ndim else 1
            share = size // len(value) * rows if key in values["sharded"] and len(value) else size
            held += 0 if key in values["mapped"] else share
            largest = max(largest, size)
    if name == "qwen_image":  # copies also copy its tables, which are not saved
        held += 4 * sum(tables(folders / name))
    assert max(two["peak"]) <= held + largest, (two["peak"], held, largest)


def tables(folder):
    """Bytes of the tensors of Qwen-Image that are not saved."""
    config = loading_work.config_of(folder, "flow_grpo", {})
    embedding = load_empty(config).transformer.pos_embed
    return [t.numel() * t.element_size() for t in (embedding.pos_freqs, embedding.neg_freqs)]


def distinct(parts, changes, case):
    """Names of the copies that are modules of their own."""
    shared = (
        "sampler" if "lora" in case or changes.get("runtime.rollout_weights") == "sharded" else ""
    )
    return [part for part in PARTS if part in parts and part != shared]


@SLOW
def test_frozen_parameters_are_mapped(folders, pool):
    """On a CPU and in the stored dtype. Trained parameters and the sampler are not."""
    for method in ("flow_grpo", "diffusionnft"):
        parts = pool.run(2, loaded, folders / "sd3", method, {**LORA, **REPLICA})["parts"]
        for part in parts.values():
            names = set(part["tensors"])
            assert part["mapped"] == {
                n for n in names if "lora_" not in n and "pos_embed.pos" not in n
            }
    parts = loaded(folders / "sd3", "flow_grpo", {**BFLOAT16, "method.kl_weight": 0.1})["parts"]
    assert not parts["model"]["mapped"] | parts["sampler"]["mapped"]
    assert parts["reference"]["mapped"] == parts["model"]["trained"]
    assert not loaded(folders / "sd3", "flow_grpo", {**LORA, **BFLOAT16})["parts"]["model"][
        "mapped"
    ]
    old = loaded(folders / "sd3", "diffusionnft", {})["parts"]["old"]
    assert not old["mapped"]  # it is moved in place


def test_the_old_policy_of_a_lora_shares_frozen_parameters(folders):
    """With a dtype that is not stored, so that they cannot be views of the file."""
    config = loading_work.config_of(folders / "sd3", "diffusionnft", {**LORA, **BFLOAT16})
    copies = make_copies(config, load_empty(config), CPU, torch.bfloat16, SINGLE)
    old = dict(copies.old.named_parameters())
    for name, parameter in copies.model.named_parameters():
        assert (old[name] is parameter) == (not parameter.requires_grad), name
