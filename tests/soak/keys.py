"""Who the clients are to the daemon: keys with limits, and whether a limit was kept. Pure."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

WINDOW_SECS = 60.0
MARK = "llmux-soak-key-"
"""Begins every key: what has it in it and is no client has something that it should not have."""


@dataclass(frozen=True)
class Key:
    """One client's key, and what the daemon's config says of it."""

    name: str
    models: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    max_parallel: int | None = None
    priority: int = 0
    weight: int = 1
    """How many of the clients have it, against the others."""

    @property
    def secret(self) -> str:
        return f"{MARK}{self.name}"

    @property
    def limited(self) -> bool:
        return self.requests_per_minute is not None or self.max_parallel is not None

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models

    def config(self) -> dict[str, Any]:
        """Its table in the config."""
        found: dict[str, Any] = {"name": self.name, "sha256": hashlib.sha256(self.secret.encode()).hexdigest()}
        for key in ("models", "requests_per_minute", "max_parallel", "priority"):
            value = getattr(self, key)
            if value is not None:
                found[key] = list(value) if isinstance(value, tuple) else value
        return found


KEYS = (
    Key("anyone", priority=5, weight=6),
    Key("hasty", requests_per_minute=100, weight=1),
    Key("broad", max_parallel=3, weight=1),
    Key("narrow", models=("amber", "birch"), weight=1),
)


class Uses:
    """When requests that models answered began and ended, by the name of their key."""

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, key: str, began: float, ended: float) -> None:
        self._spans[key].append((began, ended))

    def problems(self, keys: tuple[Key, ...] = KEYS) -> list[str]:
        """Where a key was given more than it may have, seen from outside: what lies in a minute as a whole counts."""
        found = []
        for key in keys:
            most = key.requests_per_minute
            spans = sorted(self._spans[key.name], key=lambda span: span[1])
            ends = [ended for _, ended in spans]
            for began, _ in spans if most is not None else ():
                within = spans[: bisect_right(ends, began + WINDOW_SECS)]
                count = sum(other >= began for other, _ in within)
                if most is not None and count > most:
                    found.append(f"{key.name} had {count} requests answered in a minute, not {most}")
                    break
        return found
