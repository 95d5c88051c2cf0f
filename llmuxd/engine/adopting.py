"""What an engine that an earlier daemon started is now: awake, asleep, or starting. Its own word counts.

The record says what it was, or was about to be, when the earlier daemon last wrote. A daemon that was killed may have
sent the call or not, and vLLM carries out what it was sent, so that an engine that was in between is waited for. One
that does not fall asleep is told to, perhaps for a second time: vLLM does the one after the other, and nothing if it
sleeps already.
"""

from __future__ import annotations

import asyncio

from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.events import FailureKind
from llmuxd.core.eviction import EvictionPolicy, ProcessStrategy, WeightStrategy
from llmuxd.engine.api import Health, VllmApi
from llmuxd.engine.errors import EngineError
from llmuxd.engine.run import EngineInfo
from llmuxd.engine.sleeping import sleep_weights

HEALTH_SECS = 5.0
BEGIN_SECS = 1.0
"""One that was told to sleep, and is not too busy to say so, says by then that it does."""
SETTLE_SECS = 30.0
"""How long an engine that was waking may take to come to it."""
BUSY_SECS = 90.0
"""How long it may be silent meanwhile: a first sleep copies for longer than any question is waited for."""
_POLL_SECS = 0.1


async def state_of(api: VllmApi, info: EngineInfo, was: S, asleep_by: EvictionPolicy | None) -> S:
    """AWAKE, ASLEEP (by `asleep_by`), or STARTING.

    Raises EngineError if it does not answer, or cannot be trusted in what it is: it is to be stopped then.
    """
    health = await api.health(HEALTH_SECS)
    if was is S.STARTING:
        return S.AWAKE if health is Health.OK else S.STARTING
    if health is not Health.OK:
        raise EngineError(FailureKind.DIED, f"/health: {health.value}")
    if was is S.STOPPING:
        raise EngineError(FailureKind.DIED, "it was being stopped")
    if not info.can_sleep:
        return S.AWAKE
    if asleep_by is not None and asleep_by.process is ProcessStrategy.CHECKPOINT:
        raise EngineError(FailureKind.DIED, "it was being saved to an image, or restored")
    if asleep_by is not None and asleep_by.weights is WeightStrategy.RETAIN and not info.can_park:
        # An old vLLM has no level 0: it sleeps by our word alone.
        return S.ASLEEP if was in (S.ASLEEP, S.FALLING_ASLEEP) else S.AWAKE
    wanted = was in (S.ASLEEP, S.FALLING_ASLEEP)
    sleeping = await _settled(api, wanted, {S.FALLING_ASLEEP: BEGIN_SECS, S.WAKING: SETTLE_SECS}.get(was, 0.0))
    if not sleeping and was is S.FALLING_ASLEEP and asleep_by is not None:
        # Nobody is left who waits for what it may have in flight, and which a sleep that it was told of may wait for.
        await sleep_weights(api, info, asleep_by.weights, "abort")
        return S.ASLEEP
    if not sleeping:
        return S.AWAKE
    if asleep_by is None:
        raise EngineError(FailureKind.LIED, "it sleeps, and nobody knows by which level")
    if was is S.WAKING and asleep_by.weights is WeightStrategy.DISCARD:
        raise EngineError(FailureKind.LIED, "it was left in the middle of getting its weights back")
    return S.ASLEEP


async def _settled(api: VllmApi, wanted: bool, seconds: float) -> bool:
    """Whether it sleeps; if it is not yet as `wanted`, it is given that many seconds to be."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    deadline = began + seconds
    while True:
        try:
            sleeping = await api.is_sleeping()
        except EngineError as error:
            if error.kind is not FailureKind.TIMEOUT or not seconds or loop.time() >= began + BUSY_SECS:
                raise
            continue
        if sleeping is wanted or loop.time() >= deadline:
            return sleeping
        await asyncio.sleep(_POLL_SECS)
