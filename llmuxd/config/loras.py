"""The LoRA modules that a model's own arguments name (`vllm serve --lora-modules`): each is a name for clients."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_FLAG = "--lora-modules"


def lora_names(arguments: Sequence[str]) -> tuple[str, ...]:
    """Their names, in order: of `NAME=PATH`, or of `{"name": ..., "path": ...}`. The rest is for vLLM to refuse."""
    found: list[str] = []
    reading = False
    for argument in arguments:
        if argument.startswith("--"):
            flag, _, value = argument.partition("=")
            reading = flag.replace("_", "-") == _FLAG
            if reading and value:
                found.append(_name_of(value))
        elif reading:
            found.append(_name_of(argument))
    return tuple(dict.fromkeys(name for name in found if name))


def _name_of(module: str) -> str:
    if not module.lstrip().startswith(("{", "[")):
        return module.partition("=")[0] if "=" in module else ""
    try:
        value: Any = json.loads(module)
    except ValueError:
        return ""
    name = value.get("name") if isinstance(value, dict) else None
    return name if isinstance(name, str) else ""
