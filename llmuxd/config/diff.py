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
    """One difference. Secrets are masked in `old` and `new`; a model or a client's key as a whole has neither.

    A client's key goes by its name, `keys.alice`: where in the files it stands makes no difference.
    """

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
    """Every difference; the models and the clients' keys that come or go are last."""
    before, after = _flat(plain(old)), _flat(plain(new))
    shown_before, shown_after = _flat(describe(old)), _flat(describe(new))
    had, has = _wholes(old), _wholes(new)
    in_one = tuple(f"{path}." for path in {*had}.symmetric_difference(has))
    found = []
    for path in [*before, *(path for path in after if path not in before)]:
        if path in _NOT_COMPARED or path.startswith(in_one) or before.get(path) == after.get(path):
            continue
        kind = "changed" if path in before and path in after else "added" if path in after else "removed"
        found.append(Change(path, kind, _effect(path), shown_before.get(path), shown_after.get(path)))
    found += [_whole(path, "removed") for path in had if path not in has]
    found += [_whole(path, "added") for path in has if path not in had]
    return found


def _wholes(config: Config) -> list[str]:
    """The paths of what comes and goes as a whole."""
    return [f"models.{quoted(name)}" for name in config.models] + [f"keys.{quoted(key.name)}" for key in config.keys]


def _whole(path: str, change: str) -> Change:
    waits = change == "removed" and path.startswith("models.")
    return Change(path, change, Effect.WHEN_IDLE if waits else Effect.NOW)


def _effect(path: str) -> Effect:
    if _RESTART.fullmatch(path):
        return Effect.RESTART
    return Effect.WHEN_IDLE if _WHEN_IDLE.fullmatch(path) else Effect.NOW


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> value; of the clients' keys, the names are parts of the paths."""
    return dict(_leaves({**tree, "keys": {key["name"]: key for key in tree["keys"]}}))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        path = f"{prefix}{quoted(name)}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value
