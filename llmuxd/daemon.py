"""The daemon: folders, listeners, signals, the order of starting and stopping. Everything else is the `App`'s."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import sdnotify
from aiohttp import web

from llmuxd.app import App, build_app, run_warmup
from llmuxd.config import Config
from llmuxd.control import serve_control
from llmuxd.control.api import ControlFailed
from llmuxd.policies import PolicyBroken
from llmuxd.proxy import serve_proxy

log = logging.getLogger("llmuxd")

_T = TypeVar("_T")

LOCK_NAME = "llmuxd.lock"


class CannotServe(Exception):
    """The daemon cannot run here; the message says why and what to do."""


async def serve(config: Config, on_ready: Callable[[App, int], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. `on_ready` gets the stack and the port once it listens.

    Raises CannotServe if a folder, socket or port is not to be had, or another daemon runs here.
    """
    loop = asyncio.get_running_loop()
    notifier = sdnotify.SystemdNotifier()
    signals = _Signals()
    async with AsyncExitStack() as stack:
        stack.enter_context(_folders(config))
        stack.enter_context(signals.caught(loop))
        try:
            app = build_app(config)
        except (ValueError, PolicyBroken) as error:
            raise CannotServe(str(error)) from error
        app.runtime.self_check.start()
        watchdog = asyncio.create_task(_ping_watchdog(app, notifier, os.environ))
        stack.callback(watchdog.cancel)
        # Registered first, so that it comes last: the sockets answer until every engine is gone.
        control = await _listen(serve_control(app.control, config.control_socket), str(config.control_socket))
        stack.push_async_callback(control)
        shutdown = asyncio.create_task(_shut_down_when_asked(app, config, signals, notifier))
        stack.push_async_callback(_finish, shutdown, signals)
        with _reserved(config.listen, config.port, config.metrics_port):
            if config.warmup and not await _warm_up(app, signals):
                return
        if app.metrics is not None:
            stack.push_async_callback(await _serve_metrics(app.metrics, config))
        where = f"{config.listen}:{config.port}"
        site = await _listen(serve_proxy(app.proxy, config.listen, config.port), where)
        stack.push_async_callback(site.close)
        log.info("serving %d models on http://%s:%d", len(config.models), config.listen, site.port)
        notifier.notify("READY=1")
        if on_ready is not None:
            on_ready(app, site.port)
        await shutdown
    log.info("stopped")


class _Signals:
    """Counts the requests to stop."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()

    def stop(self) -> None:
        (self.hurried if self.asked.is_set() else self.asked).set()

    def _hang_up(self) -> None:
        # A daemon that was started by hand goes with its terminal; a service is not reloaded by this yet.
        if sys.stderr.isatty():
            self.stop()
        else:
            log.warning("SIGHUP: the config is read at start only; restart to apply a change")

    @contextmanager
    def caught(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        handlers = {signal.SIGTERM: self.stop, signal.SIGINT: self.stop, signal.SIGHUP: self._hang_up}
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)


async def _shut_down_when_asked(
    app: App, config: Config, signals: _Signals, notifier: sdnotify.SystemdNotifier
) -> None:
    await signals.asked.wait()
    notifier.notify("STOPPING=1")
    log.info("stopping: finishing what is in flight for at most %g s", config.shutdown_timeout_secs)
    closing = asyncio.create_task(app.close(config.shutdown_timeout_secs))
    hurry = asyncio.create_task(signals.hurried.wait())
    await asyncio.wait([closing, hurry], return_when=asyncio.FIRST_COMPLETED)
    if not closing.done():
        log.warning("asked again: stopping at once")
        await app.close(0.0)
    hurry.cancel()
    await closing


async def _ping_watchdog(app: App, notifier: sdnotify.SystemdNotifier, environ: Mapping[str, str]) -> None:
    """Tell systemd that all is well, twice in the time that it gives, as long as the scheduler is alive."""
    given = environ.get("WATCHDOG_USEC", "")
    period = int(given) / 1e6 if given.isdecimal() else 0.0
    if not period or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    told = False
    while True:
        # A probe of its own: the loop may have stood still, and the self-check's not have had its turn yet.
        app.runtime.self_check.probe()
        alive, reason = app.runtime.self_check.alive()
        if alive:
            notifier.notify("WATCHDOG=1")
        elif not told:
            log.critical("no more word to systemd's watchdog, which will restart llmuxd: %s", reason)
        told = not alive
        await asyncio.sleep(period / 2)


async def _finish(shutdown: asyncio.Task[None], signals: _Signals) -> None:
    """Whatever ends the serving, the engines are stopped before it is over."""
    signals.asked.set()
    await shutdown


async def _warm_up(app: App, signals: _Signals) -> bool:
    """Warm every model; False if asked to stop meanwhile. One that fails does not keep the others from serving."""
    warming = asyncio.create_task(run_warmup(app))
    asked = asyncio.create_task(signals.asked.wait())
    await asyncio.wait([warming, asked], return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    try:
        await warming
    except ControlFailed as failed:
        log.error("warm-up failed for %s", failed)
    return not signals.asked.is_set()


async def _serve_metrics(app: web.Application, config: Config) -> Callable[[], Awaitable[None]]:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, config.listen, config.metrics_port)
    await _listen(site.start(), f"{config.listen}:{config.metrics_port} (metrics_port)")
    return runner.cleanup


@contextmanager
def _reserved(host: str, *ports: int) -> Iterator[None]:
    """Hold the ports without listening on them yet: a warm-up takes minutes, and must not find them taken then.

    Raises CannotServe if one is taken already.
    """
    with ExitStack() as stack:
        for port in filter(None, ports):
            try:
                for family, kind, number, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                    holder = stack.enter_context(socket.socket(family, kind, number))
                    # Set, as on the listening socket: that is what lets it take over from this one.
                    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    holder.bind(address)
            except OSError as error:
                raise CannotServe(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        yield


async def _listen(listening: Awaitable[_T], where: str) -> _T:
    try:
        return await listening
    except OSError as error:
        raise CannotServe(f"cannot listen on {where}: {error.strerror or error}") from error


@contextmanager
def _folders(config: Config) -> Iterator[None]:
    """Make the runtime and state folders, and hold the lock that keeps a second daemon out of them."""
    for folder in (config.runtime_dir, config.state_dir):
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise CannotServe(
                f"cannot make the folder {folder}: {error.strerror}; run as a user who may, or set "
                "LLMUX_RUNTIME_DIR and LLMUX_STATE_DIR to folders of your own"
            ) from error
    with _lock(config.runtime_dir / LOCK_NAME):
        yield


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotServe(f"cannot write {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotServe(f"another llmuxd runs with {path.parent}") from None
        yield
    finally:
        os.close(descriptor)
