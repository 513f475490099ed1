"""Empty transformers and the files of their weights: the same tensors as diffusers, and errors."""

import json
import shutil

import pytest
import torch
import twins
from safetensors.torch import load_file, save_file
from twins import PIPELINES, PROMPTS, SIZE

from flowgrain import SettingsError, load_config
from flowgrain.models import Dtypes, EmptyBackbone, ModelConfig, load_backbone
from flowgrain.models.prompt_encoding import PendingPrompts
from flowgrain.models.weights import WeightFiles, build_empty

FOLDERS = [*PIPELINES, "sd3-no-t5", "schnell"]
NAME = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("twins")
    twins.save_all(root)
    return root


def config_of(path, name=None, **changes):
    names = {"schnell": "flux", "sd3-no-t5": "sd3"}
    name = name or names.get(path.name, path.name)
    return ModelConfig(**{"name": name, "path": str(path), **SIZE, **changes})


def all_tensors(model):
    """Parameters, buffers and other tensors of a model by name."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[f"{prefix}.{name}"] = value
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_tensor_is_that_of_diffusers(folders, folder, dtype):
    path = folders / folder
    backbone = load_backbone(config_of(path), Dtypes(transformer=dtype))
    expected = type(backbone.transformer).from_pretrained(str(path / "transformer"), dtype=dtype)
    tensors = all_tensors(backbone.transformer)
    assert tensors.keys() == all_tensors(expected).keys()
    for name, value in all_tensors(expected).items():
        assert tensors[name].dtype == value.dtype, name
        assert torch.equal(tensors[name], value), name
    assert not backbone.transformer.training
    assert backbone.transformer.config == expected.config
    assert backbone.weights is None


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_empty_backbone_has_no_weights(folders, folder):
    backbone = load_backbone(config_of(folders / folder), Dtypes(), empty=True)
    assert isinstance(backbone, EmptyBackbone)
    state = backbone.transformer.state_dict()
    assert all(value.is_meta for value in state.values())
    assert set(backbone.weights) == set(state)
    unsaved = all_tensors(backbone.transformer).keys() - state.keys()
    assert not any(all_tensors(backbone.transformer)[name].is_meta for name in unsaved)
    assert bool(unsaved) == (folder == "qwen_image")


def test_files_with_an_index(folders, tmp_path):
    shutil.copytree(folders / "sd3", tmp_path / "sd3")
    whole = load_backbone(config_of(folders / "sd3"), Dtypes()).transformer
    folder = tmp_path / "sd3" / "transformer"
    (folder / f"{NAME}.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    split = load_backbone(config_of(tmp_path / "sd3"), Dtypes()).transformer
    for name, value in whole.state_dict().items():
        assert torch.equal(value, split.state_dict()[name]), name

    config = config_of(tmp_path / "sd3")
    last = sorted(folder.glob("*.safetensors"))[-1]
    data = last.read_bytes()
    last.write_bytes(data[:-100])
    with pytest.raises(SettingsError, match=r"model.path=.*-of-.* is damaged or truncated"):
        load_backbone(config, Dtypes(), empty=True)
    last.unlink()
    with pytest.raises(SettingsError, match=r"model.path=.*-of-.* is missing. Download the model"):
        load_backbone(config, Dtypes(), empty=True)
    last.write_bytes(data)
    index = folder / f"{NAME}.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["magic"] = last.name
    index.write_text(json.dumps(content))
    with pytest.raises(SettingsError, match=r"index.json lists magic, but no file contains it"):
        load_backbone(config, Dtypes(), empty=True)
    index.write_text("{")
    with pytest.raises(SettingsError, match=r"index.json is damaged"):
        load_backbone(config, Dtypes(), empty=True)


def remove(tensors):
    del tensors["norm_out.linear.weight"]


def reshape(tensors):
    tensors["norm_out.linear.weight"] = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, r"contain no tensor norm_out.linear.weight"),
        (reshape, r"tensor norm_out.linear.weight in .* has the shape \[3, 2\], but config.json"),
    ],
)
def test_files_of_another_model(folders, tmp_path, change, message):
    shutil.copytree(folders / "flux", tmp_path / "flux")
    file = tmp_path / "flux" / "transformer" / f"{NAME}.safetensors"
    tensors = load_file(folders / "flux" / "transformer" / file.name)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(SettingsError, match=rf"^model.path=.*{message}"):
        load_backbone(config_of(tmp_path / "flux"), Dtypes(), empty=True)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_file(folders, tmp_path, kept):
    shutil.copytree(folders / "zimage", tmp_path / "zimage")
    file = tmp_path / "zimage" / "transformer" / f"{NAME}.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(SettingsError, match=rf"{NAME}.safetensors is damaged or truncated .*Down"):
        load_backbone(config_of(tmp_path / "zimage"), Dtypes(), empty=True)


def test_a_missing_file_and_a_damaged_config(folders, tmp_path):
    shutil.copytree(folders / "zimage", tmp_path / "zimage")
    folder = tmp_path / "zimage" / "transformer"
    (folder / f"{NAME}.safetensors").unlink()
    with pytest.raises(SettingsError, match=rf"{NAME}.safetensors is missing"):
        load_backbone(config_of(tmp_path / "zimage"), Dtypes(), empty=True)
    (folder / "config.json").write_text("{")
    with pytest.raises(SettingsError, match=r"^model.path=.*zimage: "):
        load_backbone(config_of(tmp_path / "zimage"), Dtypes(), empty=True)


def test_tensors_that_are_not_used_are_logged(folders, tmp_path, caplog):
    file = folders / "flux" / "transformer" / f"{NAME}.safetensors"
    save_file({**load_file(file), "more": torch.zeros(2)}, tmp_path / file.name)
    config = json.loads((file.parent / "config.json").read_text())
    WeightFiles(tmp_path, "model.path=x").check(build_empty(config, torch.float32))
    assert "1 tensors are not used, such as more" in caplog.text


def test_other_formats_are_loaded_by_diffusers(folders, tmp_path):
    shutil.copytree(folders / "flux", tmp_path / "flux")
    whole = load_backbone(config_of(folders / "flux"), Dtypes()).transformer
    folder = tmp_path / "flux" / "transformer"
    (folder / f"{NAME}.safetensors").unlink()
    whole.save_pretrained(folder, safe_serialization=False)
    backbone = load_backbone(config_of(tmp_path / "flux"), Dtypes(), empty=True)
    assert backbone.weights is None
    for name, value in whole.state_dict().items():
        assert torch.equal(value, backbone.transformer.state_dict()[name]), name
    config = dict(whole.config)
    assert build_empty({**config, "_class_name": "Magic"}, torch.float32) is None
    quantized = {**config, "_class_name": "FluxTransformer2DModel", "quantization_config": {"a": 1}}
    assert build_empty(quantized, torch.float32) is None


def test_a_model_in_the_cache_of_the_hub(folders, tmp_path, monkeypatch):
    """A name on the Hub, without a connection."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--flux"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folders / "flux", repository / "snapshots" / ("0" * 40))
    config = config_of(folders / "flux").model_copy(update={"path": "somebody/flux"})
    cached = load_backbone(config, Dtypes(), empty=True)
    assert cached.weights.folder.is_relative_to(repository)
    file = repository / "snapshots" / ("0" * 40) / "transformer" / f"{NAME}.safetensors"
    file.unlink()
    with pytest.raises(SettingsError, match=r"^model.path=somebody/flux: .*is missing"):
        load_backbone(config, Dtypes(), empty=True)


def test_a_subclass_with_its_own_load_is_not_loaded_empty(folders, monkeypatch):
    from flowgrain.models import BACKBONES
    from flowgrain.models.flux import FluxBackbone

    class Doubled(FluxBackbone):
        @classmethod
        def load(cls, model, dtypes):
            backbone = super().load(model, dtypes)
            backbone.transformer.proj_out.bias.data.add_(1)
            return backbone

    monkeypatch.setattr(BACKBONES, "_objects", {**BACKBONES._objects, "doubled": Doubled})
    config = config_of(folders / "flux", "doubled")
    bias = load_backbone(config, Dtypes(), empty=True).transformer.proj_out.bias
    plain = load_backbone(config_of(folders / "flux"), Dtypes()).transformer.proj_out.bias
    assert torch.equal(bias, plain + 1)  # the file was not modified


def test_text_encoders_are_freed_after_the_last_prompt(folders, tmp_path):
    backbone = load_backbone(config_of(folders / "flux"), Dtypes())
    first = backbone.encode(PROMPTS[:1])
    assert backbone._encoding_pipe is not None  # the prompts of the run are not known
    backbone.check(PROMPTS)
    backbone.encode(PROMPTS)
    assert backbone._encoding_pipe is not None  # the unconditional prompt is left
    backbone.encode([""])
    assert backbone._encoding_pipe is None
    backbone.encode(PROMPTS)  # from memory
    assert backbone._encoding_pipe is None
    backbone.encode(["another prompt"])  # loads the encoders again
    assert backbone._encoding_pipe is None
    for name, value in backbone.encode(PROMPTS[:1]).items():
        assert torch.equal(value, first[name])

    settings = {"model.path": str(folders / "flux"), "model.keep_encoders": True}
    settings |= {f"model.{key}": value for key, value in SIZE.items()}
    kept = load_backbone(load_config("flux/g2rpo", settings).model, Dtypes())
    kept.check(PROMPTS)
    kept.encode(["", *PROMPTS])
    assert kept._encoding_pipe is not None

    config = config_of(folders / "flux", embedding_cache=str(tmp_path / "cache"))
    ranks = [load_backbone(config, Dtypes()) for _ in range(2)]
    for rank in ranks:
        rank.check(PROMPTS)
    ranks[0].encode(["", *PROMPTS[:3]])
    assert ranks[0]._encoding_pipe is not None
    ranks[1].encode(PROMPTS[3:])  # what the first rank encoded is in the cache
    assert ranks[1]._encoding_pipe is None


def test_prompts_that_do_not_fit_in_memory_are_never_done():
    pending = PendingPrompts(None)
    assert not pending.none_left()
    texts = [f"prompt {number}" for number in range(600)]
    pending.add(texts[:511])
    for text in ["", *texts]:
        pending.encoded(text)
    assert pending.none_left()
    pending.add(texts)
    assert not pending.none_left()  # 601 prompts are encoded again and again
