"""What an operator may ask for: jobs, mode, pin, eviction, reload.

A job that needs a switch waits in line for the switcher like everything else, in front of the policy's wishes, so
an operator's wake can no more overfill a device than a request can.
"""

from __future__ import annotations

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.engines import Engines
from llmuxd.core.eviction import STOP, ProcessStrategy
from llmuxd.core.reloading import reload
from llmuxd.core.requests import Requests
from llmuxd.core.state import WITHOUT_PROCESS, IllegalEvent, Job, Model, State, SwitchMode
from llmuxd.core.switching import Switching


class Operator:
    """Carries out the operator's events. Writes `State.mode` and `jobs`."""

    def __init__(self, state: State, engines: Engines, requests: Requests, switching: Switching) -> None:
        self._state = state
        self._engines = engines
        self._requests = requests
        self._switching = switching

    def dispatch(self, event: e.OperatorEvent, now: float) -> None:
        """Take one event. Raises IllegalEvent for a model that does not exist."""
        state = self._state
        if isinstance(event, e.Reload):
            self._reload(event, now)
            return
        if isinstance(event, e.SetMode):
            state.mode = SwitchMode(event.manual)
            if state.mode.manual and state.switch is not None and not state.switch.jobs:
                self._switching.cancel(now)
            self._requests.refuse_objectionable(now)
            return
        if event.model not in state.models:
            raise IllegalEvent(f"no model {event.model!r}")
        model = state.models[event.model]
        if isinstance(event, e.SetEviction):
            model.evict_by(event.eviction)
        elif state.ending:
            state.out.append(c.JobFailed(event.job, state.ending))
        elif model.retired:
            state.out.append(c.JobFailed(event.job, f"{model.name} was taken out of the config"))
        elif isinstance(event, e.OperatorSleep):
            self._sleep(event, model)
        elif isinstance(event, e.OperatorStop):
            self._stop(event, model, now)
        else:
            self._make_awake(event, model, now)

    def _reload(self, event: e.Reload, now: float) -> None:
        state = self._state
        retired = reload(state, event, now)
        self._switching.policy = event.policy
        for job in list(state.jobs):
            if job.target in retired or not retired.isdisjoint(job.victims):
                state.jobs.remove(job)
                state.out.append(
                    c.JobFailed(job.id, f"{job.target or ', '.join(job.victims)} was taken out of the config")
                )
        self._requests.refuse_objectionable(now)

    # Making a model awake

    def _make_awake(self, event: e.OperatorSwitch | e.OperatorWake | e.Pin, model: Model, now: float) -> None:
        state = self._state
        if isinstance(event, e.OperatorWake) and state.mode.pinned not in (None, model.name):
            reason = f"{state.mode.pinned} is pinned; unpin it first, or pin {model.name} instead"
            state.out.append(c.JobFailed(event.job, reason, allowed=False))
            return
        undo = None
        if (state.mode.manual and isinstance(event, e.OperatorSwitch)) or isinstance(event, e.Pin):
            undo = state.mode
            state.mode = SwitchMode(True, model.name)
        job = Job(event.job, model.name, {}, not isinstance(event, e.OperatorWake), undo)
        switch = state.switch
        if switch is not None and switch.target == model.name:
            switch.jobs.append(job)
            switch.forced = switch.forced or job.forced
        else:
            if switch is not None and job.forced and not switch.jobs:
                self._switching.cancel(now)
            state.jobs.append(job)
        self._requests.refuse_objectionable(now)

    # Putting one to sleep, stopping one

    def _sleep(self, event: e.OperatorSleep, model: Model) -> None:
        state = self._state
        if model.name == state.mode.pinned:
            reason = f"{model.name} is pinned; unpin it first"
            state.out.append(c.JobFailed(event.job, reason, allowed=False))
            return
        eviction = event.eviction or model.eviction
        asleep = model.state is S.ASLEEP and eviction.process is not ProcessStrategy.STOP
        if asleep and event.eviction not in (None, model.asleep_by):
            reason = f"{model.name} is asleep ({model.asleep_by}) already; wake it first, or stop it"
            state.out.append(c.JobFailed(event.job, reason))
        else:
            state.jobs.append(Job(event.job, None, {model.name: eviction}, forced=True))

    def _stop(self, event: e.OperatorStop, model: Model, now: float) -> None:
        """Drain and stop. Asked again while that is under way, or of one that has nothing to drain: at once."""
        state = self._state
        if model.name == state.mode.pinned:
            state.mode = SwitchMode()
        reason = f"{model.name} was stopped by the operator"
        self._requests.refuse_queue(model, c.Refusal.CANNOT_LOAD, reason, 1.0)
        switch = state.switch
        again = switch is not None and switch.victims.get(model.name) == STOP
        job = Job(event.job, None, {model.name: STOP}, forced=True)
        if again or model.state is not S.AWAKE:
            self._requests.abort_in_flight(model, c.Refusal.ENGINE_DIED, reason)
            if model.state not in WITHOUT_PROCESS and model.state is not S.STOPPING:
                self._engines.stop(model, now, reason)
            self._switching.give_up(model, reason, now)
        state.jobs.append(job)
