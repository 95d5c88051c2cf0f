"""What the core asks for. The runtime starts each command; what comes of it returns as an event."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llmuxd.core.engine_state import EngineState
from llmuxd.core.eviction import EvictionPolicy


class Refusal(str, Enum):
    """Why a request is not served. The proxy turns it into a status and an error code."""

    QUEUE_FULL = "queue_full"
    SHUTTING_DOWN = "shutting_down"
    CANNOT_LOAD = "model_unavailable"
    PINNED = "model_not_pinned"
    TIMED_OUT = "queue_timeout"
    ENGINE_DIED = "engine_died"


class SleepMode(str, Enum):
    """vLLM's `mode` of /sleep: what becomes of requests that it still has."""

    WAIT = "wait"
    KEEP = "keep"


class Phase(str, Enum):
    """The phases of a switch, in their order."""

    COOLDOWN = "cooldown"
    DRAIN = "drain"
    SLEEP = "sleep"
    WAKE = "wake"


@dataclass(frozen=True, slots=True)
class Forward:
    """Send the request to its engine, which is awake."""

    request: int
    model: str
    queue_secs: float
    """Time since the request arrived, its share of a switch included."""
    switch_secs: float
    """The part of it during which a switch to its model was under way."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """End a request that was not forwarded. `retry_after` is in seconds; None where no time would help."""

    request: int
    refusal: Refusal
    message: str
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request that is in flight: break its answer off, or refuse it if none has begun."""

    request: int
    refusal: Refusal
    message: str


@dataclass(frozen=True, slots=True)
class StartEngine:
    model: str
    op: int
    timeout: float


@dataclass(frozen=True, slots=True)
class SleepEngine:
    model: str
    op: int
    eviction: EvictionPolicy
    mode: SleepMode
    timeout: float


@dataclass(frozen=True, slots=True)
class WakeEngine:
    model: str
    op: int
    eviction: EvictionPolicy
    """The policy it was put to sleep by: waking reverses exactly that."""
    timeout: float


@dataclass(frozen=True, slots=True)
class StopEngine:
    """End every process of the engine, whatever it is doing; supersedes the operation under way."""

    model: str
    op: int
    grace: float
    """Seconds between asking it to end and killing the whole tree."""


@dataclass(frozen=True, slots=True)
class RefuseImage:
    """Put the image aside that the model's engine was restored from: it is good for nothing."""

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class JobDone:
    """What the operator asked for has happened."""

    job: int
    message: str


@dataclass(frozen=True, slots=True)
class JobFailed:
    job: int
    reason: str
    allowed: bool = True
    """False: it was refused because of the mode or the pin, nothing was tried."""


@dataclass(frozen=True, slots=True)
class EngineChanged:
    """For logs, metrics and watchers: a model's engine is in a new state."""

    model: str
    old: EngineState
    new: EngineState
    seconds: float
    """How long it was in the old one."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SwitchBegan:
    switch: int
    target: str | None
    """None when models are only put to sleep."""
    victims: tuple[str, ...]
    asked: bool = False
    """An operator asked for it."""


@dataclass(frozen=True, slots=True)
class SwitchPhaseEnded:
    switch: int
    target: str | None
    phase: Phase
    seconds: float


@dataclass(frozen=True, slots=True)
class SwitchEnded:
    """`error` is empty if it came to its goal; a switch that nobody needed any more ends as cancelled."""

    switch: int
    target: str | None
    victims: tuple[str, ...]
    seconds: float
    error: str = ""
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class PolicyFailed:
    """The policy raised, or chose what is no candidate; fifo decided instead."""

    policy: str
    problem: str


@dataclass(frozen=True, slots=True)
class Stall:
    """A queue that does not move although it should, and why."""

    model: str
    waiting: float
    """Seconds that its oldest request has waited."""
    reason: str


@dataclass(frozen=True, slots=True)
class Probed:
    """The answer to a probe; without `stalls` all is well."""

    probe: int
    stalls: tuple[Stall, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelGone:
    """A model that was taken out of the config has served what it accepted, and its engine is gone."""

    model: str


@dataclass(frozen=True, slots=True)
class AllStopped:
    """The shutdown is complete: no request and no engine is left."""


@dataclass(frozen=True, slots=True)
class HandedOver:
    """No request is left, and no engine is about to be something else than it is, but for those that start."""


RequestCommand = Forward | Refuse | Abort
EngineCommand = StartEngine | SleepEngine | WakeEngine | StopEngine
Notice = EngineChanged | SwitchBegan | SwitchPhaseEnded | SwitchEnded | PolicyFailed | ModelGone
Command = RequestCommand | EngineCommand | RefuseImage | JobDone | JobFailed | Notice | Probed | AllStopped | HandedOver
