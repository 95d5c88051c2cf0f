"""The state that the core decides on, and the one table of how an engine's state may change.

Everything mutable of the core is in `State`. There are no decisions here: `engines`, `requests`, `switching`,
`operator`, `reloading` and `ending` make them, and each class there says what it writes.

An engine is always in exactly one `EngineState`, and `Model.enter` is the only place that changes it; it
refuses a change that is not in `TRANSITIONS`. The triggers are the commands that the core gives and the
events that come back, so the table reads as the protocol between the core and an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.choice import Choice, Resources
from llmuxd.core.costs import Costs, Rate
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.eviction import STOP, Auto, EvictionPolicy, ProcessStrategy, WeightStrategy
from llmuxd.core.queue import Queue, Request
from llmuxd.core.settings import ModelSpec, Placement, Settings


class IllegalEvent(Exception):
    """An event that cannot have happened in this state. Nothing was changed."""


TRANSITIONS: Mapping[S, Mapping[type[Any], tuple[S, ...]]] = {
    S.NOT_STARTED: {
        c.StartEngine: (S.STARTING,),
        e.EngineAdopted: (S.STARTING, S.AWAKE, S.ASLEEP),
        e.ImageFound: (S.CHECKPOINTED,),
    },
    S.STARTING: {e.EngineStarted: (S.AWAKE,), c.StopEngine: (S.STOPPING,)},
    S.AWAKE: {c.SleepEngine: (S.FALLING_ASLEEP,), c.StopEngine: (S.STOPPING,)},
    S.FALLING_ASLEEP: {
        e.EngineSlept: (S.ASLEEP, S.CHECKPOINTED),
        e.OperationFailed: (S.ASLEEP,),
        c.StopEngine: (S.STOPPING,),
    },
    S.ASLEEP: {c.WakeEngine: (S.WAKING,), c.StopEngine: (S.STOPPING,)},
    S.CHECKPOINTED: {
        c.WakeEngine: (S.WAKING,),
        e.EngineAdopted: (S.STARTING, S.AWAKE, S.ASLEEP),
        e.ImageLost: (S.NOT_STARTED,),
    },
    S.WAKING: {e.EngineWoke: (S.AWAKE,), c.StopEngine: (S.STOPPING,)},
    S.STOPPING: {e.EngineStopped: (S.NOT_STARTED, S.FAILED, S.CHECKPOINTED), c.StopEngine: (S.STOPPING,)},
    S.FAILED: {c.StartEngine: (S.STARTING,)},
}
"""State -> what happens -> the states that it may lead to."""

IN_TRANSITION = frozenset({S.STARTING, S.FALLING_ASLEEP, S.WAKING, S.STOPPING})
"""States that end by themselves, and so have a deadline."""

HOLDS_PARKED = frozenset({S.FALLING_ASLEEP, S.ASLEEP, S.WAKING})

LOADABLE = frozenset({S.NOT_STARTED, S.ASLEEP, S.CHECKPOINTED, S.FAILED})
"""States from which an engine can be made awake."""

WITHOUT_PROCESS = frozenset({S.NOT_STARTED, S.FAILED, S.CHECKPOINTED})


@dataclass(frozen=True, slots=True)
class SwitchMode:
    """Auto, or manual: nothing switches but by an operator's word, and one model may be pinned."""

    manual: bool = False
    pinned: str | None = None


@dataclass(slots=True)
class Model:
    """A model, its engine's state and its requests."""

    spec: ModelSpec
    since: float
    eviction: EvictionPolicy = STOP
    """The policy in force: the config's, the operator's word, or what was chosen."""
    auto: bool = False
    """It is chosen each time."""
    choice: Choice | None = None
    """If it is: what was chosen last, and why."""
    barred: dict[EvictionPolicy, float] = field(default_factory=dict)
    """Policies that have failed, and until when they are not chosen."""
    state: S = S.NOT_STARTED
    asleep_by: EvictionPolicy | None = None
    """How the engine was put (or is being put) to sleep; None unless it is falling asleep, asleep, checkpointed or
    waking."""
    image: EvictionPolicy | None = None
    """The policy by which the image was made that its engine can be restored from; None if there is none."""
    restored: bool = False
    """Its present process comes of an image."""
    placement: Placement | None = None
    """Where its engine runs, as the config was when it was started."""
    held: Mapping[str, int] = field(default_factory=dict)
    """What it held when its stop began: it holds no more than that until it is gone."""
    op: int = 0
    """The operation under way, or the last one; what an older one reports is void."""
    incarnation: int = 0
    """The operation that started the present process."""
    deadline: float | None = None
    """When the transition under way is given up. Never None in a transition."""
    can_park: bool = False
    can_sleep: bool = False
    failures: int = 0
    """In a row, without an answered request between them."""
    failed_at: float = 0.0
    """When it last did."""
    retry_at: float = 0.0
    last_error: str = ""
    suspect_until: float = 0.0
    """A connection to it broke before an answer: nothing is forwarded until its death is known, or this time."""
    idle_since: float = 0.0
    """When its last request ended, or it became awake."""
    last_switch: tuple[float, float] = (0.0, 0.0)
    """Begin and end of the last switch that made it awake."""
    retired: bool = False
    """No longer in the config: it serves what it accepted, and goes."""
    outdated: bool = False
    """Its engine was started from an older config, and is stopped when it is next idle."""
    costs: Costs = field(default_factory=Costs)
    queue: Queue = field(default_factory=Queue)
    parked_since: float = 0.0
    """When it was last put to sleep with requests in flight."""
    answered: bool = False
    """It has answered a request since it became awake."""
    barren_turns: int = 0
    """How often in a row it was put to sleep with requests in flight and had not."""
    last_arrival: float = float("-inf")
    rate: Rate = field(default_factory=Rate)
    """Of arrivals."""
    in_flight: dict[int, Request] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.spec.name

    def evict_by(self, eviction: EvictionPolicy | Auto) -> None:
        """Put a policy in force. A choice is made at once by `choose_all`."""
        self.auto = isinstance(eviction, Auto)
        if not isinstance(eviction, Auto):
            self.eviction, self.choice = eviction, None

    @property
    def holds(self) -> Placement:
        """Where the engine runs that it has, or would run if it were started now."""
        gone = self.state in WITHOUT_PROCESS or self.state is S.STOPPING
        return self.spec.placement if gone or self.placement is None else self.placement

    def blocked(self, now: float) -> bool:
        """Whether a failure is being waited out."""
        return self.failures > 0 and self.retry_at > now and self.state is not S.AWAKE

    def parked(self) -> bool:
        """Whether requests are held in the engine, to go on after its next wake."""
        return bool(self.in_flight) and self.state in HOLDS_PARKED

    def loadable(self, now: float) -> bool:
        """Whether it could be made awake, room permitting."""
        return self.state in LOADABLE and not self.blocked(now)

    @property
    def restoring(self) -> bool:
        """Whether its engine is being restored from an image."""
        by = self.asleep_by
        return self.state is S.WAKING and by is not None and by.process is ProcessStrategy.CHECKPOINT

    def check(self, trigger: type[Any], to: S) -> None:
        """Raises IllegalEvent if `trigger` may not lead to `to` from here."""
        if to not in TRANSITIONS[self.state].get(trigger, ()):
            raise IllegalEvent(f"{self.name}: {trigger.__name__} while {self.state.value}")

    def enter(self, trigger: type[Any], to: S, now: float, deadline: float | None) -> float:
        """Change the state; returns the seconds spent in the old one."""
        self.check(trigger, to)
        spent = now - self.since
        self.state, self.since, self.deadline = to, now, deadline
        return spent


@dataclass(slots=True)
class Job:
    """Something an operator asked for, waiting or under way. Written by `switcher` and `switching`."""

    id: int
    target: str | None
    """The model to be made awake, or None: only `victims` are to go."""
    victims: dict[str, EvictionPolicy] = field(default_factory=dict)
    forced: bool = False
    """Without cooldown."""
    undo_mode: SwitchMode | None = None
    """The mode as it was before the job changed it, to go back to if it fails."""


@dataclass(slots=True)
class Switch:
    """The switch under way. Written by `switching` alone."""

    id: int
    target: str | None
    victims: dict[str, EvictionPolicy]
    began: float
    phase: c.Phase
    phase_began: float
    forced: bool = False
    jobs: list[Job] = field(default_factory=list)
    drain_secs: float = 0.0
    """How long requests in flight may go on before they are parked."""
    made_room: bool = False
    """The sleepers on its devices were stopped after an out-of-memory error: it is not tried a third time."""

    def gates(self, model: str) -> bool:
        """Whether nothing may be forwarded to `model`: it is going, and its cooldown is over."""
        return model in self.victims and self.phase is not c.Phase.COOLDOWN


@dataclass(slots=True)
class State:
    """All of it. `out` collects the commands of the event being handled."""

    settings: Settings
    devices: dict[str, int]
    """Device name -> its capacity, in the units of the placements."""
    models: dict[str, Model]
    requests: dict[int, Request] = field(default_factory=dict)
    """Every accepted request that has not ended. Written by `requests`, as are the next two."""
    queued: int = 0
    timeouts: list[tuple[float, int]] = field(default_factory=list)
    """Heap of (deadline, request); entries of requests that are no longer queued are dropped when they surface."""
    switch: Switch | None = None
    jobs: list[Job] = field(default_factory=list)
    mode: SwitchMode = SwitchMode()
    resources: Resources = field(default_factory=Resources)
    shutdown_deadline: float | None = None
    all_stopped: bool = False
    handover_deadline: float | None = None
    closed: bool = False
    """The handover has come to its end: nothing is accepted and nothing is begun any more."""
    handed_over: bool = False
    last_op: int = 0
    last_switch: int = 0
    ask_policy_at: float | None = None
    """When the policy wanted to be asked again."""
    arrived: str | None = None
    """The model that the request was for, while its arrival is being handled."""
    out: list[c.Command] = field(default_factory=list)

    @property
    def ending(self) -> str:
        """What is said to those who want something of a daemon that is about to end; empty if it is not."""
        if self.shutdown_deadline is not None:
            return "llmuxd is shutting down"
        return "" if self.handover_deadline is None else "llmuxd is being restarted"

    def next_op(self) -> int:
        self.last_op += 1
        return self.last_op

    def is_held(self, model: Model) -> bool:
        """Whether requests for `model` are served in manual mode: it is awake, pinned, or asked for."""
        return (
            model.state is S.AWAKE
            or model.name == self.mode.pinned
            or (self.switch is not None and self.switch.target == model.name)
            or any(job.target == model.name for job in self.jobs)
        )

    def claim(self, model: Model) -> Mapping[str, int]:
        """What the engine of `model` holds on each device in its present state."""
        return self._claim_in(model, model.state)

    def _claim_in(self, model: Model, state: S) -> Mapping[str, int]:
        if state in WITHOUT_PROCESS:
            return {}
        if state is S.ASLEEP:
            assert model.asleep_by is not None
            return _left_by(model, model.asleep_by)
        if state is S.STOPPING:
            return model.held
        return model.holds.awake

    def has_room(self, model: Model, state: S) -> bool:
        """Whether a model without an engine could have one in `state`, all others being as they are."""
        used = self.used()
        return all(used[d] + n <= self.devices[d] for d, n in self._claim_in(model, state).items())

    def used(self) -> dict[str, int]:
        """Device name -> what all engines hold there."""
        used = dict.fromkeys(self.devices, 0)
        for model in self.models.values():
            for device, amount in self.claim(model).items():
                used[device] += amount
        return used

    def freed_by(self, model: Model, eviction: EvictionPolicy) -> Mapping[str, int]:
        """What an eviction of the model gives back on each device."""
        left = _left_by(model, eviction)
        return {device: amount - left.get(device, 0) for device, amount in self.claim(model).items()}

    def fits(self, target: Model, going: Mapping[str, EvictionPolicy]) -> bool:
        """Whether `target` could be awake once each model in `going` were evicted by the policy given there."""
        free = dict(self.devices)
        for model in self.models.values():
            if model is not target:
                left = _left_by(model, going[model.name]) if model.name in going else self.claim(model)
                for device, amount in left.items():
                    free[device] -= amount
        return all(amount <= free[device] for device, amount in target.holds.awake.items())


def check_placement(spec: ModelSpec, devices: Mapping[str, int]) -> None:
    """Raises ValueError if the model could not be awake even alone."""
    for device, amount in spec.placement.awake.items():
        if amount > devices.get(device, 0):
            raise ValueError(f"{spec.name} does not fit {device}: {amount} > {devices.get(device, 0)}")


def _left_by(model: Model, eviction: EvictionPolicy) -> Mapping[str, int]:
    """What stays on each device after the model is evicted by `eviction`."""
    if eviction.process is not ProcessStrategy.KEEP_RUNNING:
        return {}
    retains = eviction.weights is WeightStrategy.RETAIN
    return model.holds.retained if retains else model.holds.asleep
