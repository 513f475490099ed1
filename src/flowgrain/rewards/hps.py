"""Human Preference Score v2 and v2.1."""

from flowgrain.rewards.clip import ClipReward
from flowgrain.rewards.open_clip import load_open_clip
from flowgrain.rewards.options import check_device
from flowgrain.rewards.text import lower


class HPS(ClipReward):
    """HPS v2 and v2.1 (Wu et al. 2023, arXiv:2306.09341): a CLIP-H fine-tuned on HPDv2.

    Range: cosine similarity in -1..1, about 0.25 to 0.4. License of the checkpoint: Apache-2.0.
    Input: 224 x 224 pixels, the longer side resized (bicubic), the rest black. Prompts are cleaned
    by `flowgrain.rewards.text.lower`, as in HPSv2.

    The published checkpoints are pickle files and need `allow_pickle=True`.

    Args:
        checkpoint: path of a file, or ORG/REPO/FILE on the Hugging Face Hub, with the names of
            open_clip or of transformers. The default is v2.1. HPS_v2_compressed.pt is v2.
        path: directory or Hugging Face repository with the configuration and the tokenizer of the
            CLIP model.
        device: "cpu", "cuda" or "cuda:INDEX".
        allow_pickle: read the tensors of a checkpoint that is not a .safetensors file.
    """

    def __init__(
        self,
        checkpoint: str = "xswu/HPSv2/HPS_v2.1_compressed.pt",
        path: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str = "cpu",
        allow_pickle: bool = False,
    ) -> None:
        check_device(device)
        model = load_open_clip(path, checkpoint, allow_pickle)
        super().__init__(path, device, model=model, mode="pad", clean=lower)
