"""Settings of the recorded groups of training steps."""

from flowgrain.config.limits import MAX_PROMPTS, MAX_ROWS
from flowgrain.records.images import LOSSLESS
from flowgrain.settings import Section, Setting


class RecordConfig(Section):
    """Groups of training steps that the run keeps for `flowgrain view` and notebooks."""

    prompts: int = Setting(
        2,
        "Prompts of every step whose images are recorded. 0: nothing is recorded.",
        unit="prompts",
        ge=0,
        le=MAX_PROMPTS,
    )
    steps: int = Setting(
        100,
        "Largest number of steps on the disk. If there are more, only the multiples of a stride "
        "are kept, which doubles each time. 0: nothing is recorded.",
        unit="steps",
        ge=0,
        le=100_000,
    )
    thumbnail: int = Setting(
        160, "Largest size of a recorded image.", unit="pixels", ge=LOSSLESS, le=4096
    )
    full_size: int = Setting(
        2,
        "Images of every recorded prompt in full size, the best and the worst. Images of at most "
        f"{LOSSLESS} pixels always have their full size.",
        unit="images",
        ge=0,
        le=MAX_ROWS,
    )
    megabytes: int = Setting(
        500,
        "Largest size of the recorded steps on the disk. If they need more, the stride doubles. "
        "The latest step is always kept.",
        unit="MB",
        ge=1,
        le=10_000_000,
    )
