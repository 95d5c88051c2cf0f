"""What the control side asks of a running stack, and how it is told that something does not go."""

from __future__ import annotations

import difflib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llmuxd.core.eviction import Auto, EvictionPolicy

Progress = Callable[[dict[str, Any]], None]
"""Called with each step of a long operation: `event`, `text` and what belongs to it."""


class UnknownModel(Exception):
    """No model or alias of that name."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        super().__init__(f"no model {name!r}{hint} Configured: {', '.join(known) or 'none'}")
        self.name = name
        self.known = tuple(known)


class ControlFailed(Exception):
    """It was tried, and did not succeed; or it makes no sense. The text says why, `details` what there is to know."""

    def __init__(self, text: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(text)
        self.details = dict(details or {})


class NotAllowed(Exception):
    """The mode or the pin forbids it; nothing was tried."""


class BadConfig(Exception):
    """The config cannot be taken over, and nothing has changed. The text has a line for each problem."""


class Control(Protocol):
    """A running stack, as the handlers see it. Models are given by name or alias."""

    def status(self) -> dict[str, Any]: ...

    def evictions(self) -> dict[str, Any]: ...

    def config_json(self) -> dict[str, Any]: ...

    async def config_diff(self) -> dict[str, Any]: ...

    def resolve(self, name: str) -> str | None: ...

    def log_path(self, model: str) -> Path: ...

    def subscribe(self) -> AsyncGenerator[dict[str, Any], None]: ...

    def set_mode(self, mode: str) -> dict[str, Any]: ...

    def unpin(self) -> dict[str, Any]: ...

    def set_eviction(self, model: str, eviction: EvictionPolicy | Auto) -> dict[str, Any]: ...

    async def switch(self, model: str, progress: Progress) -> dict[str, Any]: ...

    async def wake(self, model: str, progress: Progress) -> dict[str, Any]: ...

    async def sleep(self, model: str, eviction: EvictionPolicy | None, progress: Progress) -> dict[str, Any]: ...

    async def stop(self, model: str, progress: Progress) -> dict[str, Any]: ...

    async def pin(self, model: str, progress: Progress) -> dict[str, Any]: ...

    async def reload(self, progress: Progress) -> dict[str, Any]: ...

    async def warmup(self, models: list[str] | None, progress: Progress) -> dict[str, Any]: ...

    async def checkpoint(
        self, model: str, eviction: EvictionPolicy | None, warmup: bool, progress: Progress
    ) -> dict[str, Any]: ...

    async def restore(self, model: str, detached: bool, progress: Progress) -> dict[str, Any]: ...

    async def validate(
        self, model: str, policies: Sequence[EvictionPolicy] | None, progress: Progress
    ) -> dict[str, Any]: ...
