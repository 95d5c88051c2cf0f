"""What a run consists of, as plain data: models, what arrives, what the operator does, what goes wrong.

A scenario is complete: the same one always runs the same way. A failing one is shortened by taking things out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from llmuxd.core.eviction import STOP, Auto, EvictionPolicy
from llmuxd.core.policy import Policy
from llmuxd.core.settings import ModelSpec, Settings
from llmuxd.sim.virtual.service import BatchService, Service, Work


@dataclass(frozen=True, slots=True)
class EngineSecs:
    """How long each operation of an engine takes when nothing is wrong."""

    start: float = 30.0
    sleep: float = 1.0
    wake: float = 1.0
    stop: float = 0.5


@dataclass(frozen=True, slots=True)
class SimModel:
    """A model, and how its engine behaves."""

    spec: ModelSpec
    secs: EngineSecs = EngineSecs()
    can_park: bool = True
    can_sleep: bool = True
    keeps_image: bool = True
    """What it was restored from is there for another time."""


ONE_TOKEN = Work(1, 1)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A client and its request."""

    at: float
    model: str
    work: Work = ONE_TOKEN
    leaves_after: float | None = None
    """Seconds after which the client goes away, if it has not been answered by then."""
    priority: int = 0


class Move(str, Enum):
    """What an operator may do."""

    SWITCH = "switch"
    WAKE = "wake"
    SLEEP = "sleep"
    STOP = "stop"
    PIN = "pin"
    MANUAL = "manual"
    AUTO = "auto"
    RELOAD = "reload"
    """With the models turned by one: the first is taken out, and one that was out comes back."""
    RESTART = "restart"
    """The daemon is killed and started again, wherever it is; it adopts what it finds."""
    CHECKPOINT = "checkpoint"
    """Sleep by the eviction of the action, whatever the model's own is."""
    SET_EVICTION = "set_eviction"
    """From now on the model's own is that of the action."""
    BRING_IMAGE = "bring_image"
    """There is another image of the model, made elsewhere by the eviction of the action."""
    LOSE_IMAGE = "lose_image"
    """Somebody removes the image of a model, and the daemon hears of it, or not before it wants it."""
    HAND_OVER = "hand_over"
    """The daemon makes way for the next one, which adopts what it is left."""
    SHUTDOWN = "shutdown"
    """It ends, with all its engines."""


@dataclass(frozen=True, slots=True)
class Action:
    """The operator's hand at a time."""

    at: float
    move: Move
    model: str = ""
    eviction: EvictionPolicy | Auto = STOP


class OpFault(str, Enum):
    """What may become of one operation of an engine."""

    FAIL = "fail"
    """It answers an error."""
    HANG = "hang"
    """Nothing comes of it; the engine layer reports its timeout."""
    LOST = "lost"
    """Nothing comes of it, not even a report."""
    SLOW = "slow"
    """It takes ten times as long."""
    DIE = "die"
    """The engine dies half-way."""
    LIE = "lie"
    """A sleep that frees nothing, answered with success, and found out."""
    HIDDEN_LIE = "hidden_lie"
    """The same, and not found out: whoever needs the memory next gets an out-of-memory error. Of one that is saved it
    is the image that is good for nothing."""
    DIE_AFTER = "die_after"
    """It succeeds, and the engine, if there is one then, dies a moment later."""


@dataclass(frozen=True, slots=True)
class OperationGoesWrong:
    """The `nth` operation of its kind (start, sleep, wake, stop) of a model."""

    model: str
    kind: str
    nth: int
    fault: OpFault


@dataclass(frozen=True, slots=True)
class EngineDies:
    """The engine of a model, if it has one, is killed."""

    at: float
    model: str
    noticed_after: float
    """Seconds until the supervisor tells; its connections break at once."""


Fault = OperationGoesWrong | EngineDies


@dataclass(frozen=True)
class Scenario:
    """All that a run depends on."""

    models: tuple[SimModel, ...]
    devices: Mapping[str, int]
    settings: Settings
    policy: Policy
    arrivals: tuple[Arrival, ...]
    actions: tuple[Action, ...] = ()
    faults: tuple[Fault, ...] = ()
    build_service: Callable[[], Service] = BatchService
    begin_asleep: bool = True
    """The engines are there from the start and asleep, as after a warm-up."""
    jitter: float = 0.0
    """Each duration is longer or shorter by at most this share."""
    jitter_seed: int = 0
    most_events: int | None = None
    """A run with more does not come to rest."""
    out_at_first: frozenset[str] = field(default_factory=frozenset)
    """Models that are in `models` and come in with a reload."""
