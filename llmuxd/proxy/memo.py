"""Remembering what was read before: the same comes again and again, and to read it costs more than a look. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")

MOST = 1024
"""Of more than these all are forgotten: what comes again is soon known again, whoever fills it with what does not."""


def remember(known: dict[_K, _V], key: _K, value: _V) -> None:
    """Know it from now on. How long a key may be is the caller's to bound: clients choose it."""
    if len(known) >= MOST:
        known.clear()
    known[key] = value
