"""Ranks, sharded parameters and checkpoint tensors.

Only this package uses torch.distributed.
"""

from flowgrain.distributed.world import (
    SINGLE,
    World,
    destroy_process_group,
    env_rank,
    init_process_group,
    local_world_size,
)

__all__ = [
    "SINGLE",
    "World",
    "destroy_process_group",
    "env_rank",
    "init_process_group",
    "local_world_size",
]
