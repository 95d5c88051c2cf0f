"""What an engine is suspended and saved with, and whom it tells of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from llmuxd.engine.cuda import CudaCheckpoint
from llmuxd.engine.images import Image, Images


async def _fetch_nothing(_local: Image | None, _timeout: float) -> None:
    """There is no other place for images."""


@dataclass(frozen=True)
class Tools:
    """Of one engine."""

    cuda: CudaCheckpoint = field(default_factory=CudaCheckpoint)
    images: Images | None = None
    """Where it is saved; None if it cannot be."""
    before_saving: Callable[[], None] = lambda: None
    """Has everyone who keeps a connection to the engine close it."""
    tell: Callable[[str], None] = lambda text: None
    """Of the progress of what takes long."""
    fetch: Callable[[Image | None, float], Awaitable[None]] = _fetch_nothing
    """Brings a newer image here than the local one, if there is one elsewhere, within so many seconds."""
