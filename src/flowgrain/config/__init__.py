"""Settings of a run: schema, loading from YAML and the command line, recipes, model defaults."""

from flowgrain.config.load import load_config
from flowgrain.config.schema import Config

__all__ = ["Config", "load_config"]
