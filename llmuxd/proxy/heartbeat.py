"""Signs of life for streams, so that no client, and nothing on the way to it, gives up: when they are due, and the
head of a stream that has nothing else to say yet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from llmuxd.proxy.headers import REQUEST_ID, SERVER_TIMING


class Heartbeat:
    """Calls `beat` each time that `secs` have passed without `heard`, while it is entered; never if `secs` is 0.

    `heard` only notes the time: one timer runs per `secs`, however much is heard. A beat is never cut short, and
    none is under way any more when the context is left.
    """

    def __init__(self, secs: float, beat: Callable[[], Awaitable[None]]) -> None:
        self._secs = secs
        self._beat = beat
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None
        self._heard = 0.0

    async def __aenter__(self) -> Heartbeat:
        if self._secs > 0:
            self.heard()
            self._timer = self._loop.call_later(self._secs, self._due)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._beating is not None and not self._beating.done():
            await asyncio.wait({self._beating})

    def heard(self) -> None:
        self._heard = self._loop.time()

    def _due(self) -> None:
        rest = self._heard + self._secs - self._loop.time()
        if rest > 0:
            self._timer = self._loop.call_later(rest, self._due)
        else:
            self._beating = self._loop.create_task(self._beat_once())

    async def _beat_once(self) -> None:
        try:
            await self._beat()
        except OSError:
            return  # The client is gone. Its connection tells whoever serves it.
        if self._timer is not None:
            self.heard()
            self._timer = self._loop.call_later(self._secs, self._due)


def waiting_response(request_id: str, timing: str) -> web.StreamResponse:
    """The head of an event stream, for a client that waits: whatever comes of it is said in events."""
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            REQUEST_ID: request_id,
            SERVER_TIMING: timing,
        }
    )
    response.enable_chunked_encoding()
    return response
