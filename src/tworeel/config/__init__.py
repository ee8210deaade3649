"""A run's configuration: the schema of its TOML file, strict reading and writing."""

from tworeel.config.loading import load_config
from tworeel.config.schema import RunConfig
from tworeel.config.writing import dump_config

__all__ = ["RunConfig", "dump_config", "load_config"]
