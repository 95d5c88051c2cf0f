"""What clients' and engines' connections both do with their transports."""

from __future__ import annotations

import asyncio


def pause_reading(transport: asyncio.Transport | None, paused: bool) -> None:
    """Read nothing more for now, or again; nothing if it is so already, or there is nothing to read any more."""
    if transport is not None and not transport.is_closing() and transport.is_reading() == paused:
        (transport.pause_reading if paused else transport.resume_reading)()
