"""Text in images: compares the quoted text of the prompt with the text that OCR reads.

Letters: I images. The reader is RapidOCR: PP-OCRv4 on onnxruntime. Its package contains the models.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowgrain.data import Prompt
from flowgrain.settings import SettingsError

_QUOTED = re.compile(r'"([^"]*)"|[\u201c\u201d\u201e]([^\u201c\u201d\u201e]*)[\u201c\u201d]')


def quoted(prompt: str) -> list[str]:
    """The texts in straight or curly double quotes, in order, without blank texts."""
    texts = (straight or curly for straight, curly in _QUOTED.findall(prompt))
    return [text for text in texts if text.strip()]


def target_texts(prompt: str, texts: Literal["first", "all"]) -> list[str]:
    """The quoted texts of a prompt that an image should contain.

    Args:
        prompt: the prompt.
        texts: "all" takes all texts in straight or curly double quotes. "first" takes the text
            after the first straight double quote, as the code of Flow-GRPO, even if there is no
            closing quote. Without such a text, it takes the first text in curly quotes.
    """
    if texts == "all":
        return quoted(prompt)
    first = prompt.split('"')[1:2]
    return first if "".join(first).strip() else quoted(prompt)[:1]


def joined(lines: Iterable[tuple[str, float]]) -> str:
    """The texts of recognized lines (text, confidence), concatenated without a separator.

    Lines of confidence 0 do not count, as in the code of Flow-GRPO.
    """
    return "".join(text for text, confidence in lines if confidence > 0)


def text_score(read: str, texts: list[str]) -> float:
    """Similarity of recognized text and quoted texts. Case and spaces do not matter.

    For one text, this is the formula of Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): 1 if `read`
    contains the text, otherwise max(0, 1 - edit distance / length of the text). Several texts are
    concatenated. The score is at least the fraction of letters in texts that `read` contains.

    Args:
        read: the recognized text.
        texts: the quoted texts.

    Returns:
        The score in 0..1, NaN if there is no text.
    """
    from rapidfuzz.distance import Levenshtein

    targets, letters = [_letters(text) for text in texts], _letters(read)
    target = "".join(targets)
    if not target:
        return float("nan")
    contained = sum(len(text) for text in targets if text in letters) / len(target)
    return max(contained, 1 - Levenshtein.distance(letters, target) / len(target))


def _letters(text: str) -> str:
    return "".join(text.split()).lower()


class OCR:
    """Similarity of the text in an image and the quoted text (Flow-GRPO, arXiv:2505.05470).

    Range: 0..1. The score is 1 if the image contains the whole text. A prompt without quoted text
    has no score (NaN). License: PP-OCRv4 (PaddleOCR) and rapidocr-onnxruntime, Apache-2.0. Input:
    images of any size. The detector enlarges the shorter side to 736 pixels. The recognizer reads
    lines of 48 pixels.

    It runs in one thread on the CPU, so the same image always has the same score. It needs
    `pip install 'flowgrain[ocr]'` and Python below 3.13.

    Args:
        mode: "detect" finds lines of text and reads them from top to bottom. "line" reads the image
            as a single line of text, in a tenth of the time.
        texts: "all" scores all quoted texts of a prompt. "first" scores only the first one, as in
            the published code of Flow-GRPO.
    """

    def __init__(
        self,
        mode: Literal["detect", "line"] = "detect",
        texts: Literal["first", "all"] = "all",
    ) -> None:
        self.detect = mode == "detect"
        self.texts: Literal["first", "all"] = texts
        try:
            import rapidfuzz  # noqa: F401
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            fix = "Install it: pip install 'flowgrain[ocr]' (Python below 3.13)."
            if ".so" in str(error):
                fix = (
                    "Install the system packages libgl1 and libglib2.0-0, "
                    "or replace opencv-python by opencv-python-headless."
                )
            raise SettingsError(f"RapidOCR cannot be imported ({error}). {fix}") from error
        self.engine = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores [I] of images [I, 3, H, W] in 0..1. NaN for prompts without quoted text."""
        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            texts = target_texts(prompt.text, self.texts)
            scores.append(text_score(self.read(image), texts) if texts else float("nan"))
        return torch.tensor(scores)

    def read(self, image: Tensor) -> str:
        """The text in an image [3, H, W] in 0..1. Lines are concatenated without a separator."""
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        bgr = np.ascontiguousarray(pixels[..., ::-1])
        lines, _ = self.engine(bgr, use_det=self.detect, use_cls=False, use_rec=True)
        # A line is [box, text, confidence], or [text, confidence] without detection.
        return joined((line[-2], float(line[-1])) for line in lines or [])
