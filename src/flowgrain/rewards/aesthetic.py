"""The aesthetic score of LAION."""

from collections.abc import Sequence

from torch import Tensor, nn

from flowgrain.data import Prompt
from flowgrain.rewards.checkpoints import linear_head, load_state, read_checkpoint
from flowgrain.rewards.clip import ClipReward
from flowgrain.rewards.options import OptionError


class Aesthetic(ClipReward):
    """LAION's aesthetic predictor v2 (Schuhmann et al. 2022, arXiv:2210.08402).

    Five linear layers on the image embedding of CLIP-L/14. Range: about 1 to 10. The prompt is not
    used. License: Apache-2.0 (head), MIT (CLIP). Input: 224 x 224 pixels, bicubic, center crop.

    Args:
        checkpoint: file with the linear layers (sac+logos+ava1-l14-linearMSE), as a path or as
            ORG/REPO/FILE on the Hugging Face Hub.
        path: directory or Hugging Face repository of the CLIP model.
        device: "cpu", "cuda" or "cuda:INDEX".
        allow_pickle: read the tensors of a checkpoint that is not a .safetensors file.
    """

    def __init__(
        self,
        checkpoint: str,
        path: str = "openai/clip-vit-large-patch14",
        device: str = "cpu",
        allow_pickle: bool = False,
    ) -> None:
        head = load_head(checkpoint, allow_pickle)
        super().__init__(path, device, mode="torchvision")  # the authors use OpenAI's clip package
        self.head = head.to(device)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:  # noqa: ARG002
        """Scores [I] of images [I, 3, H, W] in 0..1."""
        scores: Tensor = self.head(self.image_embeds(images)).squeeze(-1)
        return scores


def load_head(checkpoint: str, allow_pickle: bool) -> nn.Sequential:
    """The linear layers in a checkpoint (`layers.0.weight` and so on).

    Raises:
        OptionError: the checkpoint cannot be read, or is not a head of linear layers.
    """
    state = read_checkpoint(checkpoint, allow_pickle)
    state = {key.removeprefix("layers."): value for key, value in state.items()}
    try:
        head = linear_head(state)
    except (KeyError, ValueError) as error:
        raise OptionError(
            f"checkpoint={checkpoint}: not a head of linear layers (layers.0.weight and so on)."
        ) from error
    load_state(head, state, checkpoint, "the aesthetic head")
    return head.eval().requires_grad_(False)
