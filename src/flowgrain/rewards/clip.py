"""Rewards that compare image and prompt with a CLIP or SigLIP model: CLIP score and PickScore.

Letters: I images, H x W pixels, D dimensions of the embedding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.models.auto.image_processing_auto import get_image_processor_config

from flowgrain.data import Prompt
from flowgrain.rewards.checkpoints import loading
from flowgrain.rewards.open_clip import load_open_clip, open_clip_config, open_clip_preprocess
from flowgrain.rewards.options import OptionError, check_device
from flowgrain.rewards.preprocess import Mode, Preprocess, read_preprocess
from flowgrain.rewards.text import lower


class ClipReward:
    """Cosine similarity of image and prompt in the embedding of a CLIP or SigLIP model.

    Args:
        path: directory or Hugging Face repository of the model and its tokenizer.
        device: "cpu", "cuda" or "cuda:INDEX".
        model: a loaded model, in place of the model at `path`.
        mode: how images are resized, see `flowgrain.rewards.preprocess.fit`. Default: as
            preprocessor_config.json in `path` describes, or open_clip_config.json if there is no
            preprocessor_config.json.
        clean: applied to every prompt before the tokenizer, see `flowgrain.rewards.text`.
    """

    differentiable = True

    def __init__(
        self,
        path: str,
        device: str,
        *,
        model: PreTrainedModel | None = None,
        mode: Mode | None = None,
        clean: Callable[[str], str] | None = None,
    ) -> None:
        self.device, self.clean = check_device(device), clean
        with loading(path):
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModel.from_pretrained(path) if model is None else model
        self.tokenizer: Any = tokenizer
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.max_tokens = self.model.config.text_config.max_position_embeddings
        self.siglip = self.model.config.model_type.startswith("siglip")
        size = self.model.config.vision_config.image_size
        self.preprocess = Preprocess(size, mode) if mode else self._preprocess_of(path, size)

    def _preprocess_of(self, path: str, size: int) -> Preprocess:
        config = get_image_processor_config(path)
        described = None if config else open_clip_config(path)
        try:
            if described:
                return open_clip_preprocess(described, size)
            return read_preprocess(config, size, self.siglip)
        except ValueError as error:
            raise OptionError(f"path={path}: {error}.") from error

    def image_embeds(self, images: Tensor) -> Tensor:
        """Normalized embeddings [I, D] of images [I, 3, H, W] in 0..1."""
        pixels = self.preprocess(images.float().to(self.device))
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def text_embeds(self, texts: list[str]) -> Tensor:
        """Normalized embeddings [I, D] of texts. Long texts are truncated."""
        tokens = self.tokenizer(
            [self.clean(text) for text in texts] if self.clean else texts,
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        names = ("input_ids",) if self.siglip else ("input_ids", "attention_mask")
        inputs = {name: tokens[name].to(self.device) for name in names}
        return F.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Cosine similarities [I]."""
        texts = self.text_embeds([prompt.text for prompt in prompts])
        return (self.image_embeds(images) * texts).sum(-1)


class ClipScore(ClipReward):
    """CLIP score (Hessel et al. 2021, arXiv:2104.08718): cosine similarity of image and prompt.

    Range: -1..1, about 0.2 to 0.45 for good images. Any CLIP or SigLIP model can be used. Images
    are resized as its preprocessor_config.json or open_clip_config.json describes. Without these
    files, CLIP crops the center and SigLIP resizes both sides. Prompts of CLIP models are cleaned
    by `flowgrain.rewards.text.lower`, as in open_clip and OpenAI's clip package. SigLIP needs
    `pip install 'flowgrain[siglip]'`.

    Models and licenses:
        - openai/clip-vit-large-patch14 (Radford et al. 2021, arXiv:2103.00020): MIT.
        - apple/DFN5B-CLIP-ViT-H-14 (Fang et al. 2023, arXiv:2309.17425), 224 pixels, used by G2RPO:
          Apple's license, see the model card. G2RPO loads the file open_clip_pytorch_model.bin,
          which needs `checkpoint` and `allow_pickle=True`.
        - google/siglip-... (Zhai et al. 2023, arXiv:2303.15343): Apache-2.0.

    Args:
        path: directory or Hugging Face repository of the model and its tokenizer.
        device: "cpu", "cuda" or "cuda:INDEX".
        checkpoint: path of a file, or ORG/REPO/FILE on the Hugging Face Hub, with the parameters of
            a CLIP model and the names of open_clip or of transformers. Only the configuration and
            the tokenizer are then read from `path`. Default: the parameters in `path`.
        allow_pickle: read the tensors of a checkpoint that is not a .safetensors file.
    """

    def __init__(
        self,
        path: str = "openai/clip-vit-large-patch14",
        device: str = "cpu",
        checkpoint: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        check_device(device)
        model = load_open_clip(path, checkpoint, allow_pickle) if checkpoint else None
        super().__init__(path, device, model=model, clean=lower)
        if self.siglip:
            self.clean = None  # the tokenizer of SigLIP cleans prompts itself


class PickScore(ClipReward):
    """PickScore v1 (Kirstain et al. 2023, arXiv:2305.01569): a CLIP-H fine-tuned on Pick-a-Pic.

    Range: cosine similarity in -1..1, about 0.2. Other tools print 100 times this value. License
    of model and code: MIT. Input: 224 x 224 pixels, bicubic, center crop. Prompts are not cleaned:
    the authors use the tokenizer of transformers, which only normalizes Unicode (NFC), white space
    and case.

    Args:
        path: directory or Hugging Face repository of the model and its tokenizer.
        device: "cpu", "cuda" or "cuda:INDEX".
    """

    def __init__(self, path: str = "yuvalkirstain/PickScore_v1", device: str = "cpu") -> None:
        super().__init__(path, device)
