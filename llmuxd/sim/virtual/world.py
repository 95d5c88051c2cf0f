"""A run: the production core, with a virtual clock in place of the runtime and simulated engines in place of vLLM.

The world is a heap of things that will happen. Each is handed to the core as the event that the runtime would make of
it; the core's commands are carried out by `engine.VirtualEngine`. After every event the auditor checks the
invariants, and the memory that the engines really hold is compared with what the devices have.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.audit import Auditor, Violation
from llmuxd.core.choice import Resources
from llmuxd.core.engine_state import EngineState
from llmuxd.core.eviction import EvictionPolicy, ProcessStrategy
from llmuxd.core.settings import ModelSpec
from llmuxd.core.state import IllegalEvent, Model
from llmuxd.core.switcher import Switcher
from llmuxd.sim.virtual.engine import Physical, VirtualEngine
from llmuxd.sim.virtual.scenario import Action, Arrival, EngineDies, Move, OperationGoesWrong, Scenario

RESTART_SECS = 0.5
"""Between the end of one daemon and the next one's adoption of its engines."""

_JOBS = (e.OperatorSwitch, e.OperatorWake, e.OperatorSleep, e.OperatorStop, e.Pin)

SHUTDOWN_SECS = 5.0
"""What is in flight may go on for so long."""

HANDOVER_SECS = 8.0
"""The same, before a handover."""

PATIENCE_SECS = 100_000.0
"""A run that has not come to rest by then never will."""


@dataclass(slots=True)
class Client:
    """One request as its client saw it. Times are of the virtual clock."""

    arrival: Arrival
    forwarded: float | None = None
    first_token: float | None = None
    ended: float | None = None
    answered: bool = False
    paused_since: float | None = None
    longest_pause: float = 0.0


@dataclass
class Outcome:
    """What came of a run."""

    clients: list[Client] = field(default_factory=list)
    switches: int = 0
    """Those that put something to sleep for something else."""
    switching_secs: float = 0.0
    serving_secs: float = 0.0
    """How long at least one awake engine had something to do."""
    ended: float = 0.0
    violation: Violation | None = None
    events: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    """How often something worth seeing happened: a sweep in which nothing does proves nothing."""


class World:
    """One run of a scenario. `log` is given a line for each event and what came of it."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        log: Callable[[str], None] | None = None,
        build_switcher: Callable[..., Switcher] = Switcher,
    ) -> None:
        self.scenario = scenario
        self.now = 0.0
        self.outcome = Outcome()
        self._log = log
        self._build_switcher = build_switcher
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._requests = itertools.count()
        self._jobs = itertools.count(1)
        self._open_jobs: set[int] = set()
        """Those of this daemon that have not ended."""
        self._tick_at: float | None = None
        self._clients: dict[int, Client] = {}
        """Those that have not ended, by request."""
        self._down = False
        """Between two daemons."""
        self._adopting = False
        """The daemon has not looked at all engines yet."""
        self.life = 0
        """Counts the daemons; what concerns an earlier one is void."""
        self._shut_down_in = 0
        """The daemon that was told to end."""
        self._busy_since: float | None = None
        self._busy: set[str] = set()
        self.engines = {
            model.spec.name: VirtualEngine(self, model, scenario.build_service()) for model in scenario.models
        }
        self.faults = {(f.model, f.kind, f.nth): f.fault for f in scenario.faults if isinstance(f, OperationGoesWrong)}
        self.hidden_lies = 0
        self._out = set(scenario.out_at_first)
        self._boot()

    # The clock

    def at(self, when: float, happen: Callable[[], None]) -> None:
        """Have something happen."""
        heapq.heappush(self._heap, (max(when, self.now), next(self._order), happen))

    def run(self) -> Outcome:
        """From the first event until nothing is left to happen, or an invariant is broken."""
        scenario = self.scenario
        for arrival in scenario.arrivals:
            self.at(arrival.at, partial(self._arrive, arrival))
        for action in scenario.actions:
            self.at(action.at, partial(self._act, action))
        for fault in scenario.faults:
            if isinstance(fault, EngineDies):
                self.at(fault.at, partial(self._kill, fault))
        if scenario.actions:
            # What waits for an operator would wait for ever.
            last = max([a.at for a in scenario.actions] + [a.at for a in scenario.arrivals])
            self.at(last + 1.0, partial(self._act, Action(last + 1.0, Move.AUTO)))
        while self._heap and self.outcome.violation is None:
            when, _, happen = heapq.heappop(self._heap)
            if scenario.most_events is not None and self.outcome.events > scenario.most_events:
                self.violate("rest", f"{self.outcome.events} events, and no end")
            if when > PATIENCE_SECS:
                # All that is left are timers.
                break
            self.now = when
            happen()
        if self.outcome.violation is None and self._clients:
            request = next(iter(self._clients))
            self.violate("ends_once", f"request {request} never ends")
        if self.outcome.violation is None and self._open_jobs:
            self.violate("jobs", f"job {min(self._open_jobs)} never ends")
        if self.outcome.violation is None and self._shut_down_in == self.life:
            for engine in self.engines.values():
                if engine.physical is not Physical.GONE:
                    self.violate("shutdown", f"{engine.name} is {engine.physical.value} after the shutdown")
        self.outcome.ended = self.now
        return self.outcome

    def violate(self, name: str, detail: str) -> None:
        """An invariant is broken, seen from outside the core."""
        self.outcome.violation = self.outcome.violation or Violation(name, detail, self.now)

    # Feeding the core

    def post(self, event: e.Event) -> None:
        """Hand an event to the core and carry out what it commands."""
        if self._down:
            return
        self.outcome.events += 1
        self._note(event)
        failing = self._failing(event)
        restoring = failing is not None and failing.restoring
        commands = self.switcher.handle(event, self.now)
        if self._log is not None:
            self._log(f"{self.now:.6f} {event}")
            for command in commands:
                self._log(f"    {command}")
        broken = self._auditor.observe(event, commands, self.now)
        if broken is not None:
            self.outcome.violation = self.outcome.violation or broken
            return
        for command in commands:
            self._carry_out(command)
        if failing is not None:
            self._check_escalation(failing, event, restoring=restoring)
        if not isinstance(event, (e.RequestArrived, e.RequestFinished, e.ClientLeft)):
            self._check_memory()
        self._arm()

    def _note(self, event: e.Event) -> None:
        """Count it, with what it is of."""
        seen, what = self.outcome.seen, type(event).__name__
        seen[what] += 1
        if not isinstance(event, (e.EngineSlept, e.EngineWoke, e.EngineDied, e.OperationFailed)):
            return
        model = self.switcher.state.models.get(event.model)
        if model is None:
            return
        process = "" if model.asleep_by is None else f", {model.asleep_by.process.value}"
        if isinstance(event, e.EngineDied):
            restored = ", restored" if model.restored and not model.answered and not process else process
            seen[f"died: {model.state.value}{restored}"] += event.incarnation == model.incarnation
        elif isinstance(event, e.OperationFailed):
            seen[f"failed: {model.state.value}{process}, {event.kind.value}"] += event.op == model.op
        else:
            seen[f"{what} {model.asleep_by}"] += event.op == model.op

    def _arm(self) -> None:
        due = self.switcher.next_deadline
        if due is not None and (self._tick_at is None or due < self._tick_at):
            self._tick_at = due
            self.at(due, partial(self._tick, due, self.life))

    def _tick(self, due: float, life: int) -> None:
        if life != self.life or self._tick_at != due:
            return
        self._tick_at = None
        next_due = self.switcher.next_deadline
        if next_due is not None and next_due <= self.now:
            self.post(e.Tick())
        else:
            self._arm()

    def _carry_out(self, command: c.Command) -> None:
        if isinstance(command, c.Forward):
            client = self._clients[command.request]
            client.forwarded = self.now
            self.engines[command.model].accept(command.request, client.arrival.work)
        elif isinstance(command, (c.Refuse, c.Abort)):
            self._end(command.request, answered=False)
        elif isinstance(command, (c.StartEngine, c.SleepEngine, c.WakeEngine, c.StopEngine)):
            self.outcome.seen[type(command).__name__] += 1
            self.engines[command.model].carry_out(command)
        elif isinstance(command, c.RefuseImage):
            self.outcome.seen["image refused"] += 1
            self.engines[command.model].lose_image(known=True)
        elif isinstance(command, (c.JobDone, c.JobFailed)):
            self._job_ended(command.job)
        elif isinstance(command, c.HandedOver):
            self._handed_over()
        elif isinstance(command, c.SwitchPhaseEnded):
            if command.phase in (c.Phase.SLEEP, c.Phase.WAKE):
                self.outcome.switching_secs += command.seconds
        elif isinstance(command, c.SwitchEnded) and command.victims and not command.cancelled:
            self.outcome.switches += 1

    # Clients

    def _arrive(self, arrival: Arrival) -> None:
        client = Client(arrival)
        self.outcome.clients.append(client)
        known = not self._down and arrival.model in self.switcher.state.models and arrival.model not in self._out
        if not known:
            # The proxy answers 404, or nobody listens: the core never hears of it.
            client.ended = self.now
            return
        request = next(self._requests)
        self._clients[request] = client
        if arrival.leaves_after is not None:
            self.at(self.now + arrival.leaves_after, partial(self._leave, request))
        self.post(e.RequestArrived(request, arrival.model, priority=arrival.priority))

    def _leave(self, request: int) -> None:
        client = self._clients.get(request)
        if client is not None:
            self._end(request, answered=False)
            self.post(e.ClientLeft(request))

    def _end(self, request: int, *, answered: bool) -> None:
        client = self._clients.pop(request)
        client.ended, client.answered = self.now, answered
        self.engines[client.arrival.model].forget(request)

    # What the engines tell of requests

    def holds(self, request: int) -> bool:
        """Whether the request has not ended."""
        return request in self._clients

    def first_token(self, request: int) -> None:
        client = self._clients[request]
        if client.first_token is None:
            client.first_token = self.now

    def paused(self, request: int) -> None:
        """A request stands still in an engine that goes to sleep."""
        client = self._clients[request]
        self.outcome.seen["request parked"] += 1
        if client.first_token is not None and client.paused_since is None:
            client.paused_since = self.now

    def resumed(self, request: int) -> None:
        client = self._clients[request]
        if client.paused_since is not None:
            client.longest_pause = max(client.longest_pause, self.now - client.paused_since)
            client.paused_since = None

    def finished(self, request: int) -> None:
        self._end(request, answered=True)
        self.post(e.RequestFinished(request))

    def broken(self, request: int) -> None:
        """The engine died over a request."""
        client = self._clients[request]
        if client.first_token is None:
            self.post(e.RequestBounced(request))
        else:
            self._end(request, answered=False)
            self.post(e.RequestFinished(request, ok=False))

    def busy(self, model: str, busy: bool) -> None:
        """An engine has begun, or ceased, to compute."""
        if busy == (model in self._busy):
            return
        if busy:
            self._busy.add(model)
            self._busy_since = self.now if self._busy_since is None else self._busy_since
            return
        self._busy.discard(model)
        if not self._busy and self._busy_since is not None:
            self.outcome.serving_secs += self.now - self._busy_since
            self._busy_since = None

    # What comes of failures

    def _failing(self, event: e.Event) -> Model | None:
        """The model, if the event says that an operation which is under way has failed."""
        if not isinstance(event, e.OperationFailed):
            return None
        model = self.switcher.state.models.get(event.model)
        if model is None or event.op != model.op or model.state is EngineState.STOPPING:
            return None
        return model

    def _check_escalation(self, model: Model, event: e.Event, *, restoring: bool) -> None:
        """Whatever has failed is stopped, but for an engine that could not be saved, and sleeps as well as any."""
        assert isinstance(event, e.OperationFailed)
        if restoring and event.kind is not e.FailureKind.OUT_OF_MEMORY:
            self.engines[model.name].restore_failed(event.kind)
        lives = event.kind is e.FailureKind.NOT_CHECKPOINTED
        by = model.asleep_by
        kept = by is not None and by.process is ProcessStrategy.KEEP_RUNNING
        well = lives and kept and model.state in (EngineState.ASLEEP, EngineState.WAKING)
        if model.state is not EngineState.STOPPING and not well:
            self.violate("escalation", f"{model.name} is {model.state.value} after {event.kind.value}")

    def _job_ended(self, job: int) -> None:
        if job not in self._open_jobs:
            self.violate("jobs", f"job {job} ends, and had ended before, or never began")
        self._open_jobs.discard(job)

    # Memory

    def _check_memory(self) -> None:
        """No engine holds more than the core knows of: one that was saved or suspended holds nothing."""
        state = self.switcher.state
        if self.hidden_lies or self._down or self._adopting:
            return
        for name, engine in self.engines.items():
            model = state.models.get(name)
            known = {} if model is None else state.claim(model)
            if any(amount > known.get(device, 0) for device, amount in engine.holds().items()):
                what = "is gone" if model is None else f"is {model.state.value} ({model.asleep_by})"
                self.violate("memory", f"{name} {what} and holds {dict(engine.holds())}")

    def free(self, device: str) -> int:
        """What no engine really holds."""
        return self.scenario.devices[device] - sum(engine.holds().get(device, 0) for engine in self.engines.values())

    # Operators

    def _act(self, action: Action) -> None:
        self.outcome.seen[f"operator: {action.move.value}"] += 1
        if action.move is Move.RESTART:
            self._restart()
            return
        if self._down:
            return
        event = self._event_of(action)
        if isinstance(event, _JOBS):
            self._open_jobs.add(event.job)
        if event is not None:
            self.post(event)

    def _event_of(self, action: Action) -> e.Event | None:
        if action.move is Move.RELOAD:
            return self._reload(action.model)
        if action.move is Move.HAND_OVER:
            return e.HandOver(self.now + HANDOVER_SECS)
        if action.move is Move.SHUTDOWN:
            self._shut_down_in = self.life
            return e.Shutdown(self.now + SHUTDOWN_SECS)
        if action.move in (Move.MANUAL, Move.AUTO):
            return e.SetMode(action.move is Move.MANUAL)
        engine = self.engines[action.model]
        known = action.model in self.switcher.state.models
        if action.move is Move.LOSE_IMAGE:
            # Every second one is only found out when it is wanted.
            told = known and bool(next(self._jobs) % 2)
            engine.lose_image(known=told)
            return e.ImageLost(action.model, "removed") if told else None
        eviction = action.eviction
        if action.move is Move.BRING_IMAGE:
            assert isinstance(eviction, EvictionPolicy)
            engine.bring_image(eviction)
            return engine.image() if known else None
        if not known:
            return None
        if action.move is Move.SET_EVICTION:
            return e.SetEviction(action.model, eviction)
        if action.move is Move.CHECKPOINT:
            assert isinstance(eviction, EvictionPolicy)
            return e.OperatorSleep(next(self._jobs), action.model, eviction)
        make: Callable[[int, str], e.Event] = {
            Move.SWITCH: e.OperatorSwitch,
            Move.WAKE: e.OperatorWake,
            Move.SLEEP: e.OperatorSleep,
            Move.STOP: e.OperatorStop,
            Move.PIN: e.Pin,
        }[action.move]  # type: ignore[assignment]
        return make(next(self._jobs), action.model)

    def _reload(self, model: str) -> e.Reload:
        """The model goes if it is in, comes back if it is out; what stays is called changed, every second one."""
        self._out ^= {model}
        specs = self._specs()
        if not specs:
            self._out.clear()
            specs = self._specs()
        changed = frozenset(spec.name for spec in specs[::2])
        return e.Reload(specs, self.scenario.settings, self.scenario.policy, changed)

    def _specs(self) -> tuple[ModelSpec, ...]:
        return tuple(model.spec for model in self.scenario.models if model.spec.name not in self._out)

    # The daemon

    def _boot(self) -> None:
        """A daemon starts, and adopts what engines it finds."""
        self._down, self._adopting = False, True
        self.life += 1
        self._tick_at = None
        scenario = self.scenario
        self.switcher = self._build_switcher(
            self._specs(), scenario.devices, scenario.settings, scenario.policy, self.now
        )
        self._auditor = Auditor(self.switcher)
        for name, engine in self.engines.items():
            if self.life == 1 and scenario.begin_asleep:
                engine.be_asleep()
            if name not in self.switcher.state.models or not engine.adoptable():
                engine.vanish()
                continue
            try:
                self.post(engine.adoption())
            except IllegalEvent:
                engine.vanish()
        if any(model.auto for model in self.switcher.state.models.values()):
            self.post(e.ResourcesMeasured(Resources(usable=frozenset(ProcessStrategy))))
        for name, engine in self.engines.items():
            image = engine.image()
            if image is not None and name in self.switcher.state.models:
                self.post(image)
        self._adopting = False

    def _restart(self) -> None:
        """The daemon is gone from one moment to the next, and every connection with it."""
        if self._down:
            return
        for request in list(self._clients):
            self._end(request, answered=False)
        self._end_life()

    def _handed_over(self) -> None:
        if self._clients:
            self.violate("ends_once", f"request {next(iter(self._clients))} is left at the handover")
        if self._open_jobs:
            self.violate("jobs", f"job {min(self._open_jobs)} is left at the handover")
        for engine in self.engines.values():
            if engine.physical in (Physical.FALLING_ASLEEP, Physical.WAKING, Physical.STOPPING):
                self.violate("handover", f"{engine.name} is {engine.physical.value} at the handover")
        self._end_life()

    def _end_life(self) -> None:
        self._down = True
        self._open_jobs.clear()
        self.life += 1
        self.at(self.now + RESTART_SECS, self._boot)

    def _kill(self, fault: EngineDies) -> None:
        engine = self.engines[fault.model]
        if engine.physical is not Physical.GONE:
            engine.die("killed", fault.noticed_after)
