"""Who looks on: the daemon's log as it is written, /health twice a second, and what the daemon uses when all is quiet."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.account import Account
from tests.soak.field import Field
from tests.soak.judge import How, Outcome, fault
from tests.soak.keys import MARK
from tests.soak.menu import Order
from tests.soak.stand import Usage
from tests.soak.wire import NoAnswer, Wire

HEALTH_SECS = 0.5
MOST_UNHEALTHY_SECS = 10.0
"""An engine that hangs may hold a queue up for a moment; the daemon has to find a way out of it."""

MORE_FDS = 4
MORE_THREADS = 6
MORE_MIB = 24.0
"""What the daemon may have more of late than early: its pool of threads fills, bodies of 8 MiB come and go."""

LOG_SECS = 0.5
_TIME = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
_RECORD = re.compile(_TIME + r",\d{3} (?P<level>[A-Z]+) (?P<text>.*)")
_ACCESS = re.compile(_TIME + r" id=(?P<id>\S+) key=\S+ model=\S+ method=\S+ path=\S+ status=(?P<status>\d{3}) ")
_EXPECTED = (
    re.compile(r"switch \d+ failed after "),
    re.compile(r"the config is not reloaded, nothing has changed"),
)
"""Errors that the saboteur is the cause of."""


class Log:
    """The daemon's log: access lines go to the account, errors that nobody expects are kept."""

    def __init__(self, path: Path, account: Account) -> None:
        self._path = path
        self._account = account
        self._at = 0
        self._rest = b""
        self.access_lines = 0
        self.warnings = 0
        self.problems: list[str] = []

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            self.read()
            await asyncio.sleep(LOG_SECS)

    def read(self) -> None:
        """Take in what has been written since."""
        for line in self._new_lines():
            self.take(line)

    def take(self, line: str) -> None:
        """One line; those without a time belong to the record before them."""
        if MARK in line:
            self.problems.append(f"a key stands in the log: {line[:300]}")
        access = _ACCESS.match(line)
        record = _RECORD.match(line)
        if access is not None:
            self.access_lines += 1
            self._account.logged(access["id"], int(access["status"]))
        elif record is not None:
            self._record(record["level"], record["text"])
        elif self._is_told and len(self.problems[-1]) < 3000:
            self.problems[-1] += f"\n    {line}"

    def _record(self, level: str, text: str) -> None:
        expected = any(known.match(text) for known in _EXPECTED)
        self._is_told = level in ("ERROR", "CRITICAL") and not expected
        if self._is_told:
            self.problems.append(f"{level} {text}")
        self.warnings += level == "WARNING"

    _is_told = False
    """The last record is a problem."""

    def _new_lines(self) -> Iterator[str]:
        with self._path.open("rb") as file:
            file.seek(self._at)
            new = file.read()
        self._at += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return (line.decode("utf-8", "replace") for line in lines)


class Health:
    """Asks /health on one connection, as a load balancer does."""

    def __init__(self, field: Field) -> None:
        self._field = field
        self.longest = 0.0
        """For how long it was unhealthy at most, in seconds."""
        self._since: float | None = None
        self.reasons: list[str] = []

    async def follow(self) -> None:
        """Until cancelled, at a time when nothing is under way."""
        wire: Wire | None = None
        while True:
            await asyncio.sleep(HEALTH_SECS)
            if wire is not None and not self._field.is_open:
                wire.close()
                wire = None
            await self._field.begin()
            try:
                wire = wire or await Wire.open(self._field.port)
                if not await self._ask(wire):
                    wire.close()
                    wire = None
            finally:
                self._field.end()

    async def _ask(self, wire: Wire) -> bool:
        """One look; whether the connection can be used again."""
        asked = self._field.enter("health", Order(next(self._field.ids), "GET", "/health"))
        head = f"GET /health HTTP/1.1\r\nHost: llmux.test\r\nx-request-id: {asked.id}\r\n\r\n"
        try:
            await wire.send(head.encode())
            answer = await asyncio.wait_for(wire.answer("GET"), MOST_UNHEALTHY_SECS)
        except (OSError, NoAnswer, asyncio.TimeoutError) as error:
            self._field.close(asked, fault(f"/health: {error!r}"))
            return False
        self._field.times.own.append(answer.first_byte - asked.began)
        self._field.close(asked, Outcome(How.COMPLETE, "", answer.status, frozenset({answer.status})))
        self._saw(answer.status == 200, answer.body.decode("utf-8", "replace"))
        return answer.keeps

    def _saw(self, healthy: bool, reason: str) -> None:
        now = time.monotonic()
        if healthy:
            self._since = None
            return
        if self._since is None:
            self._since = now
            self.reasons.append(reason[:200])
        self.longest = max(self.longest, now - self._since)


@dataclass
class Usages:
    """What the daemon used at each quiet moment, the first one right after all engines had started."""

    at: list[float] = field(default_factory=list)
    """Seconds since the beginning."""
    usage: list[Usage] = field(default_factory=list)
    descriptors: str = ""
    """What they were the last time."""

    def add(self, at: float, usage: Usage, descriptors: str = "") -> None:
        self.at.append(at)
        self.usage.append(usage)
        self.descriptors = descriptors

    def problems(self) -> list[str]:
        """What grows although it should not. Memory may, at first: caches fill."""
        if len(self.usage) < 3:
            return []
        first, third = self.usage[0], len(self.usage) // 3
        middle, last = self.usage[third : 2 * third], self.usage[-third:]
        found = []
        fds, threads = min(u.fds for u in last), min(u.threads for u in last)
        if fds > first.fds + MORE_FDS:
            found.append(f"file descriptors: {first.fds} at first, {fds} at last ({self.descriptors})")
        if threads > first.threads + MORE_THREADS:
            found.append(f"threads: {first.threads} at first, {threads} at last")
        early, late = min(u.rss_mib for u in middle), min(u.rss_mib for u in last)
        if late > early * 1.1 + MORE_MIB:
            found.append(f"resident memory: {early:.0f} MiB in the middle, {late:.0f} MiB at last")
        return found
