"""What is known of one engine, and of one incarnation of it. The work is in `engine`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from llmuxd.engine.api import VllmApi
from llmuxd.engine.process import EngineProcess
from llmuxd.engine.spec import EngineSpec
from llmuxd.engine.watch import Watch


@dataclass(frozen=True)
class EngineInfo:
    """What is known of an engine that answers."""

    pid: int
    create_time: float
    """Of the process, in seconds of the wall clock since the epoch, as psutil gives it."""
    version: str | None
    can_park: bool
    """Its /sleep takes `mode`: requests in flight can be kept or waited for (vLLM 0.17 or newer)."""
    can_sleep: bool
    """It has the development endpoints."""


@dataclass
class Run:
    """One incarnation, from before its spawn until everything of it is gone."""

    incarnation: int
    spec: EngineSpec
    """What it was started from; the config may have changed since."""
    fingerprint: str
    over: asyncio.Future[str]
    """Why no operation can succeed any more: it died, or it is being stopped."""
    claimed: bool = False
    """The address and the folder of ZMQ sockets are its own, to be removed at its end."""
    ready: bool = False
    suspended: bool = False
    """Its processes have been told to leave the device, and not to come back yet: they answer nothing."""
    api: VllmApi | None = None
    process: EngineProcess | None = None
    watch: Watch | None = None
    kill_at: float = 0.0
    stop_task: asyncio.Task[None] | None = field(default=None, repr=False)
