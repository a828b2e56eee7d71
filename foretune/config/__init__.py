"""What the user wants: `schema` says which keys there are, `load` reads them from a file and a command line."""

from foretune.config.load import load_config, parse_config, parse_setting, to_yaml
from foretune.config.schema import Config, DataConfig, DataSource

__all__ = ["Config", "DataConfig", "DataSource", "load_config", "parse_config", "parse_setting", "to_yaml"]
