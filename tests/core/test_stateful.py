"""Whatever happens, in whatever order: the invariants hold, no timer spins, and every request ends.

Hypothesis plays the world: clients, engines that do as they are told, late or not at all, operators, reloads, time.
It shrinks what it finds to the shortest sequence of events, which reads as a playbook. Each run plays the same; with
LLMUX_EXAMPLES=20000 in the environment it plays so many others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.audit import Auditor
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.policies import POLICIES
from llmuxd.core.policy import Policy, PolicyParameters
from llmuxd.core.queue import Request
from llmuxd.core.settings import InFlight, ModelSpec, Placement, Settings
from llmuxd.core.state import IN_TRANSITION, WITHOUT_PROCESS, IllegalEvent, Model
from llmuxd.core.switcher import Switcher
from tests.core.playbook import DISCARD, OFFLOAD, RETAIN, STOP, Restless, check_shape, spec

EVICTIONS = (OFFLOAD, DISCARD, RETAIN, STOP)
ANSWER_SECS = 3.0
"""How long an engine works on a request in the end, when all goes well."""


def one_device() -> tuple[dict[str, int], list[ModelSpec]]:
    """Room for one of them."""
    return {"gpu": 1}, [spec("a", max_in_flight=1), spec("b", ttl=20.0), spec("c", STOP, max_queue=2)]


def sizes() -> tuple[dict[str, int], list[ModelSpec]]:
    """One device, models of different sizes, sleepers that keep something."""
    take = {"a": (2, 0, 2), "b": (3, 1, 3), "c": (5, 1, 5), "d": (2, 1, 2)}
    models = [
        spec(name, eviction, Placement({"gpu": awake}, {"gpu": asleep}, {"gpu": retained}), priority=priority)
        for (name, (awake, asleep, retained)), eviction, priority in zip(
            take.items(), (OFFLOAD, RETAIN, DISCARD, OFFLOAD), (1.0, 2.0, 1.0, 0.5), strict=True
        )
    ]
    return {"gpu": 5}, models


def two_devices() -> tuple[dict[str, int], list[ModelSpec]]:
    """One model on each, one across both, a small one beside."""
    return {"g0": 4, "g1": 4}, [
        spec("a", placement=Placement({"g0": 3}, {"g0": 1}), ttl=30.0),
        spec("b", placement=Placement({"g1": 3}), max_in_flight=2),
        spec("c", placement=Placement({"g0": 2, "g1": 2}, {"g0": 1, "g1": 1})),
        spec("d", DISCARD, placement=Placement({"g0": 1})),
    ]


LAYOUTS: Sequence[Callable[[], tuple[dict[str, int], list[ModelSpec]]]] = (one_device, sizes, two_devices)

policies = st.sampled_from(sorted(POLICIES)).map(lambda name: POLICIES[name](PolicyParameters()))
bounds = st.builds(
    Settings,
    request_timeout=st.just(60.0),
    in_flight=st.sampled_from(InFlight),
    min_active=st.sampled_from([0.0, 2.0]),
    max_queue=st.just(12),
    backoff_cap=st.just(8.0),
    sleep_timeout=st.just(20.0),
    wake_timeout=st.just(20.0),
)
picks = st.integers(0, 11)
"""Which one, of those that there are."""


class World(RuleBasedStateMachine):
    """A switcher, and all that could happen to it."""

    switcher: Switcher

    @initialize(
        layout=st.sampled_from(LAYOUTS),
        policy=policies,
        bounds=bounds,
        found=st.lists(st.sampled_from([None, "awake", OFFLOAD, DISCARD, RETAIN]), min_size=4, max_size=4),
    )
    def begin(self, layout, policy: Policy, bounds: Settings, found) -> None:
        self.now = 0.0
        self.number = 0
        self.asked: set[int] = set()
        devices, self.specs = layout()
        self.evictions = {spec.name: spec.eviction for spec in self.specs}
        self.bounds, self.policy = bounds, policy
        self.switcher = Switcher(self.specs, devices, bounds, policy, 0.0)
        self.restless = Restless(self.specs, devices, bounds, policy, 0.0)
        self.auditor = Auditor(self.switcher)
        for number, (model, how) in enumerate(zip(self.specs, found, strict=False)):
            if how is not None:
                event = e.EngineAdopted(model.name, 10 + number, None if how == "awake" else how)
                if self.has_room(event):
                    self.feed(event)
                else:
                    self.refused(event)

    # What everything goes through

    def feed(self, event: e.Event) -> None:
        commands = self.switcher.handle(event, self.now)
        violation = self.auditor.observe(event, commands, self.now)
        assert violation is None, str(violation)
        check_shape(self.switcher)
        self.compare(self.restless.handle(event, self.now), commands)
        for command in commands:
            assert not isinstance(command, c.PolicyFailed), command
            if isinstance(command, (c.JobDone, c.JobFailed)):
                assert command.job in self.asked, "a job ends once"
                self.asked.remove(command.job)
        deadline = self.switcher.next_deadline
        if isinstance(event, e.Tick):
            assert deadline is None or deadline > self.now, "a tick leaves no timer that is due"

    def compare(self, expected: list[c.Command], commands: list[c.Command]) -> None:
        """With what comes of it if everything is looked at after every event."""
        assert commands == expected
        deadline, latest = self.switcher.next_deadline, self.restless.next_deadline
        assert latest is None or (deadline is not None and deadline <= latest), "no deadline is missed"
        assert self.switcher.state == self.restless.state

    def refused(self, event: e.Event) -> None:
        before = repr(self.switcher.state)
        with pytest.raises(IllegalEvent):
            self.switcher.handle(event, self.now)
        assert repr(self.switcher.state) == before

    def pass_time(self, until: float) -> None:
        """Its timers ring on the way."""
        while (due := self.switcher.next_deadline) is not None and due <= until:
            self.now = max(self.now, due)
            self.feed(e.Tick())
        self.now = until

    # What there is to choose from

    @property
    def models(self) -> list[Model]:
        return list(self.switcher.state.models.values())

    def in_state(self, *states: S) -> list[Model]:
        return [model for model in self.models if model.state in states]

    @property
    def in_flight(self) -> list[Request]:
        return [request for model in self.models for request in model.in_flight.values()]

    def has_room(self, event: e.EngineAdopted) -> bool:
        state = self.switcher.state
        placement = state.models[event.model].spec.placement
        holds = placement.awake
        if event.asleep_by is not None:
            holds = placement.retained if event.asleep_by == RETAIN else placement.asleep
        return all(state.used()[device] + amount <= state.devices[device] for device, amount in holds.items())

    def next(self) -> int:
        self.number += 1
        return self.number

    # Clients

    @rule(
        pick=picks,
        patient=st.booleans(),
        most_wait=st.sampled_from([None, None, 0.0, 3.0]),
        priorities=st.sampled_from([(0,), (0,), (0, 0, 0), (0, 9, -9), (9, 0, 9)]),
    )
    def requests_come(self, pick: int, patient: bool, most_wait: float | None, priorities: Sequence[int]) -> None:
        model = self.models[pick % len(self.models)]
        for priority in priorities:
            if model.name in self.switcher.state.models:
                self.feed(e.RequestArrived(self.next(), model.name, patient, most_wait, priority))

    @precondition(lambda self: self.in_flight)
    @rule(pick=picks, ok=st.sampled_from([True, True, False]))
    def an_answer_ends(self, pick: int, ok: bool) -> None:
        self.feed(e.RequestFinished(self.in_flight[pick % len(self.in_flight)].id, ok))

    @precondition(lambda self: self.in_flight)
    @rule(pick=picks)
    def a_request_bounces(self, pick: int) -> None:
        self.feed(e.RequestBounced(self.in_flight[pick % len(self.in_flight)].id))

    @precondition(lambda self: self.switcher.state.requests)
    @rule(pick=picks)
    def a_client_leaves(self, pick: int) -> None:
        requests = list(self.switcher.state.requests)
        self.feed(e.ClientLeft(requests[pick % len(requests)]))

    # Engines

    def report(self, model: Model, **more: bool) -> e.Event:
        return {
            S.STARTING: lambda: e.EngineStarted(model.name, model.op, **more),
            S.FALLING_ASLEEP: lambda: e.EngineSlept(model.name, model.op),
            S.WAKING: lambda: e.EngineWoke(model.name, model.op),
            S.STOPPING: lambda: e.EngineStopped(model.name, model.op),
        }[model.state]()

    @precondition(lambda self: self.in_state(*IN_TRANSITION))
    @rule(pick=picks, can_park=st.sampled_from([True, True, False]), can_sleep=st.sampled_from([True, True, False]))
    def an_engine_does_it(self, pick: int, can_park: bool, can_sleep: bool) -> None:
        moving = self.in_state(*IN_TRANSITION)
        model = moving[pick % len(moving)]
        more = {"can_park": can_park, "can_sleep": can_sleep} if model.state is S.STARTING else {}
        self.feed(self.report(model, **more))

    @precondition(lambda self: self.in_state(*IN_TRANSITION))
    @rule(after=st.sampled_from([0.1, 1.0, 4.0]))
    def all_engines_do_it(self, after: float) -> None:
        self.pass_time(self.now + after)
        for name in [model.name for model in self.in_state(*IN_TRANSITION)]:
            model = self.switcher.state.models.get(name)
            if model is not None and model.state in IN_TRANSITION:
                self.feed(self.report(model))

    @precondition(lambda self: self.in_state(*IN_TRANSITION))
    @rule(pick=picks, kind=st.sampled_from([*e.FailureKind, e.FailureKind.OUT_OF_MEMORY]))
    def an_engine_fails(self, pick: int, kind: e.FailureKind) -> None:
        moving = self.in_state(*IN_TRANSITION)
        model = moving[pick % len(moving)]
        self.feed(e.OperationFailed(model.name, model.op, kind, "boom"))

    @precondition(lambda self: [m for m in self.models if m.state not in WITHOUT_PROCESS])
    @rule(pick=picks)
    def an_engine_dies(self, pick: int) -> None:
        alive = [m for m in self.models if m.state not in WITHOUT_PROCESS]
        model = alive[pick % len(alive)]
        self.feed(e.EngineDied(model.name, model.incarnation, "killed"))

    # Operators

    @rule(
        pick=picks,
        make=st.sampled_from([e.OperatorSwitch, e.OperatorWake, e.OperatorSleep, e.OperatorStop, e.Pin]),
    )
    def an_operator_asks(self, pick: int, make: type) -> None:
        job = self.next()
        self.asked.add(job)
        self.feed(make(job, self.models[pick % len(self.models)].name))

    @rule(pick=picks, eviction=st.sampled_from(EVICTIONS))
    def an_operator_puts_to_sleep(self, pick: int, eviction) -> None:
        job = self.next()
        self.asked.add(job)
        self.feed(e.OperatorSleep(job, self.models[pick % len(self.models)].name, eviction))

    @rule(manual=st.sampled_from([True, False, False]))
    def the_mode_is_set(self, manual: bool) -> None:
        self.feed(e.SetMode(manual))

    @rule(pick=picks, eviction=st.sampled_from(EVICTIONS))
    def the_eviction_is_set(self, pick: int, eviction) -> None:
        self.feed(e.SetEviction(self.models[pick % len(self.models)].name, eviction))

    @rule(
        out=st.sets(st.sampled_from("abcd"), max_size=2),
        changed=st.frozensets(st.sampled_from("abcd")),
        eviction=st.sampled_from(EVICTIONS),
        bounds=bounds,
        policy=policies,
        shrunk=st.sets(st.sampled_from("abcd"), max_size=2),
    )
    def the_config_is_loaded_again(self, out, changed, eviction, bounds: Settings, policy: Policy, shrunk) -> None:
        specs = tuple(
            replace(s, eviction=eviction if s.name in changed else s.eviction, placement=_other(s, shrunk & changed))
            for s in self.specs
            if s.name not in out
        )
        self.feed(e.Reload(specs, bounds, policy, changed))

    @precondition(lambda self: self.number > 20)
    @rule(after=st.sampled_from([0.0, 30.0]))
    def llmuxd_is_shut_down(self, after: float) -> None:
        self.feed(e.Shutdown(self.now + after))

    @precondition(lambda self: self.number > 20)
    @rule(after=st.sampled_from([0.0, 30.0]))
    def llmuxd_makes_way(self, after: float) -> None:
        self.feed(e.HandOver(self.now + after))

    # Time

    @rule(secs=st.sampled_from([0.01, 0.5, 2.0, 5.0, 30.0]))
    def time_passes(self, secs: float) -> None:
        self.pass_time(self.now + secs)

    @precondition(lambda self: self.switcher.next_deadline is not None)
    @rule()
    def the_next_timer_rings(self) -> None:
        self.pass_time(max(self.now, self.switcher.next_deadline or 0.0))

    @precondition(lambda self: self.switcher.next_deadline is not None)
    @rule()
    def the_next_timer_is_late(self) -> None:
        """Something else happens before it rings."""
        self.now = max(self.now, (self.switcher.next_deadline or 0.0) + 0.5)

    @rule(secs=st.sampled_from([1.0, 100.0]))
    def the_machine_is_suspended(self, secs: float) -> None:
        self.now += secs
        self.feed(e.Tick())

    # What is void, and what cannot be

    @rule(pick=picks, make=st.sampled_from([e.EngineStarted, e.EngineSlept, e.EngineWoke, e.EngineStopped]))
    def a_late_report_comes(self, pick: int, make: type) -> None:
        model = self.models[pick % len(self.models)]
        if model.op > 0:
            self.feed(make(model.name, model.op - 1))
            self.feed(e.OperationFailed(model.name, model.op - 1, e.FailureKind.DIED, "late"))

    @rule(pick=picks, what=st.integers(0, 40))
    def what_cannot_have_happened(self, pick: int, what: int) -> None:
        model = self.models[pick % len(self.models)]
        name, op = model.name, model.op
        allowed = type(self.report(model)) if model.state in IN_TRANSITION else None
        reports = (e.EngineStarted, e.EngineSlept, e.EngineWoke, e.EngineStopped)
        impossible: list[e.Event] = [make(name, op) for make in reports if make is not allowed]
        impossible += [make(name, op + 1) for make in reports]
        impossible += [
            e.RequestArrived(9999, "nobody"),
            e.RequestFinished(9999),
            e.RequestBounced(9999),
            e.ClientLeft(9999),
            e.OperatorWake(9999, "nobody"),
            e.OperationFailed(name, op + 1, e.FailureKind.REFUSED, "never"),
            e.EngineDied(name, model.incarnation + 1, "never"),
            e.Reload((spec("huge", placement=Placement({"gpu": 99})),), self.bounds, self.policy),
        ]
        if model.state is not S.NOT_STARTED:
            impossible.append(e.EngineAdopted(name, op + 1))
        impossible += [e.RequestArrived(id_, name) for id_ in list(self.switcher.state.requests)[:1]]
        impossible += [e.RequestFinished(id_) for id_ in [request.id for request in model.queue][:1]]
        self.refused(impossible[what % len(impossible)])

    @rule()
    def it_is_probed(self) -> None:
        before = repr(self.switcher.state)
        (probed,) = self.switcher.handle(e.Probe(1), self.now)
        assert probed == c.Probed(1), probed
        assert repr(self.switcher.state) == before

    # In the end

    def teardown(self) -> None:
        """From now on everything succeeds, and so every request and every job comes to its end."""
        if not hasattr(self, "switcher"):
            return
        state = self.switcher.state
        self.feed(e.SetMode(manual=False))
        for _ in range(2000):
            if not state.requests and not self.asked and state.switch is None and not self.in_state(*IN_TRANSITION):
                break
            self.go_on()
        assert not state.requests, f"requests without end: {state.requests}"
        assert not self.asked, f"jobs without end: {self.asked}"
        assert state.switch is None, f"a switch without end: {state.switch}"
        if state.shutdown_deadline is not None:
            assert state.all_stopped

    def go_on(self) -> None:
        """The next thing that happens by itself."""
        events: list[tuple[float, e.Event]] = []
        for model in self.models:
            if model.state in IN_TRANSITION:
                events.append((model.since + 1.0, self.report(model)))
            for request in model.in_flight.values():
                if model.state is S.AWAKE:
                    events.append((max(request.forwarded, model.since) + ANSWER_SECS, e.RequestFinished(request.id)))
                elif model.state in (S.STOPPING, *WITHOUT_PROCESS):
                    events.append((self.now, e.RequestFinished(request.id, ok=False)))
        if self.switcher.next_deadline is not None:
            events.append((self.switcher.next_deadline, e.Tick()))
        assert events, "nothing will ever happen again"
        at, event = min(events, key=lambda each: each[0])
        self.now = max(self.now, at)
        self.feed(event)


def _other(model: ModelSpec, shrunk) -> Placement:
    """Of a model in `shrunk`, a placement that is smaller by one unit: the next reload makes it grow again."""
    if model.name not in shrunk:
        return model.placement
    return replace(model.placement, awake={device: max(1, n - 1) for device, n in model.placement.awake.items()})


World.TestCase.settings = settings(
    derandomize="LLMUX_EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    max_examples=int(os.environ.get("LLMUX_EXAMPLES", "500")),
    stateful_step_count=50,
    suppress_health_check=list(HealthCheck),
)
TestWorld = World.TestCase
