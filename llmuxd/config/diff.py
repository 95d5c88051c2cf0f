"""What differs between two configurations, and when each difference counts if the second one is reloaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from llmuxd.config.describe import describe, plain
from llmuxd.config.errors import quoted
from llmuxd.config.types import Config


class Effect(str, Enum):
    """When a difference counts."""

    NOW = "now"
    WHEN_IDLE = "when idle"
    """The engine is started from it: the one that runs is stopped when it has nothing to do."""
    RESTART = "restart"
    """Not before the daemon is restarted."""


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. Secrets are masked in `old` and `new`; a model as a whole has neither."""

    path: str
    change: str
    """added, removed or changed"""
    effect: Effect
    old: Any = None
    new: Any = None

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "change": self.change,
            "old": self.old,
            "new": self.new,
            "effect": self.effect.value,
        }

    def __str__(self) -> str:
        when = {
            Effect.NOW: "",
            Effect.WHEN_IDLE: ", when its engine is next idle",
            Effect.RESTART: ", with the next restart of llmuxd",
        }[self.effect]
        return f"{self.path} is {self.change}{when}"


_NOT_COMPARED = ("runtime_dir", "state_dir", "warnings", "warmup")
"""Not from the files, or without meaning while the daemon runs."""

_RESTART = re.compile(r"port|listen|metrics_port|control_socket|control_read_group")
_WHEN_IDLE = re.compile(r"vllm_command|models\..*\.(model_path|port|extra_args|aliases|env(\..*)?|checkpoint_path)")


def changes(old: Config, new: Config) -> list[Change]:
    """Every difference, the models' last."""
    before, after = dict(_leaves(plain(old))), dict(_leaves(plain(new)))
    shown_before, shown_after = dict(_leaves(describe(old))), dict(_leaves(describe(new)))
    found = []
    for path in [*before, *(path for path in after if path not in before)]:
        model = _model_of(path, old, new)
        if path in _NOT_COMPARED or before.get(path) == after.get(path) or model is None:
            continue
        kind = "changed" if path in before and path in after else "added" if path in after else "removed"
        found.append(Change(path, kind, _effect(path), shown_before.get(path), shown_after.get(path)))
    found += [_whole(name, "removed") for name in old.models if name not in new.models]
    found += [_whole(name, "added") for name in new.models if name not in old.models]
    return found


def _whole(model: str, change: str) -> Change:
    effect = Effect.NOW if change == "added" else Effect.WHEN_IDLE
    return Change(f"models.{quoted(model)}", change, effect)


def _effect(path: str) -> Effect:
    if _RESTART.fullmatch(path):
        return Effect.RESTART
    return Effect.WHEN_IDLE if _WHEN_IDLE.fullmatch(path) else Effect.NOW


def _model_of(path: str, old: Config, new: Config) -> str | None:
    """Empty if the path is none of a model's; None if it is one of a model that only one of the two has."""
    for name in {*old.models, *new.models}:
        if path.startswith(f"models.{quoted(name)}."):
            return name if name in old.models and name in new.models else None
    return ""


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        path = f"{prefix}{quoted(name)}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value
