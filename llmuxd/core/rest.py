"""Rest: when nothing is to be done but what an event itself says, and when something is due at the latest.

Most events by far are about one request of an awake model, while nothing is switched and nobody waits for a model that
is not awake. For each of them to look at every model, to find each time that there is nothing to do, would cost more
than all the rest. So after a look at everything it is noted whether the core is at rest: whether another look would
find nothing, as long as no deadline comes and no request is queued for a model that is not awake.

A request of an awake model disturbs no rest, because all that is looked at is this:

- for a switch, a job, a shutdown, a handover to go on with: there is none, and no request makes one;
- for engines that are to go once they are idle: no model is retired or outdated, and no request makes one so;
- for models that something waits for and that could be made awake: this one is awake, and no other is touched;
- for models that have been idle for their time-to-live: of this one's the end is noted, of the others' it was.

The tests hold it to that: whatever happens, a switcher that never rests commands the same.
"""

from __future__ import annotations

import math

from llmuxd.core.commands import Phase
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.requests import Requests
from llmuxd.core.state import Model, State
from llmuxd.core.switching import Switching
from llmuxd.core.views import has_demand


class Rest:
    """Knows whether the core is at rest, and its next deadline."""

    def __init__(self, state: State, requests: Requests, switching: Switching) -> None:
        self._state = state
        self._requests = requests
        self._switching = switching
        self._at_rest = False
        self._due = math.inf
        """Nothing is due before it, but for the timeouts of requests."""

    @property
    def next_deadline(self) -> float | None:
        """Nothing is due before it. What was due then may have become needless since."""
        timeout = self._requests.next_timeout()
        due = self._due if timeout is None else min(self._due, timeout)
        return due if due < math.inf else None

    def look(self) -> None:
        """Note how things are, after every step has been taken that was possible."""
        state = self._state
        self._due = self._next_of_all()
        self._at_rest = state.switch is None and not state.jobs and not state.ending
        for model in state.models.values():
            self._due = min(self._due, self._next_of(model))
            if model.retired or model.outdated or (model.state is not S.AWAKE and has_demand(model)):
                self._at_rest = False

    def end(self) -> None:
        """Something may have to be done: there is no rest before the next look."""
        self._at_rest = False

    def outlasts(self, model: Model, now: float) -> bool:
        """Whether the core is still at rest after an event that was about a request of this model, and no other."""
        if model.state is not S.AWAKE or (model.suspect_until and model.queue):
            self._at_rest = False
        elif self._at_rest:
            if model.spec.ttl is not None:
                self._due = min(self._due, self._next_of(model))
            self._at_rest = now < self._due
        return self._at_rest

    def _next_of_all(self) -> float:
        """The next deadline of what is not about one model alone."""
        state = self._state
        due = [state.ask_policy_at]
        if not state.closed and state.shutdown_deadline is None:
            due.append(state.handover_deadline)
        if state.switch is not None and state.switch.phase is Phase.COOLDOWN:
            due.append(self._switching.cooled_at(state.switch))
        if state.switch is not None and state.switch.phase is Phase.DRAIN:
            due.append(self._switching.parks_at(state.switch))
        return min((at for at in due if at is not None), default=math.inf)

    def _next_of(self, model: Model) -> float:
        """The next deadline of a model and its engine."""
        state = self._state
        due = math.inf if model.deadline is None else model.deadline
        if model.queue:
            return min(due, model.suspect_until or math.inf)
        if model.in_flight and model.state is S.AWAKE:
            return due if state.shutdown_deadline is None else min(due, state.shutdown_deadline)
        # While an operator waits, a model whose time is over waits behind: it is looked at again when that has ended.
        if state.switch is None and not state.jobs and not state.mode.manual and not state.ending:
            return min(due, self._switching.idle_until(model))
        return due
