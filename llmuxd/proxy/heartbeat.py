"""Signs of life for streams, so that no client, and nothing on the way to it, gives up: when they are due. What is
said is in `events`, and who may say it when in `relay`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Heartbeat:
    """Calls `beat` each time that `secs` have passed without `heard`, until it is stopped; never if `secs` is 0.

    `heard` only notes the time: one timer runs per `secs`, however much is heard.
    """

    __slots__ = ("_beat", "_heard", "_loop", "_secs", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, secs: float, beat: Callable[[], None]) -> None:
        self._loop = loop
        self._secs = secs
        self._beat = beat
        self._heard = loop.time()
        self._timer = loop.call_later(secs, self._due) if secs > 0 else None

    def heard(self) -> None:
        """Something was sent: there is a while to the next beat."""
        self._heard = self._loop.time()

    def stop(self) -> None:
        """Beat no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        rest = self._heard + self._secs - self._loop.time()
        if rest <= 0:
            self.heard()
            rest = self._secs
            self._beat()
        if self._timer is not None:
            self._timer = self._loop.call_later(rest, self._due)
