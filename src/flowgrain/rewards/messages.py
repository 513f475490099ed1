"""Messages between a reward server and its clients: JSON, with images as base64 and no pickle.

Letters: I images of a request.
"""

import base64
import binascii
import io
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, NonNegativeInt
from torch import Tensor

from flowgrain.data import Prompt

TOKEN_VARIABLE = "FLOWGRAIN_TOKEN"
"""Environment variable with the bearer token of a reward server."""


class RawImages(BaseModel):
    """Images in 0..1 as little-endian float32.

    Attributes:
        shape: shape [I, 3, H, W].
        data: the values as base64.
    """

    model_config = ConfigDict(extra="forbid")

    shape: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt]
    data: str


class ScoreRequest(BaseModel):
    """A request to score images, with either `png` or `raw`.

    Attributes:
        reward: name of the reward on the server.
        prompts: text of each prompt.
        fields: the other fields of each prompt.
        png: images as PNG files in base64.
        raw: images as one tensor.
    """

    model_config = ConfigDict(extra="forbid")

    reward: str
    prompts: list[str]
    fields: list[dict[str, Any]] | None = None
    png: list[str] | None = None
    raw: RawImages | None = None

    def prompts_with_fields(self) -> list[Prompt]:
        """The prompts.

        Raises:
            ValueError: there are no prompts, or the numbers of fields and prompts differ.
        """
        if not self.prompts:
            raise ValueError("there are no prompts")
        fields = self.fields if self.fields is not None else [{} for _ in self.prompts]
        if len(fields) != len(self.prompts):
            raise ValueError(f"{len(fields)} fields for {len(self.prompts)} prompts")
        return [Prompt(text, columns) for text, columns in zip(self.prompts, fields, strict=True)]

    def images(self, max_bytes: int) -> Tensor:
        """The images [I, 3, H, W] in 0..1.

        Args:
            max_bytes: largest size of the decoded images.

        Raises:
            ValueError: the images cannot be decoded, or do not match the prompts.
        """
        if (self.png is None) == (self.raw is None):
            raise ValueError("give either png or raw")
        try:
            images = _decode_png(self.png, max_bytes) if self.png is not None else self._raw()
        except (
            binascii.Error,
            UnidentifiedImageError,
            Image.DecompressionBombError,
            OSError,
            ValueError,
            SyntaxError,
        ) as error:
            raise ValueError(f"the images cannot be decoded: {error}") from error
        if len(images) != len(self.prompts) or images.shape[1] != 3:
            raise ValueError(
                f"{len(images)} images with {images.shape[1]} channels "
                f"for {len(self.prompts)} prompts"
            )
        return images

    def _raw(self) -> Tensor:
        assert self.raw is not None
        values = np.frombuffer(base64.b64decode(self.raw.data, validate=True), dtype="<f4")
        return torch.from_numpy(values.reshape(self.raw.shape).copy())


class ScoreResponse(BaseModel):
    """The answer to a `ScoreRequest`.

    Attributes:
        scores: score of each image, None where scoring failed.
        reason: reason of the first failure.
    """

    scores: list[float | None]
    reason: str | None = None


class Health(BaseModel):
    """The answer to GET /health.

    Attributes:
        rewards: names of the rewards.
        identities: what the scores of a reward depend on, by name of the reward, see
            `reward_identity`.
    """

    rewards: list[str]
    identities: dict[str, dict[str, str]] = {}


def _decode_png(png: list[str], max_bytes: int) -> Tensor:
    # Only PNG: Pillow runs programs to read some other formats. Opening does not decode the pixels.
    files = (io.BytesIO(base64.b64decode(text, validate=True)) for text in png)
    images = [Image.open(file, formats=["PNG"]) for file in files]
    size = 12 * sum(image.width * image.height for image in images)
    if size > max_bytes:
        raise ValueError(f"they need more than {max_bytes} bytes")
    pixels = [np.array(image.convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
