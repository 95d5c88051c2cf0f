"""The switch: from one resident set to another, by the phases cooldown, drain, sleep, wake.

At most one switch is under way. It has a target that is to be awake (or none), and victims that have to go to
make room. `advance` is called after every event and takes each step that has become possible:

1. A switch under way:
   1.1 cooldown: wait until each victim has been awake for `min_active`, unless the switch is forced.
   1.2 drain: nothing is forwarded to the victims any more; wait for what they have in flight, or park it.
   1.3 sleep: evict the victims; wait until the target fits. A sleep that fails or is overdue becomes a stop.
   1.4 wake: wake or start the target. One that does not wake is stopped and started from its weights; if a start
       fails, its engine is stopped and its queue is refused.
   In 1.1 and 1.2 a switch whose target nobody waits for any more is cancelled: nothing has happened yet.
2. Otherwise the next switch begins: what an operator asked for first, then models whose time-to-live is over,
   then what the policy decides.
"""

from __future__ import annotations

from llmuxd.core import commands as c
from llmuxd.core.choice import BARRED_SECS
from llmuxd.core.commands import Phase
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.engines import Engines
from llmuxd.core.events import FailureKind
from llmuxd.core.eviction import FREES_NOTHING, STOP, EvictionPolicy, ProcessStrategy
from llmuxd.core.policies.fifo import Fifo
from llmuxd.core.policy import Decision, Policy, Snapshot, SwitchTo
from llmuxd.core.requests import Requests
from llmuxd.core.settings import InFlight
from llmuxd.core.state import IN_TRANSITION, WITHOUT_PROCESS, Job, Model, State, Switch
from llmuxd.core.views import has_demand, make_room, may_park, oldest_demand, snapshot, stopping_of

MIN_TURN_SECS = 1.0
"""What a model gets to do with its requests, at least, before they are parked again."""

MOST_BARREN_TURNS = 8
"""More of them in a row make no turn longer."""

MIN_POLICY_DELAY_SECS = 0.01
"""A policy that wants to be asked again at once is asked a little later, so that it cannot spin."""


class Switching:
    """Plans switches and takes their steps. Writes `State.switch`, `jobs` and `ask_policy_at`."""

    def __init__(self, state: State, engines: Engines, requests: Requests, policy: Policy) -> None:
        self._state = state
        self._engines = engines
        self._requests = requests
        self.policy = policy

    def advance(self, now: float) -> None:
        """Take every step that is possible now."""
        steps = {
            Phase.COOLDOWN: self._cooldown,
            Phase.DRAIN: self._drain,
            Phase.SLEEP: self._sleep,
            Phase.WAKE: self._wake,
        }
        while True:
            switch = self._state.switch
            moved = self._begin_next(now) if switch is None else steps[switch.phase](switch, now)
            if not moved:
                return

    def cooled_at(self, switch: Switch) -> float:
        """When the cooldown of the switch is over."""
        if switch.forced:
            return switch.began
        min_active = self._state.settings.min_active
        awake = [m.since for m in self._victims(switch) if m.state is S.AWAKE]
        return max((since + min_active for since in awake), default=switch.began)

    def drained_at(self, switch: Switch) -> float:
        """When what the victims still have in flight may be parked.

        However hasty the policy is, a model that was woken for its parked requests works on them for a while, and
        for twice as long each time that it answered none: or two such models could take turns for ever.
        """
        if switch.forced:
            return switch.phase_began
        at = switch.phase_began
        if self._state.settings.in_flight is not InFlight.CUT:
            at += switch.drain_secs
        for model in self._busy(switch):
            if may_park(self._state, model, switch.victims[model.name]):
                at = max(at, model.since + MIN_TURN_SECS * 2.0 ** min(model.barren_turns, MOST_BARREN_TURNS))
        return at

    def parks_at(self, switch: Switch) -> float | None:
        """The same, if nothing else is waited for in the drain phase."""
        busy = self._busy(switch)
        cut = self._state.settings.in_flight is InFlight.CUT
        parks = all(cut or may_park(self._state, m, switch.victims[m.name]) for m in busy)
        return self.drained_at(switch) if busy and parks else None

    def _busy(self, switch: Switch) -> list[Model]:
        return [m for m in self._victims(switch) if m.state is S.AWAKE and m.in_flight]

    # 1. The phases

    def _cooldown(self, switch: Switch, now: float) -> bool:
        if not self._wanted(switch):
            return self._end(switch, now, cancelled=True)
        if now < self.cooled_at(switch):
            return False
        return self._enter_phase(switch, Phase.DRAIN, now)

    def _drain(self, switch: Switch, now: float) -> bool:
        if not self._wanted(switch):
            return self._end(switch, now, cancelled=True)
        cut = self._state.settings.in_flight is InFlight.CUT
        busy = self._busy(switch)
        held_up = [m for m in busy if not may_park(self._state, m, switch.victims[m.name])]
        if held_up and not cut:
            return False
        if busy and now < self.drained_at(switch):
            return False
        for model in held_up:
            self._requests.abort_in_flight(model, c.Refusal.ENGINE_DIED, f"{model.name} was switched out")
        self._enter_phase(switch, Phase.SLEEP, now)
        for model in self._victims(switch):
            self._evict(model, switch.victims[model.name], now)
        return True

    def _sleep(self, switch: Switch, now: float) -> bool:
        if any(m.state in IN_TRANSITION for m in self._victims(switch)):
            return False
        if switch.target is None:
            return self._end(switch, now)
        target = self._state.models[switch.target]
        if not self._state.fits(target, {}):
            if any(m.state in IN_TRANSITION for m in self._state.models.values()):
                return False
            # It takes more than it did when this was planned, by a reload: plan again.
            self._state.jobs[:0] = switch.jobs
            switch.jobs = []
            return self._end(switch, now, cancelled=True)
        return self._enter_phase(switch, Phase.WAKE, now)

    def _wake(self, switch: Switch, now: float) -> bool:
        assert switch.target is not None
        target = self._state.models[switch.target]
        if target.state is S.AWAKE:
            return self._end(switch, now)
        if target.state in IN_TRANSITION:
            return False
        if target.retired and not has_demand(target):
            return self._end(switch, now, error=f"{target.name} was taken out of the config")
        if target.blocked(now) and not switch.jobs:
            return self._end(switch, now, error=target.last_error)
        if target.state in (S.ASLEEP, S.CHECKPOINTED):
            self._engines.wake(target, now)
        else:
            self._engines.start(target, now)
        return False

    # What the engines' failures mean for a switch

    def target_failed(self, model: Model, kind: FailureKind, reason: str, now: float) -> None:
        """The engine of `model` did not start or wake."""
        switch = self._state.switch
        sleepers = [m for m in self._state.models.values() if m.state is S.ASLEEP]
        if kind is FailureKind.OUT_OF_MEMORY and switch is not None and sleepers and not switch.made_room:
            # One of the sleepers holds more than it should: make certain room, and try once more.
            switch.made_room = True
            model.last_error = reason
            for sleeper in sleepers:
                switch.victims[sleeper.name] = STOP
                self._engines.stop(sleeper, now, f"to make room: {reason}")
            self._engines.stop(model, now, reason)
            switch.phase = Phase.SLEEP
            return
        if model.state is S.WAKING:
            self._wake_failed(model, reason, now)
            return
        self._engines.fail(model, reason, now)
        self.give_up(model, reason, now)

    def _wake_failed(self, model: Model, reason: str, now: float) -> None:
        """It died in its sleep, or what was saved of it cannot be brought back: the switch goes on, and starts it from
        its weights."""
        model.last_error = f"it could not be brought back: {reason}"
        self._bar(model, now)
        if model.restoring:
            # Whoever tried it knows whether the image is to blame, and has put it aside then.
            model.image = None
        self._engines.stop(model, now, model.last_error)

    def sleep_failed(self, model: Model, kind: FailureKind, reason: str, now: float) -> None:
        """The engine of `model` did not fall asleep. It is stopped, but for one that could not be saved, is well, and
        is in nobody's way."""
        switch = self._state.switch
        model.last_error = f"sleep failed: {reason}"
        self._bar(model, now)
        if kind is not FailureKind.NOT_CHECKPOINTED or switch is None or switch.target is not None:
            self._engines.stop(model, now, model.last_error)
            return
        self._engines.stayed(model, model.last_error, now)
        if switch.jobs or model.asleep_by == FREES_NOTHING:
            # An operator wanted an image of it; or its memory is not free, and then it may as well serve.
            self._engines.wake(model, now)

    def _bar(self, model: Model, now: float) -> None:
        """Where the policy is left to be chosen, this one is not chosen again for a while."""
        assert model.asleep_by is not None
        model.barred[model.asleep_by] = now + BARRED_SECS

    def give_up(self, model: Model, reason: str, now: float) -> None:
        """End the switch to `model`, if there is one, and refuse what waits for it while it is not retried."""
        self._requests.refuse_objectionable(now)
        switch = self._state.switch
        if switch is not None and switch.target == model.name and switch.phase is Phase.WAKE:
            self._end(switch, now, error=reason)

    def cancel(self, now: float) -> None:
        """End the switch under way if nothing has been put to sleep for it yet."""
        switch = self._state.switch
        if switch is not None and switch.phase in (Phase.COOLDOWN, Phase.DRAIN):
            self._end(switch, now, cancelled=True)

    def abandon(self, reason: str, now: float) -> None:
        """End the switch under way wherever it is, and fail everything that an operator waits for."""
        state = self._state
        state.ask_policy_at = None
        if state.switch is not None:
            self._end(state.switch, now, error=reason, cancelled=True)
        self.fail_jobs(reason)

    def fail_jobs(self, reason: str) -> None:
        """Fail what operators wait for and what has not begun."""
        for job in self._state.jobs:
            self._end_job(job, reason)
        self._state.jobs.clear()

    # 2. The next switch

    def _begin_next(self, now: float) -> bool:
        state = self._state
        due = state.ask_policy_at is not None and state.ask_policy_at <= now
        state.ask_policy_at = None
        if state.jobs:
            job = state.jobs.pop(0)
            if self._is_settled(job):
                self._end_job(job, "")
                return True
            return self._begin(job.target, job.victims, now, job)
        if not state.mode.manual:
            for model in state.models.values():
                if self.idle_until(model) <= now:
                    return self._begin(None, {model.name: model.eviction}, now)
        chosen = self._choose(now, due)
        return chosen is not None and self._begin(chosen.model, {}, now, drain_secs=chosen.drain_secs)

    def idle_until(self, model: Model) -> float:
        """When the model is put to sleep if no request comes for it; infinity if never."""
        busy = model.state is not S.AWAKE or model.queue or model.in_flight
        if model.spec.ttl is None or busy:
            return float("inf")
        return model.idle_since + model.spec.ttl

    def _choose(self, now: float, due: bool) -> SwitchTo | None:
        """The model that should be made awake next, by the pin or by the policy."""
        state = self._state
        wanted = [m for m in state.models.values() if has_demand(m) and m.loadable(now)]
        wanted = [m for m in wanted if not self._stands_back(m, wanted)]
        if state.mode.manual:
            wanted = [m for m in wanted if m.name == state.mode.pinned]
            return SwitchTo(wanted[0].name) if wanted else None
        if not wanted:
            return None
        decision = self._ask_policy(snapshot(state, now, {m.name for m in wanted}, due))
        if isinstance(decision, SwitchTo):
            return decision
        if decision.until is not None:
            state.ask_policy_at = decision.until if decision.until > now else now + MIN_POLICY_DELAY_SECS
        return None

    def _stands_back(self, model: Model, wanted: list[Model]) -> bool:
        """Whether it failed, and others have waited since before that: it does not make them wait a second time."""
        if not model.failures:
            return False
        return any(
            not other.failures and (since := oldest_demand(other)) is not None and since < model.failed_at
            for other in wanted
        )

    def _ask_policy(self, snapshot: Snapshot) -> Decision:
        """What the policy decides; of one that breaks, a third party's, what fifo would."""
        try:
            decision = self.policy.decide(snapshot)
            known = [model.name for model, _ in snapshot.candidates]
            wrong = isinstance(decision, SwitchTo) and decision.model not in known
            problem = f"it chose {decision}, which is no candidate" if wrong else ""
        except Exception as error:
            problem = repr(error)
        if not problem:
            return decision
        self._state.out.append(c.PolicyFailed(self.policy.name, problem))
        return Fifo().decide(snapshot)

    def _begin(
        self,
        target: str | None,
        victims: dict[str, EvictionPolicy],
        now: float,
        job: Job | None = None,
        drain_secs: float = 0.0,
    ) -> bool:
        state = self._state
        forced = job is not None and job.forced
        if target is not None:
            victims = make_room(state, state.models[target])
            if not state.fits(state.models[target], victims | stopping_of(state)):
                if any(m.state in IN_TRANSITION for m in state.models.values()):
                    # One that was adopted while it starts cannot be made to go before it is awake.
                    state.jobs[:0] = [job] if job is not None else []
                    return False
                # Only what is pinned is never made to go, and only an operator asks for something beside it.
                if job is not None:
                    self._end_job(job, f"{state.mode.pinned} is pinned, and there is no room beside it")
                return job is not None
        state.last_switch += 1
        switch = Switch(state.last_switch, target, dict(victims), now, Phase.COOLDOWN, now, forced)
        switch.jobs = [job] if job is not None else []
        switch.drain_secs = drain_secs
        state.switch = switch
        state.out.append(c.SwitchBegan(switch.id, target, tuple(victims), asked=job is not None))
        return True

    # Helpers

    def _victims(self, switch: Switch) -> list[Model]:
        return [self._state.models[name] for name in switch.victims]

    def _is_settled(self, job: Job) -> bool:
        """Whether the job's goal is reached already."""
        models = self._state.models
        if job.target is not None:
            return models[job.target].state is S.AWAKE
        return all(
            models[name].state in WITHOUT_PROCESS
            or (models[name].state is S.ASLEEP and eviction.process is not ProcessStrategy.STOP)
            for name, eviction in job.victims.items()
        )

    def _shortfall(self, job: Job) -> str:
        """Why an operator has not got the image that was asked for; empty if there is one, or none was."""
        for name, eviction in job.victims.items():
            model = self._state.models[name]
            if eviction.process is ProcessStrategy.CHECKPOINT and model.state is not S.CHECKPOINTED:
                return f"{name} was not checkpointed: {model.last_error or _outcome(model)}"
        return ""

    def _wanted(self, switch: Switch) -> bool:
        if switch.target is None or switch.jobs:
            return True
        return has_demand(self._state.models[switch.target])

    def _evict(self, model: Model, eviction: EvictionPolicy, now: float) -> None:
        if model.state is S.AWAKE:
            mode = c.SleepMode.KEEP if model.in_flight else c.SleepMode.WAIT
            self._engines.evict(model, eviction, mode, now)
        elif model.state is S.ASLEEP and eviction.process is ProcessStrategy.STOP:
            self._engines.stop(model, now)

    def _enter_phase(self, switch: Switch, phase: Phase, now: float) -> bool:
        self._note_phase(switch, now)
        switch.phase, switch.phase_began = phase, now
        return True

    def _note_phase(self, switch: Switch, now: float) -> None:
        seconds = now - switch.phase_began
        self._state.out.append(c.SwitchPhaseEnded(switch.id, switch.target, switch.phase, seconds))

    def _end(self, switch: Switch, now: float, error: str = "", cancelled: bool = False) -> bool:
        """The switch is over: tell, and let through what waited for it. Always True."""
        state = self._state
        self._note_phase(switch, now)
        state.switch = None
        victims = tuple(switch.victims)
        seconds = now - switch.began
        state.out.append(c.SwitchEnded(switch.id, switch.target, victims, seconds, error, cancelled))
        if switch.target is not None and not error and not cancelled:
            state.models[switch.target].last_switch = (switch.began, now)
        for job in switch.jobs:
            self._end_job(job, error)
        for name in (switch.target, *victims):
            if name is not None:
                self._requests.pump(state.models[name], now)
        return True

    def _end_job(self, job: Job, error: str) -> None:
        state = self._state
        error = error or self._shortfall(job)
        if error:
            if job.undo_mode is not None and state.mode.pinned == job.target:
                state.mode = job.undo_mode
            state.out.append(c.JobFailed(job.id, error))
            return
        went = ", ".join(f"{n} {_outcome(state.models[n])}" for n in job.victims)
        state.out.append(c.JobDone(job.id, f"{job.target} is awake" if job.target is not None else went))


def _outcome(model: Model) -> str:
    if model.state is S.CHECKPOINTED:
        return f"is checkpointed ({model.image})"
    if model.state is S.ASLEEP:
        return f"is asleep ({model.asleep_by})"
    return "is stopped" if model.state in WITHOUT_PROCESS else f"is {model.state.value}"
