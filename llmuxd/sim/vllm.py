"""A simulated `vllm serve`: `python -m llmuxd.sim.vllm serve MODEL ...`.

A real process with a real child, speaking vLLM's HTTP on a Unix socket or a port; it computes nothing. It takes the
arguments of `vllm serve`, and more from its environment:

    LLMUX_SIM_SCALE         real seconds per simulated second: 1; 0 makes everything instant
    LLMUX_SIM_WEIGHTS_GIB   size of the weights: 4
    LLMUX_SIM_KV_GIB        size of the KV cache: what --gpu-memory-utilization leaves of the device
    LLMUX_SIM_RESIDUAL_GIB  what stays on the device while it sleeps: 0.5
    LLMUX_SIM_START_SECS    a start takes this long, 20, and
    LLMUX_SIM_LOAD_GIB_S    the weights at this speed: 1 (a level-2 wake, too)
    LLMUX_SIM_OFFLOAD_GIB_S speed of a level-1 sleep: 10
    LLMUX_SIM_WAKE_GIB_S    speed of a level-1 wake: 20
    LLMUX_SIM_TOKENS_PER_S  of each request: 50
    LLMUX_SIM_VERSION       the version that it says it is, which decides what /collective_rpc knows: 0.32.0
    LLMUX_SIM_LEVEL         it comes up at once, asleep at this level (0, 1, 2): so a restored process is simulated
    LLMUX_SIM_LEDGER        the device, a file that `Ledger.create` made; without it memory is unlimited
    LLMUX_SIM_FAULTS        faults, as `llmuxd.sim.faults` reads them
    LLMUX_SIM_FAULT_FILE    a file of faults that may change while it runs
    LLMUX_SIM_ORPHAN_SECS   how long EngineCore outlives an API server that was killed, in real seconds: 60
    LLMUX_SIM_LINGER_SECS   how long the API server outlives an EngineCore that was killed, in real seconds: 5
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys

from aiohttp import web

from llmuxd.sim.engine import Engine
from llmuxd.sim.faults import Faults
from llmuxd.sim.http import build
from llmuxd.sim.ledger import GIB, Ledger, OutOfMemory
from llmuxd.sim.options import Options, parse
from llmuxd.tasks import poll

POLL_SECS = 0.02

log = logging.getLogger("vllm")


def main() -> None:
    """Serve until SIGTERM, or until EngineCore dies: exit code 0 both times, as vLLM's. 1 if it cannot start."""
    options = parse(sys.argv[1:], os.environ)
    logging.basicConfig(level=logging.INFO, format="(APIServer pid=%(process)d) %(levelname)s %(asctime)s %(message)s")
    logging.getLogger("aiohttp.access").setLevel(logging.INFO)
    log.info("vLLM API server version %s (simulated)", ".".join(map(str, options.version)))
    listener = _listen(options)
    faults = Faults(options.faults, options.fault_file)
    engine = Engine(options, faults, None if options.ledger is None else Ledger(options.ledger))
    sys.exit(asyncio.run(_serve(engine, listener)))


def _listen(options: Options) -> socket.socket:
    """The listening socket; a Unix socket's file is left behind at the end, as vLLM leaves it."""
    if options.uds is None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(options.uds))
    return listener


async def _serve(engine: Engine, listener: socket.socket) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    asked = asyncio.create_task(stop.wait())
    loading = asyncio.create_task(_load(engine))
    await asyncio.wait([asked, loading], return_when=asyncio.FIRST_COMPLETED)
    try:
        if not loading.done():
            loading.cancel()
            return 0
        if not loading.result():
            return 1
        runner = web.ServerRunner(build(engine), handle_signals=False)
        await runner.setup()
        await web.SockSite(runner, listener, backlog=1024).start()
        log.info("Application startup complete.")
        crashed = await _until_over(engine, stop)
        if crashed:
            log.error("EngineCore died; shutting down")
            await asyncio.wait([asked], timeout=engine.options.linger_secs)
        # Requests in flight are not waited for: the end of the loop cancels them, as vLLM's default does.
        return 0
    finally:
        asked.cancel()
        if hasattr(engine, "core"):
            engine.core.terminate()


async def _load(engine: Engine) -> bool:
    """Load the engine; False, with vLLM's words on standard error, if that fails."""
    if engine.faults.happens("hang_start"):

        async def taken_away() -> bool:
            return not engine.faults.stands("hang_start")

        await poll(taken_away, POLL_SECS)
    try:
        if engine.faults.happens("die_at_start"):
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        await engine.start()
        for name in engine.options.loras:
            if name in engine.options.names:
                raise RuntimeError(f"The lora adapter '{name}' conflicts with a served base model.")
    except OutOfMemory as error:
        assert engine.ledger is not None
        total, utilization = engine.ledger.total / GIB, engine.options.utilization
        log.error(
            "ValueError: Free memory on device (%.2f/%.2f GiB) on startup is less than desired GPU memory "
            "utilization (%s, %.2f GiB): %s",
            engine.ledger.free() / GIB,
            total,
            utilization,
            utilization * total,
            error,
        )
        return False
    except RuntimeError:
        log.exception("EngineCore failed to start.")
        return False
    return True


async def _until_over(engine: Engine, stop: asyncio.Event) -> bool:
    """Wait for a signal, or for the death of EngineCore: then True."""
    while not stop.is_set():
        if engine.dead:
            return True
        await asyncio.sleep(POLL_SECS)
    return False


if __name__ == "__main__":
    main()
