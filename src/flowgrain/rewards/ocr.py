"""Text in images, Flow-GRPO's task: what the prompt has in quotation marks against what is read in the image.

Shapes: I images. Reading is RapidOCR's: PP-OCRv4 on onnxruntime, its models in its wheel (extra `ocr`).
"""

import re

import numpy as np
import torch
from torch import Tensor

from flowgrain.rewards.base import RewardSource

_QUOTED = re.compile(r'"([^"]*)"|[\u201c\u201d\u201e]([^\u201c\u201d\u201e]*)[\u201c\u201d]')
_INSTALL = "pip install 'flowgrain[ocr]' (Python below 3.13)"


def quoted(prompt: str) -> list[str]:
    """The texts of `prompt` in straight or curly double quotation marks, in their order, without those that are blank."""
    found = (straight or curly for straight, curly in _QUOTED.findall(prompt))
    return [text for text in found if text.strip()]


def text_score(read: str, texts: list[str]) -> float:
    """How well `read` matches the wanted `texts`, 0..1; NaN if none is wanted. Case and spaces do not count.

    For one text Flow-GRPO's formula (Liu et al. 2025, arXiv:2505.05470): 1 where `read` contains it, otherwise
    1 - edit distance / its length, 0 at least. Several are taken as one, joined in their order; each that `read` contains,
    wherever it stands, earns its share of the letters at least.
    """
    from rapidfuzz.distance import Levenshtein

    wanted, there = [_bare(text) for text in texts], _bare(read)
    whole = "".join(wanted)
    if not whole:
        return float("nan")
    contained = sum(len(text) for text in wanted if text in there) / len(whole)
    return max(contained, 1 - Levenshtein.distance(there, whole) / len(whole))


def _bare(text: str) -> str:
    return "".join(text.split()).lower()


class OCR:
    """How well an image shows the text that its prompt quotes (Flow-GRPO, Liu et al. 2025, arXiv:2505.05470): 0..1, 1 all of it.

    A prompt that quotes nothing is not scored. Weights: PP-OCRv4 (PaddleOCR, Apache-2.0), in rapidocr-onnxruntime (Apache-2.0).
    Input: images of any size; the detector sees them with the shorter side at 736 at least, the recogniser lines 48 high.

    source.model is `detect` (the default: text is found, then read, top to bottom) or `line` (the image is one line of text, read
    as it is, which takes a tenth of the time). One thread of the processor, so that the same image always gives the same score.
    """

    def __init__(self, source: RewardSource) -> None:
        if source.model not in (None, "", "detect", "line"):
            raise ValueError(f"reward_models: ocr={source.model} is neither detect nor line; write ocr=detect or leave it out")
        self.detect = source.model != "line"
        try:
            import rapidfuzz  # noqa: F401
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            advice = "install the system's libgl1 and libglib2.0-0, or opencv-python-headless in place of opencv-python"
            way = advice if ".so" in str(error) else _INSTALL
            raise ValueError(f"rewards=ocr: RapidOCR could not be loaded ({error}); {way}") from error
        self.engine = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [I], NaN for prompts without quoted text."""
        wanted = [quoted(prompt) for prompt in prompts]
        pairs = zip(images, wanted, strict=True)
        return torch.tensor([text_score(self.read(image), texts) if texts else float("nan") for image, texts in pairs])

    def read(self, image: Tensor) -> str:
        """The text in an image [3, H, W] in 0..1, line after line without a break between them; empty if there is none."""
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        found, _ = self.engine(np.ascontiguousarray(pixels[..., ::-1]), use_det=self.detect, use_cls=False, use_rec=True)  # BGR
        # a line is [box, text, confidence] where text was looked for, and [text, confidence] where the image is the line
        return "".join(line[-2] for line in found or [])
