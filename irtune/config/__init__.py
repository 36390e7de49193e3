"""Configuration: typed sections, YAML plus dotted overrides, one validation pass that reports every error at once."""

from irtune.config.checks import check_config
from irtune.config.load import load_config, parser, write_config
from irtune.config.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TuningConfig,
)

__all__ = [
    "AdapterConfig",
    "Config",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TuningConfig",
    "check_config",
    "load_config",
    "parser",
    "write_config",
]
