"""The invariants: what must hold after every event, whatever happens, and the auditor that sees to it.

They are checked in the simulator, in the property tests, and in production, where they cost a few microseconds per
event. The auditor believes nothing of the state that it can follow from the events and commands alone.

After an event about a request by which nothing else happens than that requests are forwarded, the other models are as
good as they were: they are not looked at again before there is another event, of which a probe each second is one, or
time alone could have made them worse. What spoils a model that it is not about is found out then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.queue import Place, place_of
from llmuxd.core.selfcheck import LATE_SECS, MAX_TURN_SECS, bound_of, is_held_up, longest_waiting, passed_over_secs
from llmuxd.core.state import IN_TRANSITION, Model
from llmuxd.core.views import has_demand, oldest_demand

if TYPE_CHECKING:
    from llmuxd.core.switcher import Switcher

INVARIANTS: Mapping[str, str] = {
    "memory": "On no device is more memory in use than it has.",
    "forwarded_to_awake": "No request is forwarded to an engine that is not awake.",
    "ends_once": "Every accepted request ends exactly once: by an answer, by an error, or because its client left.",
    "accounts": "Every accepted request that has not ended is in exactly one queue or in flight at one engine.",
    "deadlines": "No engine is in a transition without a deadline, or beyond it.",
    "staleness": "A request beyond the policy's staleness bound waits only for the turn or switch under way, its own "
    "switch, and those of requests that have waited longer.",
    "order": "Of the requests that wait for a model the one with the highest priority is forwarded first, and of "
    "equals the one that came first.",
    "forwards": "No request waits for a model that is awake and can take it.",
    "failures": "A model that failed is not tried again before those that have waited since before it failed: it "
    "delays the others by one switch at most.",
    "manual": "In manual mode nothing is switched but by an operator's word and to the pinned model.",
}
"""Name -> what must hold."""

_EPSILON = 1e-6
"""Seconds that two sums of the same durations may differ by."""

_NOTHING = "", place_of(0, 0.0, 0)


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that does not hold."""

    invariant: str
    detail: str
    at: float

    def __str__(self) -> str:
        sentence = INVARIANTS.get(self.invariant, "")
        return f"{self.invariant} at {self.at:.3f} s: {self.detail}" + (f" ({sentence})" if sentence else "")


class Auditor:
    """Follows one switcher. `observe` is to be called with every event and what came of it, in their order."""

    def __init__(self, switcher: Switcher) -> None:
        self._switcher = switcher
        self._state = switcher.state
        self._open: dict[int, tuple[str, Place]] = {}
        """The requests that have not ended: the model, and the place in the order."""
        self._awake: set[str] = set()
        self._last = _NOTHING
        """What the event being observed has forwarded last: a model's name, and the request's place."""
        self._placed: dict[str, tuple[int, int]] = {}
        """How many requests each model had queued and in flight when it was looked at last, and the sums."""
        self._queued = self._in_flight = 0
        self._good_until = -math.inf
        """Before this time no model becomes worse by itself."""
        self._found: Violation | None = None
        self._now = 0.0

    def observe(self, event: e.Event, commands: Sequence[c.Command], now: float) -> Violation | None:
        """The first invariant that is broken, None if all hold."""
        self._now, self._found, self._last = now, None, _NOTHING
        about = self._before(event)
        for command in commands:
            self._follow(command)
            if not isinstance(command, c.Forward):
                about = None
        model = None if about is None else self._state.models.get(about)
        if model is not None and now < self._good_until and _worsens_at(model) == math.inf:
            self._check_model(model)
            self._check_accounts()
        else:
            self._check_state()
        return self._found

    def _broken(self, invariant: str, detail: str) -> None:
        self._found = self._found or Violation(invariant, detail, self._now)

    # Events and commands, by themselves

    def _before(self, event: e.Event) -> str | None:
        """The model, if the event is about a request of it and should change nothing else."""
        if isinstance(event, e.RequestArrived):
            self._open[event.request] = event.model, place_of(event.priority, self._now, event.request)
            return event.model
        if isinstance(event, (e.RequestFinished, e.ClientLeft)):
            return self._ends(event.request)
        return None

    def _ends(self, request: int) -> str | None:
        """The request's model, if it has not ended before."""
        model, _ = self._open.pop(request, (None, None))
        if model is None:
            self._broken("ends_once", f"request {request} ends, and had ended before")
        return model

    def _follow(self, command: c.Command) -> None:
        if isinstance(command, c.Forward):
            if command.model not in self._awake:
                self._broken("forwarded_to_awake", f"request {command.request} to {command.model}")
            if command.request not in self._open:
                self._broken("ends_once", f"request {command.request} is forwarded, and had ended before")
            else:
                self._check_order(command)
        elif isinstance(command, (c.Refuse, c.Abort)):
            self._ends(command.request)
        elif isinstance(command, c.EngineChanged):
            if command.new is S.AWAKE:
                self._awake.add(command.model)
            else:
                self._awake.discard(command.model)
        elif isinstance(command, c.SwitchBegan) and not command.asked:
            self._check_choice(command.target)

    def _check_order(self, command: c.Forward) -> None:
        """It comes after the one that was forwarded last, and before the one that the queue has next."""
        own = self._open[command.request]
        if self._last[0] == command.model:
            self._compare(self._last, own)
        self._last = own
        first = self._state.models[command.model].queue.first
        if first is not None:
            self._compare(own, self._open.get(first.id, own))

    def _compare(self, earlier: tuple[str, Place], later: tuple[str, Place]) -> None:
        (_, one), (_, other) = earlier, later
        if other < one:
            self._broken("order", f"request {one[2]} is forwarded before request {other[2]}")

    # The policy's choice

    def _check_choice(self, target: str | None) -> None:
        mode = self._state.mode
        if mode.manual and (target is None or target != mode.pinned):
            self._broken("manual", f"a switch to {target} begins by itself")
        if target is None or mode.manual:
            return
        model = self._state.models[target]
        own = oldest_demand(model)
        policy = self._switcher.policy
        for other in self._state.models.values():
            since = oldest_demand(other)
            if other is model or since is None or not self._in_good_order(other):
                continue
            if model.failures and since < model.failed_at - _EPSILON:
                self._broken("failures", f"{target} is tried again, {other.name} has waited since before it failed")
            if model.failures or own is None or since >= own - _EPSILON:
                continue
            bound = bound_of(policy, self._state)
            if bound is not None and self._now - since > bound + _EPSILON:
                self._broken("staleness", f"{target} is next, {other.name} has waited {self._now - since:.3f} s")

    def _in_good_order(self, model: Model) -> bool:
        return model.loadable(self._now) and not model.failures

    # The state

    def _check_state(self) -> None:
        state = self._state
        for device, used in state.used().items():
            if used > state.devices[device]:
                self._broken("memory", f"{device} has {state.devices[device]}, in use are {used}")
        self._placed, self._queued, self._in_flight = {}, 0, 0
        self._good_until = math.inf
        for model in state.models.values():
            self._check_model(model)
            self._good_until = min(self._good_until, _worsens_at(model))
        self._check_accounts()
        self._check_rest()

    def _check_model(self, model: Model) -> None:
        if is_held_up(self._state, model, self._now):
            self._broken("forwards", f"{len(model.queue)} wait for {model.name}, which is awake")
        if model.state in IN_TRANSITION:
            if model.deadline is None:
                self._broken("deadlines", f"{model.name} is {model.state.value} without one")
            elif self._now > model.deadline + LATE_SECS:
                self._broken("deadlines", f"{model.name} is {model.state.value} beyond its deadline")
        queued, in_flight = self._placed.get(model.name, (0, 0))
        self._placed[model.name] = len(model.queue), len(model.in_flight)
        self._queued += len(model.queue) - queued
        self._in_flight += len(model.in_flight) - in_flight

    def _check_accounts(self) -> None:
        state, is_open, queued = self._state, len(self._open), self._queued
        if is_open != len(state.requests) or is_open != queued + self._in_flight or queued != state.queued:
            known = f"known {len(state.requests)}, placed {queued} + {self._in_flight}"
            self._broken("accounts", f"open {is_open}, {known}")

    def _check_rest(self) -> None:
        """While nothing is switched, nobody may be waiting beyond the bound whose turn has come."""
        state, policy = self._state, self._switcher.policy
        if state.switch is not None or state.mode.manual or state.ending:
            return
        if state.jobs:
            return
        model = longest_waiting(state, self._now)
        if model is not None and passed_over_secs(state, policy, model, self._now) > MAX_TURN_SECS:
            waited = self._now - (oldest_demand(model) or self._now)
            self._broken("staleness", f"{model.name} has waited {waited:.3f} s, nothing is switched")


def _worsens_at(model: Model) -> float:
    """When time alone may next break an invariant by the model."""
    if model.state is S.AWAKE:
        return model.suspect_until if model.queue and model.suspect_until else math.inf
    if has_demand(model):
        return -math.inf
    return math.inf if model.deadline is None else model.deadline
