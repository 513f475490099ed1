"""The training step at full size without weights and without a GPU: `flowgrain rehearse`."""
