"""DRaFT (arXiv 2309.17400)."""

from torch import Tensor

from flowgrain.core.tree import Planner
from flowgrain.methods.base import LearningRates, register
from flowgrain.methods.plans import initial_noise
from flowgrain.methods.reward_gradient import RewardGradient
from flowgrain.settings import Setting


@register
class DRaFT(RewardGradient):
    """DRaFT: the gradient of the reward through the last K steps of the sampler.

    With K above 1, the activations of a step are recomputed in the backward pass.
    """

    name = "draft"
    title = "DRaFT"
    paper = "2309.17400"
    summary = "Every image is trained by the gradient of its own reward."
    config_defaults = {  # published code of AlignProp: 50 steps. LoRA of rank 32: own choice
        "sampling": {"num_steps": 50},
        "lora": {"rank": 32},
    }
    learning_rates = LearningRates(lora=1e-3)  # published code of AlignProp

    last_steps: int = Setting(
        1, "Last sampling steps that have a gradient (K).", unit="steps", ge=1, le=10_000
    )  # abstract: DRaFT-1
    lv_samples: int = Setting(
        0,
        "DRaFT-LV: noised copies of every image whose last step is trained, in place of the "
        "sampled last step. 0: DRaFT-K.",
        unit="samples",
        ge=0,
        le=1000,
    )

    @property
    def gradient_steps(self) -> int:
        return self.last_steps

    @property
    def noise_samples(self) -> int:
        return self.lv_samples

    def plan(self, tree: Planner, step: int, seed: int) -> None:
        for root in initial_noise(tree, self.group_size, shared=False):
            start = tree.ode(root, to=tree.num_steps - self.last_steps)
            tree.keep(start)
            tree.image(tree.ode(start))

    def loss(self, reward: Tensor) -> Tensor:
        return -reward

    def published_passes(self, num_steps: int) -> int:
        return num_steps * self.group_size

    def check(self, num_steps: int) -> None:
        super().check(num_steps)
        if self.last_steps > num_steps:
            raise ValueError(
                f"last_steps={self.last_steps}: more than sampling.num_steps={num_steps}. "
                f"Use 1 to {num_steps}."
            )
        if self.lv_samples and self.last_steps > 1:
            raise ValueError(
                f"lv_samples={self.lv_samples}: DRaFT-LV trains one step. "
                "Use method.last_steps=1, or method.lv_samples=0."
            )
