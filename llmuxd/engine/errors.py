"""The one exception of the engine layer, and what a text of vLLM's says about memory."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmuxd.core.events import FailureKind

_OUT_OF_MEMORY = re.compile(
    r"out of memory|outofmemory|free memory on device|no available memory for the cache", re.IGNORECASE
)


class EngineError(Exception):
    """An operation on an engine did not succeed. `reason` is a sentence for a human."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.reason}"


def says_out_of_memory(text: str) -> bool:
    """Whether an error of vLLM's is that memory did not suffice."""
    return _OUT_OF_MEMORY.search(text) is not None


def log_says_out_of_memory(lines: Iterable[str]) -> bool:
    """Whether lines of a log report that memory did not suffice.

    Only those that speak of an error count: vLLM also warns of settings that might run out of memory.
    """
    return any("error" in line.lower() and says_out_of_memory(line) for line in lines)
