"""GenEval (Ghosh et al. 2023): checks objects, counts, colors and positions in an image.

Letters: I images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from flowgrain.data import Prompt
from flowgrain.rewards.base import Explanation
from flowgrain.rewards.colors import ClipColors, ColorClassifier
from flowgrain.rewards.detection import Box, Detector, load_detector
from flowgrain.rewards.geneval_rules import (
    check_requirements,
    colored_boxes,
    graded_credit,
    kept_boxes,
    read_requirements,
    strict_verdict,
)
from flowgrain.rewards.options import OptionError

Score = Literal["graded", "strict"]
Fraction = Annotated[float, Field(ge=0, le=1)]

_COUNTING = "counting"
_NO_TASK = "no task"


class DetectionReward:
    """The GenEval score from the boxes of any detector and the colors of any classifier.

    The requirements are fields of the prompts if GenEval's file is the prompt file. Otherwise they
    are read from `prompt_file`. A prompt without requirements has no score (NaN).

    Args:
        detector: the detector.
        colors: the classifier of colors.
        prompt_file: GenEval's prompt file, for prompts that have only a text.
        score: "graded" or "strict", see `GenEval`.
        threshold: a box counts if its score is higher.
        counting_threshold: the same for prompts of the task `counting`.
        max_boxes: number of boxes of a class that count, from the highest score.

    Raises:
        OptionError: the prompt file cannot be used.
    """

    mean_of_parts = True

    def __init__(
        self,
        detector: Detector,
        colors: ColorClassifier,
        prompt_file: str | None = None,
        score: Score = "graded",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_boxes: int = 16,
    ) -> None:
        self.detector, self.colors, self.score = detector, colors, score
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.max_boxes = max_boxes
        self.requirements: dict[str, dict[str, Any]] = {}
        if prompt_file is not None:
            path = Path(prompt_file).expanduser()
            if not path.is_file():
                raise OptionError(
                    f"prompt_file={prompt_file}: there is no such file. "
                    "Give the path of GenEval's prompt file."
                )
            try:
                self.requirements = read_requirements(path, detector.classes)
            except ValueError as error:
                raise OptionError(f"prompt_file={error}.") from error

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [I] of images [I, 3, H, W] in 0..1.

        Raises:
            ValueError: the requirements of a prompt are invalid, or have a class that the detector
                does not know.
        """
        return torch.as_tensor(self.explain(images, prompts).scores)

    def explain(self, images: Tensor, prompts: Sequence[Prompt]) -> Explanation:
        """The scores. By task (`tag`): the verdict of the benchmark, 1 or 0, for every `score`."""
        lines = [self._requirements(prompt) for prompt in prompts]
        scores = torch.full((len(images),), torch.nan)
        parts: dict[str, Tensor] = {}
        for i, (image, line) in enumerate(zip(images, lines, strict=True)):
            if line is None:
                continue
            objects = self._objects(image, line)
            correct = float(strict_verdict(line, objects).correct)
            task = str(line.get("tag") or _NO_TASK)
            parts.setdefault(task, torch.full_like(scores, torch.nan))[i] = correct
            scores[i] = correct if self.score == "strict" else graded_credit(line, objects).value
        return Explanation(scores, parts)

    def _requirements(self, prompt: Prompt) -> Mapping[str, Any] | None:
        """The requirements of a prompt, or None.

        Raises:
            ValueError: they are invalid.
        """
        if "include" not in prompt.fields:
            return self.requirements.get(prompt.text)
        try:
            check_requirements(prompt.fields, self.detector.classes)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.text!r}: {error}") from None
        return prompt.fields

    def _objects(self, image: Tensor, requirements: Mapping[str, Any]) -> dict[str, list[Box]]:
        """The boxes that count by class, with colors where they matter."""
        counting = requirements.get("tag") == _COUNTING
        threshold = self.counting_threshold if counting else self.threshold
        image = (image.clamp(0, 1) * 255).round() / 255  # the benchmark reads 8-bit images
        objects = kept_boxes(self.detector(image, threshold), threshold, self.max_boxes)
        for name, number in colored_boxes(requirements, objects).items():
            named = self.colors(image, objects[name][:number], name)
            for i, color in enumerate(named):
                objects[name][i] = replace(objects[name][i], color=color)
        return objects


class GenEval(DetectionReward):
    """GenEval (Ghosh et al. 2023, arXiv:2310.11513) with Mask2Former and CLIP of transformers.

    `score="graded"` is the training reward of Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): the
    mean over all counts, colors and positions of a prompt. A count or a color earns
    1 - |found - wanted| / wanted, a position earns 1 or 0. Range: at most 1. It is negative if far
    too many objects are found. `score="strict"` is 1 if the image meets all requirements by the
    rules of the benchmark, otherwise 0. With both, the results by task are those of the benchmark,
    and their mean is its overall score.

    The requirements are fields of the prompts if GenEval's file is the prompt file. Otherwise they
    are read from `prompt_file`. A prompt without requirements has no score (NaN).

    Licenses: rules and CLIP MIT. The license of the detector depends on the model.

    Args:
        path: directory or Hugging Face repository of the detector. Mask2Former models have masks.
            Object detection models such as facebook/detr-resnet-101 have only boxes. The
            background is then visible in the crops from which colors are read.
        prompt_file: GenEval's prompt file, for prompts that have only a text.
        device: "cpu", "cuda" or "cuda:INDEX".
        score: "graded" (partial credit) or "strict" (verdict of the benchmark).
        threshold: a box counts if its score is higher, 0..1.
        counting_threshold: the same for prompts of the task `counting`, 0..1.
        max_boxes: number of boxes of a class that count, from the highest score.
        color_model: directory or Hugging Face repository of the CLIP model that names colors.
    """

    def __init__(
        self,
        path: str = "facebook/mask2former-swin-small-coco-instance",
        prompt_file: str | None = None,
        device: str = "cpu",
        score: Score = "graded",
        threshold: Fraction = 0.3,
        counting_threshold: Fraction = 0.9,
        max_boxes: Annotated[int, Field(ge=1)] = 16,
        color_model: str = "openai/clip-vit-large-patch14",
    ) -> None:
        super().__init__(
            load_detector(path, device),
            ClipColors(color_model, device),
            prompt_file,
            score,
            threshold,
            counting_threshold,
            max_boxes,
        )
