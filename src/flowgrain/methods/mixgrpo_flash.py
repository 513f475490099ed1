"""MixGRPO-Flash and MixGRPO-Flash* (arXiv 2507.21802, section 3.3)."""

from typing import Literal

from flowgrain.methods.base import register
from flowgrain.methods.mixgrpo import MixGRPO
from flowgrain.methods.window import WindowSchedule


@register
class MixGRPOFlash(MixGRPO):
    """MixGRPO with a compressed second-order ODE tail."""

    name = "mixgrpo_flash"
    title = "MixGRPO-Flash"

    tail_order: Literal[1, 2] = 2  # section 3.3
    tail_ratio: float = 0.4  # section 4
    window_interval: int = 20  # published code


@register
class MixGRPOFlashStar(MixGRPOFlash):
    """MixGRPO-Flash with a window that stays at the start of the grid."""

    name = "mixgrpo_flash_star"
    title = "MixGRPO-Flash*"

    tail_ratio: float = 0.2  # section 4
    window_schedule: WindowSchedule = "frozen"  # section 3.3
