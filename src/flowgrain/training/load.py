"""Loading the parts of a run: device and dtypes, the backbone, rewards and prompts."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from flowgrain.config.schema import Config
from flowgrain.data import Prompt, as_prompts, existing_file, read_prompts
from flowgrain.distributed import env_rank
from flowgrain.image_data import ImageData, ImagePrompt, check_image_files, read_image_data
from flowgrain.methods import DifferentiableReward, Method
from flowgrain.models import Backbone, Dtypes, ImageEncoder, load_backbone
from flowgrain.models.quiet import quiet_libraries
from flowgrain.rewards import (
    DIFFERENTIABLE,
    REWARDS,
    GroupReward,
    Reward,
    build_reward,
    is_custom,
    is_differentiable,
)
from flowgrain.rewards.options import check_call
from flowgrain.rewards.reachable import check_server
from flowgrain.settings import SettingsError

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_device(setting: str) -> torch.device:
    """The device for a value of runtime.device.

    Raises:
        SettingsError: this machine has no such device.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        raise SettingsError("runtime.device=cuda: torch finds no GPU. Use cpu or auto.")
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(setting)


def compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The dtype for the value of a dtype setting.

    auto: bfloat16 on a GPU, float32 on a CPU, where bfloat16 is often slower.
    """
    if setting == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[setting]


def load_dtypes(config: Config, train: bool = True, device: torch.device | None = None) -> Dtypes:
    """The dtypes in which the parts of a model are loaded on `device`, by default runtime.device.

    A full fine-tune loads float32 master parameters. With LoRA the frozen transformer is loaded in
    the compute dtype. auto is float32 for the VAE, because rounding would be visible, and the
    compute dtype for text encoders.

    Raises:
        SettingsError: this machine has no such device.
    """
    device = device or compute_device(config.runtime.device)
    frozen = config.lora.rank > 0 or not train
    transformer = compute_dtype(config.runtime.dtype, device) if frozen else torch.float32
    vae = torch.bfloat16 if config.model.vae_dtype == "bfloat16" else torch.float32
    return Dtypes(transformer, vae, compute_dtype(config.model.encoder_dtype, device))


def load_model(config: Config, train: bool = True, *, empty: bool = False) -> Backbone:
    """The backbone of `config`, for training or only for sampling.

    Args:
        config: settings of the model.
        train: whether it is trained.
        empty: whether the transformer may have no weights yet. See `EmptyBackbone`.

    Raises:
        SettingsError: a setting of the model cannot be used.
    """
    quiet_libraries()
    try:
        return load_backbone(config.model, load_dtypes(config, train), empty=empty)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def load_empty(config: Config) -> Backbone:
    """The backbone of `config` for `Policy.for_training`, which fills an empty transformer.

    Raises:
        SettingsError: a setting of the model cannot be used.
    """
    return load_model(config, empty=True)


def load_rewards(
    config: Config, given: Mapping[str, Reward] | None = None
) -> tuple[dict[str, Reward], dict[str, Reward]]:
    """The trained rewards, and all rewards that evaluation uses.

    An evaluation has one image per prompt, so it leaves out rewards that compare images. A warning
    names them.

    Args:
        config: settings of the rewards.
        given: rewards from Python by name, in place of config.rewards.

    Raises:
        SettingsError: a reward cannot be loaded, its server does not answer, the method needs a
            gradient that it does not have, or evaluation.rewards contains a reward that compares
            images.
    """
    quiet_libraries()
    if given is not None:
        trained = {
            name: reward if isinstance(reward, GroupReward) else check_call(name, reward)
            for name, reward in given.items()
        }
    else:
        trained = _built(config)
    check_gradients(config.method, trained)
    others = {
        reward.name: build_reward(reward)
        for reward in config.evaluation.rewards
        if reward.name not in trained
    }
    for name, reward in {**trained, **others}.items():
        check_server(name, reward)
    return trained, _evaluated(trained, others)


def _built(config: Config) -> dict[str, Reward]:
    """The rewards of config.rewards by name."""
    try:
        return {reward.name: build_reward(reward) for reward in config.rewards}
    except SettingsError:
        # A missing option is not worth setting if the method cannot use the reward at all.
        names = [reward.name for reward in config.rewards if reward.name in REWARDS]
        check_gradients(config.method, {name: REWARDS.get(name) for name in names})
        raise


def _evaluated(trained: Mapping[str, Reward], others: Mapping[str, Reward]) -> dict[str, Reward]:
    """The rewards that evaluation uses."""
    reason = "compares the images of a prompt, and an evaluation has one image per prompt"
    for name, reward in others.items():
        if isinstance(reward, GroupReward):
            raise SettingsError(f"evaluation.rewards: {name!r} {reason}. Remove it.")
    left_out = [name for name, reward in trained.items() if isinstance(reward, GroupReward)]
    evaluated = {
        name: reward for name, reward in {**trained, **others}.items() if name not in left_out
    }
    if env_rank()[0] == 0:
        for name in left_out:
            fix = "" if evaluated else " Add another reward to evaluation.rewards."
            log.warning("rewards[%s] is not evaluated, because it %s.%s", name, reason, fix)
    return evaluated


def check_gradients(method: Method, rewards: Mapping[str, Reward]) -> None:
    """Check that all trained rewards are differentiable, if the method uses their gradient.

    Raises:
        SettingsError: a reward is not.
    """
    if not isinstance(method, DifferentiableReward):
        return
    for name, reward in rewards.items():
        if not is_differentiable(reward):
            decorator = "the decorator flowgrain.rewards.differentiable"
            fix = f"Use {', '.join(DIFFERENTIABLE)}, or a custom reward with {decorator}."
            if is_custom(reward):
                fix = f"Add {decorator} to {name}."
            raise SettingsError(
                f"rewards[{name}]: method {method.name!r} trains on the gradient of its rewards, "
                f"but this reward is not differentiable. {fix}"
            )


def check_prompt_files(config: Config) -> None:
    """Check that the prompt files and the data set exist, before a large model is loaded.

    Raises:
        SettingsError: a file does not exist, or the data set or one of its images cannot be read.
    """
    data = _image_data(config)
    if data is not None:
        check_image_files(data.prompts)
        if data.ties and env_rank()[0] == 0:
            log.warning(
                "data.pairs=%s: %d pairs are ties and are left out. %d pairs remain.",
                config.data.pairs,
                data.ties,
                len(data.prompts),
            )
    for name, path in (
        ("data.prompts", config.data.prompts),
        ("data.eval_prompts", config.data.eval_prompts),
    ):
        if path is not None:
            existing_file(name, path)


def _image_data(config: Config) -> ImageData | None:
    """The data set of images, if there is one."""
    kind, file = config.data.kind, config.data.image_file
    return None if kind is None or file is None else read_image_data(kind, file)


def check_encoder(config: Config, backbone: Backbone) -> None:
    """Check that the backbone encodes images, if there is a data set of images.

    Raises:
        SettingsError: it does not.
    """
    if config.data.kind is not None and not isinstance(backbone, ImageEncoder):
        raise SettingsError(
            f"data.{config.data.kind}={config.data.image_file}: backbone "
            f"{type(backbone).__name__} has no method encode_images(images), which encodes the "
            "images. See flowgrain.models.ImageEncoder."
        )


def load_prompts(
    config: Config,
    backbone: Backbone,
    use: Literal["train", "eval"],
    given: Sequence[str | Prompt] | None = None,
    *,
    hold_out: bool = True,
) -> list[Prompt]:
    """The prompts to train on or to evaluate.

    Args:
        config: settings with the paths of the prompt files.
        backbone: must be able to encode every prompt. It may have bundled prompts.
        use: "train" or "eval".
        given: prompts from Python, in place of a file.
        hold_out: do not train on the last tenth of data.prompts if there are no other prompts to
            evaluate.

    Raises:
        SettingsError: there are no prompts, or a prompt is blank or cannot be encoded.
    """
    setting = "data.prompts" if use == "train" else "data.eval_prompts"
    if given is not None:
        source, chosen = setting, as_prompts(given)
        kind = config.data.kind
        if use == "train" and kind and not all(isinstance(p, ImagePrompt) for p in chosen):
            raise SettingsError(
                f"data.{kind}={config.data.image_file}: the data set has its own prompts. "
                "Remove the argument prompts."
            )
    else:
        source, chosen = _configured_prompts(config, backbone, use, hold_out)
    if not chosen:
        raise SettingsError(f"{setting}: there are no prompts. Give the path of a prompt file.")
    for number, prompt in enumerate(chosen, 1):
        if not prompt.text.strip():
            raise SettingsError(f"{source}: prompt {number} is blank. Write a prompt or remove it.")
    try:
        backbone.check([prompt.text for prompt in chosen])
    except ValueError as error:
        raise SettingsError(_unreadable_prompt(source, chosen, str(error))) from error
    if use == "train":
        _warn_of_repeats(config, len(chosen))
    return chosen


def _unreadable_prompt(source: str, prompts: Sequence[Prompt], error: str) -> str:
    """The message about a prompt that cannot be encoded, with its row if it is of a data set."""
    found = re.match(r"prompt (\d+)\b", error)
    prompt = prompts[int(found[1]) - 1] if found and 0 < int(found[1]) <= len(prompts) else None
    if found and isinstance(prompt, ImagePrompt):
        return f"{prompt.place}{error[found.end() :]}"
    return f"{source}: {error}"


def _warn_of_repeats(config: Config, rows: int) -> None:
    """Warn of a data set with fewer training rows than a step."""
    data, count = config.data, config.training.prompts_per_step
    if data.kind is not None and rows < count and env_rank()[0] == 0:
        log.warning(
            "data.%s=%s: %d rows are fewer than training.prompts_per_step=%d, so rows are repeated "
            "within a step.",
            *(data.kind, data.image_file, rows, count),
        )


def _configured_prompts(
    config: Config, backbone: Backbone, use: Literal["train", "eval"], hold_out: bool
) -> tuple[str, list[Prompt]]:
    """The prompts that the settings name, and their source for error messages."""
    data = config.data
    path, eval_path = data.image_file or data.prompts, data.eval_prompts
    name = f"data.{data.kind or 'prompts'}"
    if use == "eval" and eval_path is not None:
        return f"data.eval_prompts={eval_path}", read_prompts("data.eval_prompts", eval_path)
    bundled = backbone.bundled_prompts("train" if use == "train" else config.evaluation.split)
    if path is None or (use == "eval" and bundled):
        return f"data.{'prompts' if use == 'train' else 'eval_prompts'}", as_prompts(bundled)
    source, images = f"{name}={path}", _image_data(config)
    prompts = read_prompts(name, path) if images is None else list[Prompt](images.prompts)
    others = eval_path is not None or bool(backbone.bundled_prompts(config.evaluation.split))
    if use == "train" and (others or not hold_out):
        return source, prompts
    if len(prompts) < 2:
        raise SettingsError(
            f"{source}: one prompt cannot be divided into training and evaluation. "
            "Set data.eval_prompts."
        )
    first_held_out = len(prompts) - max(1, len(prompts) // 10)
    return source, prompts[:first_held_out] if use == "train" else prompts[first_held_out:]
