"""The effective configuration as JSON holds it, for people to read: secrets are masked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from llmuxd.config.schema import KEYS
from llmuxd.config.types import Config
from llmuxd.core.eviction import Auto, EvictionPolicy
from llmuxd.core.settings import InFlight

MASK = "***"

_SECRETS = frozenset(key.path for key in KEYS if key.secret)
_SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(^|_)KEY", re.IGNORECASE)


def describe(config: Config) -> dict[str, Any]:
    """Every value in force, under the names of `Config`'s fields, masked if it is a secret.

    Secret are the keys that the table of keys calls so, and the values in a model's `env` whose names sound like it.
    """
    shown = _plain(config, "")
    assert isinstance(shown, dict)
    for model in shown["models"].values():
        model["env"] = {name: MASK if _SECRET_VARIABLE.search(name) else text for name, text in model["env"].items()}
    return shown


def plain(config: Config) -> dict[str, Any]:
    """The same with its secrets: not for people."""
    shown = _plain(config, "", masked=False)
    assert isinstance(shown, dict)
    return shown


def _plain(value: Any, path: str, *, masked: bool = True) -> Any:
    if masked and path in _SECRETS:
        return MASK
    if isinstance(value, (InFlight, Auto)):
        return value.value
    if isinstance(value, (EvictionPolicy, Path)):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _plain(item, f"{path}.*", masked=masked) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item, f"{path}[]", masked=masked) for item in value]
    if is_dataclass(value):
        prefix = f"{path}." if path else ""
        names = [field.name for field in fields(value)]
        return {name: _plain(getattr(value, name), prefix + name, masked=masked) for name in names}
    return value
