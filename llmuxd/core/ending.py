"""The two ways in which a daemon ends: it stops its engines, or it leaves them to the next daemon.

A shutdown refuses what comes, and stops each engine when it has finished what it has in flight. A handover serves
what there is until its deadline, the policy's switches included, ends the rest, and waits for the engines that are
falling asleep, waking or stopping: what they are is then what the next daemon finds. One that is starting is left to
it as well.
"""

from __future__ import annotations

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.engines import Engines
from llmuxd.core.requests import LEAST_RETRY_SECS, Requests
from llmuxd.core.state import IN_TRANSITION, WITHOUT_PROCESS, State
from llmuxd.core.switching import Switching


class Ending:
    """Carries out a shutdown or a handover. Writes the fields of `State` that are about them."""

    def __init__(self, state: State, engines: Engines, requests: Requests, switching: Switching) -> None:
        self._state = state
        self._engines = engines
        self._requests = requests
        self._switching = switching

    def begin(self, event: e.Shutdown | e.HandOver, now: float) -> None:
        """Take the event. Repeated, the earlier deadline counts; a handover cannot take back a shutdown."""
        state = self._state
        if isinstance(event, e.HandOver):
            if state.shutdown_deadline is None:
                first = state.handover_deadline is None
                state.handover_deadline = _earlier(state.handover_deadline, event.deadline)
                if first:
                    self._switching.fail_jobs(state.ending)
            return
        first = state.shutdown_deadline is None
        state.shutdown_deadline = _earlier(state.shutdown_deadline, event.deadline)
        self._requests.refuse_objectionable(now)
        if first:
            self._switching.abandon(state.ending, now)

    def step(self, now: float) -> None:
        """Go as far as is possible now."""
        if self._state.shutdown_deadline is not None:
            self._wind_down(self._state.shutdown_deadline, now)
        elif self._state.handover_deadline is not None:
            self._make_way(self._state.handover_deadline, now)
        else:
            self._switching.advance(now)

    def _wind_down(self, deadline: float, now: float) -> None:
        """Stop each engine that has nothing more to finish, or no more time to."""
        state = self._state
        for model in state.models.values():
            if model.state in WITHOUT_PROCESS or model.state is S.STOPPING:
                continue
            if model.state is S.AWAKE and model.in_flight and now < deadline:
                continue
            self._requests.abort_in_flight(model, c.Refusal.SHUTTING_DOWN, state.ending)
            self._engines.stop(model, now, "shutting down")
        gone = all(m.state in WITHOUT_PROCESS and not m.in_flight for m in state.models.values())
        if gone and not state.all_stopped:
            state.all_stopped = True
            state.out.append(c.AllStopped())

    def _make_way(self, deadline: float, now: float) -> None:
        """Serve what there is; when it is served, or there is no more time, be still."""
        state = self._state
        if not state.closed and state.requests and now < deadline:
            self._switching.advance(now)
        if not state.closed and (not state.requests or now >= deadline):
            state.closed = True
            for model in state.models.values():
                self._requests.refuse_queue(model, c.Refusal.SHUTTING_DOWN, state.ending, LEAST_RETRY_SECS)
                self._requests.abort_in_flight(model, c.Refusal.SHUTTING_DOWN, state.ending)
            self._switching.abandon(state.ending, now)
        restless = [m for m in state.models.values() if m.state in IN_TRANSITION and m.state is not S.STARTING]
        if state.closed and not restless and not state.handed_over:
            state.handed_over = True
            state.out.append(c.HandedOver())


def _earlier(deadline: float | None, other: float) -> float:
    return other if deadline is None else min(deadline, other)
