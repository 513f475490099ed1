"""The evaluations of a run: evaluations/step-NNNNNN.json and images-NNNNNN.zip.

Shapes: I images.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from flowgrain.records.images import (
    DamagedRecord,
    Pixels,
    decode_image,
    encode_image,
    member_names,
    read_member,
    write_zip,
)
from flowgrain.records.json_text import columns, numbers, parse_json

EVALUATION_IMAGES = 24
"""Number of images of an evaluation that are recorded."""
_NAME = re.compile(r"step-(\d{6,})\.json")


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation of a run. All evaluations of a run have the same prompts and noise.

    Attributes:
        step: training step, 0 before training.
        num_steps: ODE steps of an image.
        prompts: [I] texts.
        scores: [I] by reward, NaN where the reward failed.
        parts: mean of every part by "reward/part".
        monitors: [I] by monitor, NaN where the value is not available.
        base: paired difference to step 0 by reward and monitor: "mean", "low" and "high" of the 95%
            interval, and "std", the standard deviation at step 0. Empty at step 0.
        guidance_scale: guidance scale of the images. None: not recorded, as in old runs.
        path: the file with the scores.
    """

    step: int
    num_steps: int
    prompts: list[str]
    scores: dict[str, list[float]]
    parts: dict[str, float]
    monitors: dict[str, list[float]]
    base: dict[str, dict[str, float]]
    guidance_scale: float | None
    path: Path

    @property
    def images_path(self) -> Path:
        """The file with the recorded images. Old runs do not have it."""
        return self.path.with_name(images_name(self.step))

    @property
    def num_images(self) -> int:
        """Number of recorded images. They belong to the first prompts.

        Raises:
            DamagedRecord: the file is not readable.
        """
        if not self.images_path.exists():
            return 0
        return len(member_names(self.images_path))

    def image(self, place: int) -> Image.Image:
        """The image of prompt number `place`, in full size.

        Raises:
            KeyError: the image was not recorded.
            DamagedRecord: the file is not readable.
        """
        try:
            return decode_image(self.image_bytes(place))
        except DamagedRecord:
            raise
        except ValueError as error:
            raise DamagedRecord(self.images_path, f"image {place}: {error}") from None

    def image_bytes(self, place: int) -> bytes:
        """The image of prompt number `place` as the bytes of a WebP file. See `image`."""
        if not self.images_path.exists():
            raise KeyError(f"{self.images_path} does not exist")
        return read_member(self.images_path, _member(place))


def evaluation_name(step: int) -> str:
    """Name of the file with the scores."""
    return f"step-{step:06d}.json"


def images_name(step: int) -> str:
    """Name of the file with the images."""
    return f"images-{step:06d}.zip"


def evaluation_files(folder: Path) -> list[Path]:
    """The files with scores in a directory evaluations/, in the order of their steps."""
    found = [path for path in folder.glob("step-*.json") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")))


def write_evaluation_images(folder: Path, step: int, images: Iterable[Pixels]) -> None:
    """Write the images [H, W, 3] of the first prompts to evaluations/images-NNNNNN.zip."""
    members = {_member(place): encode_image(pixels) for place, pixels in enumerate(images)}
    write_zip(folder / images_name(step), members)


def read_evaluation(path: Path) -> EvaluationRecord:
    """The evaluation in a file.

    Raises:
        DamagedRecord: the file is not readable.
    """
    try:
        return _evaluation(parse_json(path.read_bytes()), path)
    except KeyError as error:
        raise DamagedRecord(path, f"{error} is missing") from None
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise DamagedRecord(path, error) from None


def _member(place: int) -> str:
    return f"{place:03d}.webp"


def _evaluation(values: Any, path: Path) -> EvaluationRecord:
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    prompts = values["prompts"]
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise ValueError("prompts must be texts")
    if not prompts:
        raise ValueError("it has no prompts")
    if not all(type(values[key]) is int for key in ("step", "num_steps")):
        raise ValueError("step and num_steps must be integers")
    return EvaluationRecord(
        step=values["step"],
        num_steps=values["num_steps"],
        prompts=prompts,
        scores=columns(values["scores"], "scores", len(prompts)),
        parts=_numbers(values["parts"], "parts"),
        monitors=columns(values.get("monitors", {}), "monitors", len(prompts)),
        base={
            str(name): _numbers(difference, f"base/{name}")
            for name, difference in values.get("base", {}).items()
        },
        guidance_scale=_guidance(values.get("guidance_scale")),
        path=path,
    )


def _guidance(value: Any) -> float | None:
    return None if value is None else numbers([value], "guidance_scale")[0]


def _numbers(values: Any, what: str) -> dict[str, float]:
    if not isinstance(values, dict):
        raise ValueError(f"{what} is not a JSON object")
    return {str(key): numbers([value], f"{what}/{key}")[0] for key, value in values.items()}
