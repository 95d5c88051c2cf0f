"""What the core is configured with: models, devices and bounds, already validated and in plain units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from llmuxd.core.eviction import Auto, EvictionPolicy


class InFlight(str, Enum):
    """What a switch does with the requests in flight of a model that has to go."""

    DRAIN = "drain"
    """Wait until they are answered."""
    PARK = "park"
    """Pause them in the engine; they go on after its next wake. Where that is impossible, drain."""
    CUT = "cut"
    """Do not wait: park where it is possible, break off where it is not."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model runs and what it takes there, as device name -> units of that device's capacity."""

    awake: Mapping[str, int]
    asleep: Mapping[str, int] = field(default_factory=dict)
    """What stays with a sleeping process."""
    retained: Mapping[str, int] = field(default_factory=dict)
    """What stays with one that sleeps with its weights retained."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model. Durations are in seconds, None means without bound."""

    name: str
    eviction: EvictionPolicy | Auto
    placement: Placement
    start_timeout: float = 1800.0
    max_in_flight: int | None = None
    max_queue: int | None = None
    ttl: float | None = None
    """Put to sleep after this long without a request."""
    priority: float = 1.0
    """How many times the waiting of its requests counts, against that of others."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Bounds that hold for all models, in seconds."""

    request_timeout: float = 300.0
    in_flight: InFlight = InFlight.DRAIN
    min_active: float = 5.0
    """Cooldown: an awake model is not evicted for another one before this much time as awake."""
    sleep_timeout: float = 120.0
    wake_timeout: float = 300.0
    stop_grace: float = 30.0
    max_queue: int = 1024
    """Requests waiting, over all models."""
    backoff_base: float = 1.0
    backoff_cap: float = 300.0
    deadline_margin: float = 10.0
    """How much longer than the engine layer, which reports its own timeouts, the core waits for its word."""
