"""The configuration: `load_config` reads and checks it, the classes hold it, `KEYS` documents it.

`types` holds it, `kinds` and `schema` say what it may be, `reading`, `checks` and `load` make it of files, and `diff`
compares two.
"""

from __future__ import annotations

from llmuxd.config.checks import is_loopback
from llmuxd.config.describe import describe
from llmuxd.config.diff import Change, Effect, changes
from llmuxd.config.errors import ConfigError, Problem
from llmuxd.config.load import load_config, parse_config
from llmuxd.config.schema import KEYS, Key, nearest
from llmuxd.config.types import (
    DEFAULT_LISTEN,
    DEFAULT_PORT,
    CheckpointConfig,
    Config,
    KeyConfig,
    ModelConfig,
    ObjectStoreConfig,
    PolicyConfig,
)

__all__ = [
    "DEFAULT_LISTEN",
    "DEFAULT_PORT",
    "KEYS",
    "Change",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "Effect",
    "Key",
    "KeyConfig",
    "ModelConfig",
    "ObjectStoreConfig",
    "PolicyConfig",
    "Problem",
    "changes",
    "describe",
    "is_loopback",
    "load_config",
    "nearest",
    "parse_config",
]
