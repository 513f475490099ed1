"""The pages that look into runs: a local server, and static exports. Nothing here imports torch."""

from flowgrain.view.app import create_app
from flowgrain.view.catalog import Catalog

__all__ = ["Catalog", "create_app"]
