"""The life of each engine: the commands that move it, what it reports back, deadlines, failures, backoff.

Which engine should be awake is not decided here (`switching` does), nor what its requests do (`requests`).
"""

from __future__ import annotations

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.eviction import EvictionPolicy, ProcessStrategy
from llmuxd.core.state import IN_TRANSITION, WITHOUT_PROCESS, IllegalEvent, Model, State


class Engines:
    """Moves engines between their states. Writes the engine fields of `Model`."""

    def __init__(self, state: State) -> None:
        self._state = state

    # Commands

    def start(self, model: Model, now: float) -> None:
        op = self._begin(model)
        model.incarnation = op
        model.placement = model.spec.placement
        model.outdated = model.restored = False
        timeout = model.spec.start_timeout
        self._enter(model, c.StartEngine, S.STARTING, now, timeout)
        self._state.out.append(c.StartEngine(model.name, op, timeout))

    def wake(self, model: Model, now: float) -> None:
        """Wake it, or restore it from its image."""
        assert model.asleep_by is not None
        op = self._begin(model)
        timeout = self._state.settings.wake_timeout
        if model.state is S.CHECKPOINTED:
            timeout = max(timeout, model.spec.start_timeout)
            model.incarnation = op
            model.placement = model.spec.placement
            model.outdated = False
            model.restored = True
        self._enter(model, c.WakeEngine, S.WAKING, now, timeout)
        self._state.out.append(c.WakeEngine(model.name, op, model.asleep_by, timeout))

    def evict(self, model: Model, eviction: EvictionPolicy, mode: c.SleepMode, now: float) -> None:
        """Free the device: put the engine to sleep, or stop it where the policy or the engine wants that."""
        if eviction.process is ProcessStrategy.STOP or not model.can_sleep:
            self.stop(model, now)
            return
        op = self._begin(model)
        timeout = self._state.settings.sleep_timeout
        if eviction.process is ProcessStrategy.CHECKPOINT:
            # It is written to a disk as a start reads from one.
            timeout = max(timeout, model.spec.start_timeout)
        self._enter(model, c.SleepEngine, S.FALLING_ASLEEP, now, timeout)
        model.asleep_by = eviction
        model.parked_since = now
        if model.in_flight and not model.answered:
            model.barren_turns += 1
        self._state.out.append(c.SleepEngine(model.name, op, eviction, mode, timeout))

    def stop(self, model: Model, now: float, reason: str = "") -> None:
        """Stop the engine whatever it is doing; a stop under way is given up for a new one."""
        grace = self._state.settings.stop_grace
        op = self._begin(model)
        model.held = self._state.claim(model)
        self._enter(model, c.StopEngine, S.STOPPING, now, grace, reason)
        model.asleep_by = None
        model.suspect_until = 0.0
        self._state.out.append(c.StopEngine(model.name, op, grace))

    # Events. Each returns whether the event was current; a void one has changed nothing.

    def started(self, event: e.EngineStarted, now: float) -> bool:
        model = self._current(event.model, event.op)
        if model is None:
            return False
        model.costs.start.add(self._enter(model, e.EngineStarted, S.AWAKE, now))
        model.can_park, model.can_sleep = event.can_park, event.can_sleep
        model.idle_since = now
        return True

    def slept(self, event: e.EngineSlept, now: float) -> bool:
        model = self._current(event.model, event.op)
        if model is None:
            return False
        by = model.asleep_by
        saved = by is not None and by.process is ProcessStrategy.CHECKPOINT
        spent = self._enter(model, e.EngineSlept, S.CHECKPOINTED if saved else S.ASLEEP, now)
        assert by is not None
        model.costs.add("sleep", by, spent)
        if saved:
            model.image = by
        return True

    def stayed(self, model: Model, reason: str, now: float) -> None:
        """It could not be saved, and sleeps as its weights were told to."""
        assert model.asleep_by is not None
        model.last_error = reason
        self._enter(model, e.OperationFailed, S.ASLEEP, now, reason=reason)
        model.asleep_by = EvictionPolicy(model.asleep_by.weights, ProcessStrategy.KEEP_RUNNING)

    def woke(self, event: e.EngineWoke, now: float) -> bool:
        model = self._current(event.model, event.op)
        if model is None:
            return False
        if model.restoring and not event.image_kept:
            model.image = None
        by = model.asleep_by
        spent = self._enter(model, e.EngineWoke, S.AWAKE, now)
        assert by is not None
        model.costs.add("wake", by, spent)
        model.asleep_by = None
        model.idle_since = now
        model.answered = False
        return True

    def stopped(self, event: e.EngineStopped, now: float) -> bool:
        model = self._current(event.model, event.op)
        if model is None:
            return False
        failed = model.failures > 0 and model.retry_at > now
        to = S.FAILED if failed else S.NOT_STARTED if model.image is None else S.CHECKPOINTED
        model.costs.stop.add(self._enter(model, e.EngineStopped, to, now, reason=model.last_error if failed else ""))
        model.asleep_by = model.image if to is S.CHECKPOINTED else None
        return True

    def image_found(self, event: e.ImageFound, now: float) -> None:
        """The engine that there is may have been made from it or not: it is what the next one is restored from."""
        model = self._state.models.get(event.model)
        if model is None:
            raise IllegalEvent(f"no model {event.model!r}")
        model.image = event.eviction
        if model.state is S.NOT_STARTED:
            self._enter(model, e.ImageFound, S.CHECKPOINTED, now)
            model.can_park, model.can_sleep = event.can_park, event.can_sleep
        if model.state is S.CHECKPOINTED:
            model.asleep_by = event.eviction

    def image_lost(self, event: e.ImageLost, now: float) -> None:
        """Whatever took it: the next start is a cold one. An engine that is being restored will tell by itself."""
        model = self._state.models.get(event.model)
        if model is None:
            raise IllegalEvent(f"no model {event.model!r}")
        model.image = None
        if model.state is S.CHECKPOINTED:
            self._enter(model, e.ImageLost, S.NOT_STARTED, now, reason=event.reason)
            model.asleep_by = None

    def refuse_image(self, model: Model, reason: str) -> None:
        """No engine that is worth anything comes of its image."""
        model.image = None
        self._state.out.append(c.RefuseImage(model.name, reason))

    def adopted(self, event: e.EngineAdopted, now: float) -> None:
        """An engine of an earlier daemon is ours. Raises IllegalEvent if there is one already, or no room for it."""
        state = self._state
        if event.model not in state.models:
            raise IllegalEvent(f"no model {event.model!r}")
        model = state.models[event.model]
        to = S.STARTING if event.starting else S.AWAKE if event.asleep_by is None else S.ASLEEP
        model.check(e.EngineAdopted, to)
        model.asleep_by = event.asleep_by
        if not state.has_room(model, to):
            model.asleep_by = None
            raise IllegalEvent(f"{model.name}: there is no room for the adopted engine")
        model.op = model.incarnation = event.incarnation
        model.placement = model.spec.placement
        state.last_op = max(state.last_op, event.incarnation)
        model.can_park, model.can_sleep = event.can_park, event.can_sleep
        model.outdated = event.outdated
        model.idle_since = now
        self._enter(model, e.EngineAdopted, to, now, model.spec.start_timeout if event.starting else None)

    def died(self, event: e.EngineDied, now: float) -> bool:
        """A process ended unasked: what is left of the engine is stopped."""
        model = self._state.models.get(event.model)
        if model is None:
            return False
        if event.incarnation > model.incarnation:
            raise IllegalEvent(f"{model.name}: incarnation {event.incarnation} was never started")
        void = event.incarnation < model.incarnation or model.state in WITHOUT_PROCESS
        if void or model.state is S.STOPPING:
            return False
        if model.state is S.WAKING:
            # The operation under way fails by it, too, and then it is started from its weights.
            return False
        if model.restored and not model.answered and model.state is S.AWAKE:
            self.refuse_image(model, event.reason)
        # One that had served is started again at once; one that dies again and again is not.
        self.fail(model, event.reason, now, at_once=model.state not in (S.STARTING, S.WAKING))
        return True

    # Failures

    def fail(self, model: Model, reason: str, now: float, *, at_once: bool = False) -> None:
        """Note a failure and stop what is left. With `at_once` the first in a row costs no backoff."""
        settings = self._state.settings
        model.failures += 1
        model.failed_at = now
        model.last_error = reason
        exponent = min(model.failures - (2 if at_once else 1), 32)
        delay = min(settings.backoff_cap, settings.backoff_base * 2.0**exponent) if exponent >= 0 else 0.0
        model.retry_at = now + delay
        self.stop(model, now, reason)

    def succeeded(self, model: Model) -> None:
        """It has answered a request: earlier failures no longer count."""
        model.failures = 0
        model.last_error = ""

    def overdue(self, now: float) -> list[Model]:
        """The models whose transition has not ended by its deadline."""
        return [model for model in self._state.models.values() if model.deadline is not None and model.deadline <= now]

    def current(self, event: e.OperationFailed) -> Model | None:
        """The model whose operation under way failed; None if the report is void."""
        model = self._current(event.model, event.op)
        if model is not None and model.state not in IN_TRANSITION:
            raise IllegalEvent(f"{model.name}: OperationFailed while {model.state.value}")
        return model

    # Helpers

    def _begin(self, model: Model) -> int:
        model.op = self._state.next_op()
        return model.op

    def _current(self, name: str, op: int) -> Model | None:
        """The model, or None if it is gone or a later operation has taken the place of `op`."""
        model = self._state.models.get(name)
        if model is None:
            return None
        if op > model.op:
            raise IllegalEvent(f"{name}: operation {op} was never begun")
        return model if op == model.op else None

    def _enter(
        self, model: Model, trigger: type, to: S, now: float, timeout: float | None = None, reason: str = ""
    ) -> float:
        old = model.state
        margin = self._state.settings.deadline_margin
        deadline = None if timeout is None else now + timeout + margin
        spent = model.enter(trigger, to, now, deadline)
        self._state.out.append(c.EngineChanged(model.name, old, to, spent, reason))
        return spent
