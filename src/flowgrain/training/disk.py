"""Bytes on the disk that a run writes: checkpoints and records."""

from flowgrain.config.schema import Config
from flowgrain.records.evaluations import EVALUATION_IMAGES
from flowgrain.records.images import LOSSLESS
from flowgrain.shapes.render import SIZE
from flowgrain.training.memory import checkpoint_bytes
from flowgrain.training.sizes import ModelSize

_PER_PIXEL = {"lossless": 2.0, "thumbnail": 0.4, "full": 0.5}
"""Bytes of a WebP image per pixel. Images of trained models need about two thirds of this."""
_PER_NUMBER = 22
"""Bytes of a number as text."""
_PER_ROW = 20
"""Bytes of a row of the tree as text."""


def image_size(config: Config) -> tuple[int, int]:
    """Height and width of the images in pixels."""
    model = config.model
    return (SIZE, SIZE) if model.name == "shapes" else (model.height, model.width)


def run_bytes(config: Config, size: ModelSize) -> dict[str, float]:
    """Bytes of a run's directory by purpose. The export at the end is not counted."""
    return {
        "checkpoints": float(checkpoint_bytes(config, size)),
        "recorded groups": groups_bytes(config),
        "evaluation images": evaluations_bytes(config),
    }


def largest_setting(config: Config, purpose: str) -> tuple[str, object]:
    """The setting, and its value, that makes the files of `purpose` smaller."""
    training = config.training
    if purpose == "recorded groups":
        return "training.record.megabytes", training.record.megabytes
    if config.lora.rank and training.keep_checkpoints <= 2:
        return "lora.rank", config.lora.rank
    return "training.keep_checkpoints", training.keep_checkpoints


def groups_bytes(config: Config) -> float:
    """Bytes of groups/, with a step that is written before older steps are deleted."""
    settings, prompts = config.training.record, config.training.prompts_per_step
    if not settings.prompts or not settings.steps:
        return 0.0
    tree = config.tree()
    leaves, recorded = len(tree.leaves), min(settings.prompts, prompts)
    height, width = image_size(config)
    shrink = min(1.0, settings.thumbnail / max(height, width))
    images = recorded * leaves * _image_bytes(height * shrink, width * shrink, "thumbnail")
    if max(height, width) > LOSSLESS:
        images += recorded * min(settings.full_size, leaves) * _image_bytes(height, width, "full")
    values = leaves * len(config.rewards) + max(len(tree.edges), leaves)
    step = images + _PER_ROW * len(tree) + _PER_NUMBER * prompts * values
    kept = min(settings.steps, config.training.max_steps) * step
    return min(kept, settings.megabytes * 1e6) + step


def evaluations_bytes(config: Config) -> float:
    """Bytes of the images in evaluations/."""
    every, last = config.evaluation.every, config.training.max_steps
    if every == 0:
        return 0.0
    count = 2 if every is None else 2 + last // every
    height, width = image_size(config)
    images = min(EVALUATION_IMAGES, config.evaluation.images_of_run)
    return count * images * _image_bytes(height, width, "full")


def _image_bytes(height: float, width: float, kind: str) -> float:
    kind = "lossless" if max(height, width) <= LOSSLESS else kind
    return height * width * _PER_PIXEL[kind]
