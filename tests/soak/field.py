"""What all clients of a soak share: where the daemon is, the account, and whether it is time to ask or to be still."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field

from tests.soak.account import Account
from tests.soak.causes import Causes
from tests.soak.judge import Asked, How, Outcome, judge
from tests.soak.keys import Uses
from tests.soak.menu import Order, Served
from tests.soak.wire import Answer

DEADLINE_SECS = 120.0
"""No request takes longer, whatever happens to its engine."""


@dataclass
class Times:
    """Durations, in seconds, of the answers that were complete."""

    first_byte: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    queue: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    """First bytes of what llmuxd answers itself: how long its loop lets others wait."""


class Field:
    """The place where the soak happens. `wait` is how long the daemon lets requests wait at least."""

    def __init__(self, port: int, models: tuple[Served, ...], run: str, wait: float) -> None:
        self.port = port
        self.models = models
        self.wait = wait
        self.account = Account()
        self.causes = Causes()
        self.times = Times()
        self.uses = Uses()
        self.ids = (f"{run}-{number}" for number in itertools.count(1))
        self._open = asyncio.Event()
        self._busy = 0
        self._still = asyncio.Event()
        self._still.set()

    # Load and quiet

    def open(self) -> None:
        self._open.set()

    async def quiet(self) -> bool:
        """Let nobody begin anything, and wait until all have ended what they do; False if they do not."""
        self._open.clear()
        try:
            await asyncio.wait_for(self._still.wait(), DEADLINE_SECS + 10)
        except asyncio.TimeoutError:
            return False
        return True

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    async def begin(self) -> None:
        """Wait until the field is open, and do something then."""
        await self._open.wait()
        self._busy += 1
        self._still.clear()

    def end(self) -> None:
        self._busy -= 1
        if not self._busy:
            self._still.set()

    # Requests

    def enter(self, kind: str, order: Order, wait: float | None = None) -> Asked:
        """Open an entry. `wait` is how long the client itself will wait for its model."""
        asked = Asked(order, kind, self.wait if wait is None else min(wait, self.wait), time.monotonic())
        self.account.asked(asked)
        return asked

    def close(self, asked: Asked, outcome: Outcome) -> None:
        self.account.ended(asked, outcome)

    def answered(self, asked: Asked, answer: Answer) -> Outcome:
        """Judge an answer and close its entry."""
        outcome = judge(asked, answer, self.causes)
        self.close(asked, outcome)
        if outcome.how is How.COMPLETE:
            waited = answer.first_byte - asked.began
            if asked.order.model is None:
                # Of two in a row the second one waits for the first.
                if asked.kind != "pipelined":
                    self.times.own.append(waited)
            else:
                self.uses.add(asked.order.key.name, asked.began, answer.ended)
                self.times.total.append(answer.ended - asked.began)
                if not asked.order.stream:
                    # A stream may begin with signs of life, long before its engine does.
                    self.times.first_byte.append(waited)
                    self.times.queue.append(_queue_secs(answer.headers["server-timing"]))
        return outcome


def _queue_secs(timing: str) -> float:
    """The queue's part of a Server-Timing."""
    for part in timing.split(","):
        name, _, value = part.strip().partition(";dur=")
        if name == "queue":
            return float(value) / 1000
    return 0.0
