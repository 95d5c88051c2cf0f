"""The live watchdog: is the scheduler alive, does every queue move that should, do the invariants hold.

Once a second a probe goes through the same door as every other event, and its answer is looked at. `healthy` is
what /health answers; the pings to systemd's watchdog depend on `alive`, which is all that a restart mends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.audit import INVARIANTS, Auditor, Violation
from llmuxd.core.switcher import Switcher
from llmuxd.metrics import Metrics

PROBE_SECS = 1.0
LATE_SECS = 5.0
"""With the last answer older than this the scheduler is taken for dead."""

STOOD_STILL_SECS = 1.0
"""A timer that is so late says that something blocks the event loop."""

TELL_AGAIN_SECS = 60.0

log = logging.getLogger("llmuxd")


class SelfCheck:
    """Watches one switcher. `post` hands an event to it; `clock` is the same as the runtime's."""

    def __init__(
        self, switcher: Switcher, post: Callable[[e.Event], None], clock: Callable[[], float], metrics: Metrics
    ) -> None:
        self._auditor = Auditor(switcher)
        self._post = post
        self._clock = clock
        self._metrics = metrics
        self._probe = 0
        self._handled: float | None = None
        """When the last probe was; None as long as none is sent."""
        self._stalls: tuple[c.Stall, ...] = ()
        self._broken = ""
        self.broke = asyncio.Event()
        """Set once the core broke."""
        self.late_secs = 0.0
        """How late the timer of the last probe was."""
        self._told: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    # What the runtime tells

    def handled(self, event: e.Event, commands: Sequence[c.Command], now: float) -> None:
        """An event was handled, and these commands came of it."""
        for command in commands:
            if isinstance(command, c.Probed):
                self._answered(command, now)
            elif isinstance(command, c.PolicyFailed) and self._tell(f"policy {command.policy}", now):
                log.error("policy %s failed, fifo decided: %s", command.policy, command.problem)
        if self._broken:
            return  # What is known to be broken breaks invariants, too.
        try:
            violation = self._auditor.observe(event, commands, now)
        except Exception:
            if self._tell("audit", now):
                log.exception("the audit broke over %r", event)
            return
        if violation is not None:
            self._violated(violation, now)

    def failed(self, over: str, error: Exception) -> None:
        """The core broke over an event, or a command of it could not be begun: what it says is not to be relied on
        any more."""
        text = f"the scheduler broke over {over.partition('(')[0]}: {error!r}"
        self._broken = self._broken or text
        self.broke.set()
        if self._tell(f"broke over {over.partition('(')[0]}", self._clock()):
            log.critical("%s; restart llmuxd. It was %s", text, over, exc_info=error)

    # What others ask

    def healthy(self) -> tuple[bool, str]:
        """Whether all is well, and the reason if not."""
        alive, reason = self.alive()
        if not alive or not self._stalls:
            return alive, reason
        worst = max(self._stalls, key=lambda stall: stall.waiting)
        return False, f"{worst.model} has waited {worst.waiting:.0f} s: {worst.reason}"

    def alive(self) -> tuple[bool, str]:
        """Whether events are handled in time. If not, only a restart helps."""
        if self._broken:
            return False, self._broken
        late = 0.0 if self._handled is None else self._clock() - self._handled
        if late > LATE_SECS:
            return False, f"the scheduler has not answered for {late:.0f} s"
        return True, "ok"

    # Probing

    def start(self) -> None:
        """Begin to probe, in the running event loop."""
        if self._task is None:
            self._task = asyncio.create_task(self._probe_for_ever(), name="self-check")

    def stop(self) -> None:
        """Probe no more."""
        if self._task is not None:
            self._task.cancel()
            self._task, self._handled = None, None

    async def _probe_for_ever(self) -> None:
        while True:
            self.probe()
            due = self._clock() + PROBE_SECS
            await asyncio.sleep(PROBE_SECS)
            self.note_lateness(self._clock() - due)

    def note_lateness(self, seconds: float) -> None:
        """The timer came so much after its time."""
        self.late_secs = max(0.0, seconds)
        if seconds > STOOD_STILL_SECS and self._tell("late", self._clock()):
            log.warning("the event loop stood still for %.1f s", seconds)

    def probe(self) -> None:
        """Send one probe."""
        self._probe += 1
        if self._handled is None:
            self._handled = self._clock()
        self._post(e.Probe(self._probe))

    def _answered(self, answer: c.Probed, now: float) -> None:
        if answer.probe == self._probe:
            self._handled = now
        known, stalled = {s.model for s in self._stalls}, {s.model for s in answer.stalls}
        for stall in answer.stalls:
            if stall.model not in known:
                log.error("%s has waited %.0f s: %s", stall.model, stall.waiting, stall.reason)
        for model in sorted(known - stalled):
            log.info("the queue of %s moves again", model)
        self._stalls = answer.stalls

    def _violated(self, violation: Violation, now: float) -> None:
        name = violation.invariant
        self._metrics.violations.labels(name).inc()
        if self._tell(name, now):
            log.error("invariant %s does not hold: %s (%s)", name, violation.detail, INVARIANTS[name])

    def _tell(self, what: str, now: float) -> bool:
        """Whether it is to be logged: not if it was a moment ago."""
        if now - self._told.get(what, float("-inf")) < TELL_AGAIN_SECS:
            return False
        self._told[what] = now
        return True
