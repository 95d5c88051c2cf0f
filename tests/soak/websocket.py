"""A WebSocket's frames and handshake, as far as the soak's clients need them (RFC 6455)."""

from __future__ import annotations

import base64
import json
import struct
from random import Random
from typing import Any

from tests.soak.wire import NoAnswer, Wire

TEXT, CLOSE = 1, 8
MAX_FRAME = 2**20


def handshake(rng: Random) -> tuple[str, ...]:
    """The lines of a head that ask for one."""
    key = base64.b64encode(rng.randbytes(16)).decode()
    return ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}")


def frame(kind: int, payload: bytes, rng: Random) -> bytes:
    """One of a client's, which are masked."""
    mask = rng.randbytes(4)
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x80 | kind, 0x80 | size)
    else:
        head = struct.pack("!BBH", 0x80 | kind, 0x80 | 126, size)
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


def event(rng: Random, type: str, **more: Any) -> bytes:
    """A message of the realtime API."""
    return frame(TEXT, json.dumps({"type": type, **more}).encode(), rng)


async def read_event(wire: Wire) -> dict[str, Any] | None:
    """The next message; None if the other side has closed. Raises NoAnswer."""
    try:
        first, second = await wire.exactly(2)
    except NoAnswer:
        return None
    size = second & 0x7F
    if size == 126:
        (size,) = struct.unpack("!H", await wire.exactly(2))
    if second & 0x80 or size > MAX_FRAME or first & 0x70:
        raise NoAnswer(f"a frame that begins with {first:02x} {second:02x}")
    payload = await wire.exactly(size)
    if first & 0x0F == CLOSE:
        return None
    if first & 0x0F != TEXT:
        raise NoAnswer(f"a frame of kind {first & 0x0F}")
    try:
        found: dict[str, Any] = json.loads(payload)
    except ValueError as error:
        raise NoAnswer(f"a message that is no JSON: {payload[:100]!r}") from error
    return found
