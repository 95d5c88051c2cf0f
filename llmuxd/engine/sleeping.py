"""How vLLM is told to sleep and to wake, by what becomes of the weights; and the processes that a device knows.

What becomes of the process when it is saved and gone is in `images`; when to do which is the core's to decide.
"""

from __future__ import annotations

import asyncio

from llmuxd.config.ranks import parallel_size
from llmuxd.core.events import FailureKind
from llmuxd.core.eviction import WeightStrategy
from llmuxd.engine.api import VllmApi
from llmuxd.engine.communicators import rebuild, tear_down
from llmuxd.engine.cuda import CudaCheckpoint
from llmuxd.engine.errors import EngineError
from llmuxd.engine.process import EngineProcess
from llmuxd.engine.run import EngineInfo
from llmuxd.engine.spec import EngineSpec

_LEVELS = {WeightStrategy.RETAIN: 0, WeightStrategy.OFFLOAD: 1, WeightStrategy.DISCARD: 2}


async def sleep_weights(api: VllmApi, info: EngineInfo, weights: WeightStrategy, mode: str) -> None:
    """Put vLLM to sleep and see that it sleeps. Raises EngineError.

    `mode` says what becomes of requests in flight; a vLLM that cannot park knows none and aborts them.
    """
    if not info.can_sleep:
        raise EngineError(FailureKind.REFUSED, "it has no /sleep (VLLM_SERVER_DEV_MODE does not work)")
    if not info.can_park and weights is WeightStrategy.RETAIN:
        # Before 0.17 there is no level 0: as a level that is neither 1 nor 2 it would drop the weights.
        return
    await api.sleep(_LEVELS[weights], mode if info.can_park else None)
    await api.verify_sleeping(True)


async def wake_weights(api: VllmApi, info: EngineInfo, weights: WeightStrategy) -> None:
    """Undo `sleep_weights` and see that vLLM is awake. Raises EngineError."""
    if not info.can_park and weights is WeightStrategy.RETAIN:
        return
    if weights is WeightStrategy.DISCARD:
        # Scheduling resumes when the last part is back, and must not before the weights are read again.
        await api.wake("weights")
        await api.reload_weights()
        await api.wake("kv_cache")
    else:
        await api.wake()
    await api.verify_sleeping(False)


async def cut_ties(api: VllmApi, info: EngineInfo, spec: EngineSpec) -> None:
    """Before the process leaves its devices: what holds its ranks together is taken down. Raises EngineError."""
    if parallel_size(spec.extra_args) > 1:
        await tear_down(api, info.version)


async def tie_again(api: VllmApi, info: EngineInfo, spec: EngineSpec) -> None:
    """Undo `cut_ties`. Raises EngineError."""
    if parallel_size(spec.extra_args) > 1:
        await rebuild(api, info.version)


async def suspend(process: EngineProcess, cuda: CudaCheckpoint, timeout: float) -> None:
    """Move what the engine has on its devices to host memory. Raises EngineError."""
    await cuda.suspend(await pids_of(process), timeout)


async def resume(process: EngineProcess, cuda: CudaCheckpoint, timeout: float) -> None:
    """Undo `suspend`. Raises EngineError."""
    await cuda.resume(await pids_of(process), timeout)


async def pids_of(process: EngineProcess) -> list[int]:
    """Of all processes of the engine."""
    return [proc.pid for proc in await asyncio.to_thread(process.refresh)]
