"""The switcher: `handle(event, now)` takes one event and returns the commands that follow from it.

This is the whole of the core to those outside it. It dispatches events to `requests`, `engines`, `operator` and
`ending`, and then lets the last, or `switching` through it, take the steps that have become possible; `rest` knows when
there are none. Nothing here waits, and nothing here knows the time: `now` is passed in, in seconds of a clock that
never goes back, and `next_deadline` says when a `Tick` is due.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.choice import choose_all
from llmuxd.core.costs import Costs
from llmuxd.core.ending import Ending
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.engines import Engines
from llmuxd.core.operator import Operator
from llmuxd.core.policy import Policy
from llmuxd.core.reloading import sweep
from llmuxd.core.requests import Requests
from llmuxd.core.rest import Rest
from llmuxd.core.selfcheck import find_stalls
from llmuxd.core.settings import ModelSpec, Settings
from llmuxd.core.state import Model, State, SwitchMode, check_placement
from llmuxd.core.switching import Switching


class Switcher:
    """The pure core.

    `devices` maps each device's name to its capacity; each model's placement must fit it. `mode` and `costs` (model ->
    `Costs.known`) are what an earlier one has left. Raises ValueError if a model does not fit.
    """

    def __init__(
        self,
        models: Iterable[ModelSpec],
        devices: Mapping[str, int],
        settings: Settings,
        policy: Policy,
        now: float,
        mode: SwitchMode | None = None,
        costs: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self.state = State(settings, dict(devices), {}, mode=mode or SwitchMode())
        for spec in models:
            check_placement(spec, devices)
            known = Costs.of((costs or {}).get(spec.name, {}))
            self.state.models[spec.name] = model = Model(spec, since=now, costs=known)
            model.evict_by(spec.eviction)
        choose_all(self.state, now)
        self._engines = Engines(self.state)
        self._requests = Requests(self.state, self._engines)
        self._switching = Switching(self.state, self._engines, self._requests, policy)
        self._operator = Operator(self.state, self._engines, self._requests, self._switching)
        self._ending = Ending(self.state, self._engines, self._requests, self._switching)
        self._rest = Rest(self.state, self._requests, self._switching)

    @property
    def policy(self) -> Policy:
        return self._switching.policy

    @property
    def mode(self) -> SwitchMode:
        return self.state.mode

    def handle(self, event: e.Event, now: float) -> list[c.Command]:
        """Take one event. Raises IllegalEvent, and changes nothing, if it cannot have happened."""
        if isinstance(event, (e.RequestArrived, e.RequestFinished, e.RequestBounced, e.ClientLeft)):
            model = self._requests.take(event, now)
            if not self._rest.outlasts(model, now):
                self._take_steps(now)
        elif isinstance(event, e.Probe):
            self.state.out.append(c.Probed(event.probe, find_stalls(self.state, self.policy, self.next_deadline, now)))
        else:
            self._rest.end()
            self._dispatch(event, now)
            choose_all(self.state, now)
            self._take_steps(now)
        commands, self.state.out = self.state.out, []
        self.state.arrived = None
        return commands

    def _take_steps(self, now: float) -> None:
        """Take every step that has become possible."""
        sweep(self.state, self._engines, now)
        self._ending.step(now)
        # What a switch that has just ended still needed may go now.
        sweep(self.state, self._engines, now)
        self._rest.look()

    @property
    def next_deadline(self) -> float | None:
        """When a `Tick` is due if nothing else happens; None if never. It may find nothing to do."""
        return self._rest.next_deadline

    def _dispatch(
        self,
        event: e.EngineEvent | e.ImageEvent | e.OperatorEvent | e.EndingEvent | e.ResourcesMeasured | e.Tick,
        now: float,
    ) -> None:
        if isinstance(event, e.EngineStarted):
            if self._engines.started(event, now):
                self._serve_without_switch(event.model, now)
        elif isinstance(event, e.EngineSlept):
            self._engines.slept(event, now)
        elif isinstance(event, e.EngineWoke):
            self._engines.woke(event, now)
        elif isinstance(event, e.EngineStopped):
            self._engines.stopped(event, now)
        elif isinstance(event, e.ImageFound):
            self._engines.image_found(event, now)
        elif isinstance(event, e.ImageLost):
            self._engines.image_lost(event, now)
        elif isinstance(event, e.EngineAdopted):
            self._engines.adopted(event, now)
            self._serve_without_switch(event.model, now)
        elif isinstance(event, e.OperationFailed):
            self._operation_failed(event, now)
        elif isinstance(event, e.EngineDied):
            if self._engines.died(event, now):
                self._switching.give_up(self.state.models[event.model], event.reason, now)
        elif isinstance(event, e.Tick):
            self._tick(now)
        elif isinstance(event, e.ResourcesMeasured):
            self.state.resources = event.resources
        elif isinstance(event, (e.Shutdown, e.HandOver)):
            self._ending.begin(event, now)
        else:
            self._operator.dispatch(event, now)

    def _serve_without_switch(self, name: str, now: float) -> None:
        """Forward what waits for an engine that has come up by itself: the end of a switch does so for its target."""
        switch = self.state.switch
        if switch is None or switch.target != name:
            self._requests.pump(self.state.models[name], now)

    def _operation_failed(self, event: e.OperationFailed, now: float) -> None:
        model = self._engines.current(event)
        if model is None:
            return
        if model.state is S.FALLING_ASLEEP:
            self._switching.sleep_failed(model, event.kind, event.reason, now)
        elif model.state is S.STOPPING:
            # Something survives SIGKILL. It is tried again when the deadline of this attempt is over.
            model.last_error = event.reason
        else:
            self._switching.target_failed(model, event.kind, event.reason, now)

    def _tick(self, now: float) -> None:
        self._requests.expire(now)
        for model in self._engines.overdue(now):
            reason = f"{model.state.value} for {now - model.since:.0f} s, which is too long"
            if model.state in (S.STARTING, S.WAKING):
                self._switching.target_failed(model, e.FailureKind.TIMEOUT, reason, now)
            else:
                model.last_error = reason
                self._engines.stop(model, now, reason)
        for model in self.state.models.values():
            if model.suspect_until <= now:
                model.suspect_until = 0.0
            self._requests.pump(model, now)
