"""What the core is told. Each event is a fact that has happened; none asks for anything to be awaited."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llmuxd.core.choice import Resources
from llmuxd.core.eviction import Auto, EvictionPolicy
from llmuxd.core.policy import Policy
from llmuxd.core.settings import ModelSpec, Settings


class FailureKind(str, Enum):
    """Why an operation on an engine failed, as far as it changes what to do next."""

    DIED = "died"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    REFUSED = "refused"
    """It answered an error."""
    LIED = "lied"
    """It answered success and is not in the state that was asked for."""
    SPAWN = "spawn"
    """Its command could not be executed."""
    NOT_CHECKPOINTED = "not_checkpointed"
    """It could not be saved, and lives: it sleeps as its weights were told to."""


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A client's request was read and its model resolved. `request` is unique for the life of the daemon.

    Of those that wait for the same model the one with the highest `priority` is forwarded first, and of those the one
    that came first. So a low one waits as long as higher ones keep coming, until its request timeout ends it: that is
    meant. Between models priorities decide nothing: how long a model's longest wait is counts whoever waits.
    """

    request: int
    model: str
    patient: bool = False
    """No request timeout: the warm-up's own inference waits for a cold start however long it takes."""
    most_wait: float | None = None
    """The longest that its client will wait, in seconds, if that is less than the request timeout; 0 for not at all."""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """The answer of a forwarded request is complete (`ok`), or it broke off and cannot be retried."""

    request: int
    ok: bool = True


@dataclass(frozen=True, slots=True)
class RequestBounced:
    """The engine died, or closed the connection, before the first byte of the answer of a forwarded request."""

    request: int


@dataclass(frozen=True, slots=True)
class ClientLeft:
    """The client went away, whether its request was queued, in flight or parked."""

    request: int


@dataclass(frozen=True, slots=True)
class EngineStarted:
    """The engine of operation `op` answers /health."""

    model: str
    op: int
    can_park: bool = True
    can_sleep: bool = True


@dataclass(frozen=True, slots=True)
class EngineSlept:
    """It is put to sleep as the policy of the command says: by one with a checkpoint it is saved, and gone."""

    model: str
    op: int


@dataclass(frozen=True, slots=True)
class EngineWoke:
    model: str
    op: int
    image_kept: bool = False
    """It was restored, and can be again from the same image."""


@dataclass(frozen=True, slots=True)
class EngineStopped:
    """Every process of the engine is gone and what it left behind is removed."""

    model: str
    op: int


@dataclass(frozen=True, slots=True)
class EngineAdopted:
    """An engine that an earlier daemon started was found alive, and with nothing in flight.

    `incarnation` is the one that it was started with. It is asleep by `asleep_by`, or awake if that is None; or
    `starting`, and then its `EngineStarted` is still to come, with the incarnation for its `op`.
    """

    model: str
    incarnation: int
    asleep_by: EvictionPolicy | None = None
    can_park: bool = True
    can_sleep: bool = True
    starting: bool = False
    outdated: bool = False
    """It was started from another config than today's: it is stopped when it is next idle."""


@dataclass(frozen=True, slots=True)
class ImageFound:
    """There is an image that the engine can be restored from, made by `eviction`: an earlier daemon's, or another's."""

    model: str
    eviction: EvictionPolicy
    can_park: bool = True
    can_sleep: bool = True


@dataclass(frozen=True, slots=True)
class ImageLost:
    """There is no image of the model any more."""

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class OperationFailed:
    """Start, sleep, wake or stop did not succeed. Whether a process is left is not known."""

    model: str
    op: int
    kind: FailureKind
    reason: str


@dataclass(frozen=True, slots=True)
class EngineDied:
    """A process of the engine ended unasked. `incarnation` is the `op` of the start that made it."""

    model: str
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class OperatorSwitch:
    """Make the model awake, evicting what is in its way. In manual mode it becomes the pinned one."""

    job: int
    model: str


@dataclass(frozen=True, slots=True)
class OperatorWake:
    """Make the model awake, in its turn, through the same switcher as a request."""

    job: int
    model: str


@dataclass(frozen=True, slots=True)
class OperatorSleep:
    """Drain the model and put it to sleep, by its own eviction policy or by the one given."""

    job: int
    model: str
    eviction: EvictionPolicy | None = None


@dataclass(frozen=True, slots=True)
class OperatorStop:
    """Drain the model and stop its engine, whatever state it is in."""

    job: int
    model: str


@dataclass(frozen=True, slots=True)
class Pin:
    """Manual mode with this model awake; requests for models that would need a switch are refused."""

    job: int
    model: str


@dataclass(frozen=True, slots=True)
class SetMode:
    """Auto, or manual. Leaving manual mode drops the pin."""

    manual: bool


@dataclass(frozen=True, slots=True)
class SetEviction:
    model: str
    eviction: EvictionPolicy | Auto


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Refuse new work; what is in flight may finish until `deadline` (clock time); then stop every engine."""

    deadline: float


@dataclass(frozen=True, slots=True)
class HandOver:
    """This daemon makes way for the next one. The requests there are go on until `deadline` (clock time); then what is
    left of them is ended, and the engines are left as they are."""

    deadline: float


@dataclass(frozen=True, slots=True)
class Reload:
    """A new config. A model that is not in `models` any more serves what it accepted, and goes.

    The engines of the models in `changed` were started from something else than they would be now: each is stopped
    when it is next idle.
    """

    models: tuple[ModelSpec, ...]
    settings: Settings
    policy: Policy
    changed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ResourcesMeasured:
    """What the box has for those that are evicted. To be fed now and then while a policy is left to be chosen."""

    resources: Resources


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. Fed when `Switcher.next_deadline` is due."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The self-check: it is answered by `Probed` in the same call, and changes nothing."""

    probe: int


RequestEvent = RequestArrived | RequestFinished | RequestBounced | ClientLeft
ImageEvent = ImageFound | ImageLost
EngineEvent = EngineStarted | EngineSlept | EngineWoke | EngineStopped | EngineAdopted | OperationFailed | EngineDied
OperatorEvent = OperatorSwitch | OperatorWake | OperatorSleep | OperatorStop | Pin | SetMode | SetEviction | Reload
EndingEvent = HandOver | Shutdown
Event = RequestEvent | EngineEvent | ImageEvent | OperatorEvent | EndingEvent | ResourcesMeasured | Tick | Probe
