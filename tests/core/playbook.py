"""Playbooks: this event comes in at that time, these commands go out.

A `Play` holds a switcher over models that share one device with room for one (or what the test says). `at` feeds an
event and returns its commands in a short form that reads aloud: ``"start a"``, ``"forward 1"``, ``"refuse 2
queue_full"``. Operation numbers are followed for the test: `done("a")` reports the operation under way as done.

An `Auditor` watches every play: a test fails where an invariant does, whatever it is about.
"""

from __future__ import annotations

from typing import Any

import pytest

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.audit import Auditor
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.core.policies import Fifo
from llmuxd.core.policy import Policy
from llmuxd.core.settings import ModelSpec, Placement, Settings
from llmuxd.core.state import IN_TRANSITION, SwitchMode
from llmuxd.core.switcher import Switcher

OFFLOAD = EvictionPolicy.parse("offload+keep_running")
RETAIN = EvictionPolicy.parse("retain+keep_running")
DISCARD = EvictionPolicy.parse("discard+keep_running")
STOP = EvictionPolicy.parse("retain+stop")
ONE = Placement({"gpu": 1})


def spec(name: str, eviction: EvictionPolicy = OFFLOAD, placement: Placement = ONE, **bounds: object) -> ModelSpec:
    return ModelSpec(name, eviction, placement, **bounds)  # type: ignore[arg-type]


def settings(**changes: object) -> Settings:
    """No cooldown, and round numbers."""
    values: dict[str, object] = {"min_active": 0.0, "request_timeout": 100.0, "deadline_margin": 10.0, **changes}
    return Settings(**values)  # type: ignore[arg-type]


def short(command: c.Command) -> str | None:
    """A command in a few words; None for a notice."""
    if isinstance(command, c.Forward):
        return f"forward {command.request}"
    if isinstance(command, c.Refuse):
        return f"refuse {command.request} {command.refusal.value}"
    if isinstance(command, c.Abort):
        return f"abort {command.request}"
    if isinstance(command, c.StartEngine):
        return f"start {command.model}"
    if isinstance(command, c.SleepEngine):
        return f"sleep {command.model} {command.eviction} {command.mode.value}"
    if isinstance(command, c.WakeEngine):
        return f"wake {command.model} {command.eviction}"
    if isinstance(command, c.StopEngine):
        return f"stop {command.model}"
    if isinstance(command, c.RefuseImage):
        return f"refuse image {command.model}"
    if isinstance(command, c.JobDone):
        return f"job {command.job} done"
    if isinstance(command, c.JobFailed):
        return f"job {command.job} {'failed' if command.allowed else 'not allowed'}"
    if isinstance(command, c.AllStopped):
        return "all stopped"
    if isinstance(command, c.Probed):
        return f"probe {command.probe} {'stalled' if command.stalls else 'well'}"
    return None


class Play:
    """A switcher and the clock of a test."""

    def __init__(
        self,
        *specs: ModelSpec,
        policy: Policy | None = None,
        devices: dict[str, int] | None = None,
        mode: SwitchMode | None = None,
        costs: dict[str, dict[str, float]] | None = None,
        **changes: object,
    ) -> None:
        models = specs or (spec("a"), spec("b"), spec("c"))
        self.switcher = Switcher(models, devices or {"gpu": 1}, settings(**changes), policy or Fifo(), 0.0, mode, costs)
        self.auditor = Auditor(self.switcher)
        self.commands: list[c.Command] = []
        self.now = 0.0

    @property
    def state(self):  # type: ignore[no-untyped-def]
        return self.switcher.state

    def model(self, name: str):  # type: ignore[no-untyped-def]
        return self.switcher.state.models[name]

    def at(self, now: float, event: e.Event) -> list[str]:
        """Feed an event; the commands, without notices."""
        self.now = now
        self.commands = self.switcher.handle(event, now)
        violation = self.auditor.observe(event, self.commands, now)
        assert violation is None, str(violation)
        check_shape(self.switcher)
        deadline = self.switcher.next_deadline
        if isinstance(event, e.Tick):
            assert deadline is None or deadline > now, "a tick leaves no timer that is due"
        return [text for text in map(short, self.commands) if text is not None]

    def notices(self) -> list[c.Command]:
        """The notices of the last event."""
        return [command for command in self.commands if short(command) is None]

    def ask(self, now: float, request: int, model: str, **more: Any) -> list[str]:
        return self.at(now, e.RequestArrived(request, model, **more))

    def done(self, now: float, name: str, **more: bool) -> list[str]:
        """The operation under way on an engine succeeds."""
        model = self.model(name)
        event = {
            S.STARTING: lambda: e.EngineStarted(name, model.op, **more),
            S.FALLING_ASLEEP: lambda: e.EngineSlept(name, model.op),
            S.WAKING: lambda: e.EngineWoke(name, model.op, **more),
            S.STOPPING: lambda: e.EngineStopped(name, model.op),
        }[model.state]()
        return self.at(now, event)

    def fails(self, now: float, name: str, reason: str = "boom", kind: str = "refused") -> list[str]:
        """The operation under way on an engine fails."""
        return self.at(now, e.OperationFailed(name, self.model(name).op, e.FailureKind(kind), reason))

    def dies(self, now: float, name: str, reason: str = "killed") -> list[str]:
        return self.at(now, e.EngineDied(name, self.model(name).incarnation, reason))

    def tick(self, now: float) -> list[str]:
        return self.at(now, e.Tick())

    def awake(self, name: str, now: float = 0.0) -> None:
        """Bring a model up by a request that is answered."""
        assert self.ask(now, 1000, name) == [f"start {name}"]
        assert self.done(now, name) == ["forward 1000"]
        assert self.at(now, e.RequestFinished(1000)) == []

    def asleep(self, name: str, now: float = 0.0) -> None:
        """Bring a model up and to sleep by its policy."""
        self.awake(name, now)
        assert len(self.at(now, e.OperatorSleep(1000, name))) == 1
        assert self.done(now, name) == ["job 1000 done"]


class Restless(Switcher):
    """Looks at everything after every event, as if there were no rest."""

    def handle(self, event: e.Event, now: float) -> list[c.Command]:
        self._rest.end()
        return super().handle(event, now)


def check_shape(switcher: Switcher) -> None:
    """What must hold after every event, and is too small for an invariant of production."""
    state = switcher.state
    placed = [request.id for m in state.models.values() for request in (*m.queue, *m.in_flight.values())]
    assert sorted(placed) == sorted(state.requests), "each request is in exactly one place"
    for model in state.models.values():
        assert (model.deadline is not None) == (model.state in IN_TRANSITION), "exactly a transition has a deadline"
        waiting = list(model.queue)
        assert waiting == sorted(waiting, key=lambda r: (-r.priority, r.arrived, r.id)), "the next one comes first"
        assert model.queue.oldest == min((r.arrived for r in waiting), default=None)
        assert [model.queue.before(r) for r in waiting] == list(range(len(waiting)))
        assert model.queue.arrivals == pytest.approx(sum(r.arrived for r in waiting), abs=1e-6)
        asleep = model.state in (S.FALLING_ASLEEP, S.ASLEEP, S.CHECKPOINTED, S.WAKING)
        assert (model.asleep_by is not None) == asleep
