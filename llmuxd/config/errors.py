"""What is wrong with a configuration, and how errors spell values and key paths."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SHOWN_LENGTH = 60
"""Characters of a wrong value that an error shows."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and where. `key` is empty if it concerns the whole file."""

    file: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key}: {self.text}" if self.key else f"{self.file}: {self.text}"


class ConfigError(Exception):
    """The configuration is wrong; nothing was started. The text names every problem, a line each."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def shown(value: Any) -> str:
    """A value as it might be written, on one line, printable, and not too long."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, RecursionError):
        # An integer of thousands of digits, or lists in lists without end: both can be read from a file.
        return f"{type(value).__name__} too large to show"
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return text if len(text) <= SHOWN_LENGTH else text[: SHOWN_LENGTH - 4] + " ..."


def quoted(name: str) -> str:
    """A name as a part of a key path, as TOML writes it."""
    bare = name and all(char.isascii() and (char.isalnum() or char in "-_") for char in name)
    return name if bare else shown(name)


def path_of(model: str, key: str) -> str:
    """The path of a model's key."""
    return f"models.{quoted(model)}.{key}"
