"""The daemon: folders, listeners, signals, the order of starting and ending. Everything else is the `App`'s."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from llmuxd.app import App, build_app, run_warmup
from llmuxd.book import Book
from llmuxd.config import DEFAULT_LISTEN, DEFAULT_PORT, Config, is_loopback
from llmuxd.control import serve_control
from llmuxd.control.api import BadConfig, ControlFailed
from llmuxd.core.engine_state import EngineState
from llmuxd.core.events import HandOver
from llmuxd.core.state import WITHOUT_PROCESS
from llmuxd.listening import CannotListen, bind, inherited, is_for
from llmuxd.logs import access_writer
from llmuxd.policies import PolicyBroken
from llmuxd.proxy import Site, serve_proxy
from llmuxd.service import Service, status_line

log = logging.getLogger("llmuxd")

_T = TypeVar("_T")

GC_THRESHOLD = 10_000
"""New objects from one look at the youngest to the next; Python's own 700 are those of 15 requests."""

LOCK_NAME = "llmuxd.lock"


class CannotServe(Exception):
    """The daemon cannot run here; the message says why and what to do."""


class Ending(Enum):
    """How the serving ended."""

    STOPPED = "stopped"
    """Every engine is stopped."""
    HANDED_OVER = "handed over"
    """The engines run on, for the next daemon."""


async def serve(
    config: Config, config_path: Path | None = None, on_ready: Callable[[App, int], None] | None = None
) -> Ending:
    """Serve until SIGTERM or SIGINT, which stop the engines, or SIGUSR2, which leaves them to the next daemon.

    `config_path` is what a reload reads. `on_ready` gets the stack and the port once it listens.
    Raises CannotServe if a folder, socket or port is not to be had, or another daemon runs here.
    """
    loop = asyncio.get_running_loop()
    service = Service()
    signals = _Signals()
    async with AsyncExitStack() as stack:
        stack.enter_context(_folders(config))
        stack.enter_context(signals.caught(loop))
        sockets, metrics_sockets = _sockets_for(config)
        stack.callback(_close_all, [*sockets, *metrics_sockets])
        book = Book(config.state_dir)
        entries = book.load()
        try:
            app = build_app(config, config_path, book, access_writer(os.environ))
        except (ValueError, PolicyBroken) as error:
            raise CannotServe(str(error)) from error
        app.runtime.self_check.start()
        _in_background(stack, service.ping_watchdog(app))
        async with service.patience():
            service.status(f"looking at {len(entries)} engines of an earlier daemon" if entries else "starting")
            await app.adopt(entries)
            # Registered first, so that it comes last: the sockets answer until every engine is gone.
            control = _listen(
                serve_control(app.control, config.control_socket, readers=config.control_read_group != ""),
                str(config.control_socket),
            )
            stack.push_async_callback(await control)
            ending = asyncio.create_task(_end_when_asked(app, signals, service))
            stack.push_async_callback(_finish, ending, signals)
            _in_background(stack, service.tell_status(partial(_status, app)))
            if config.warmup and not await _warm_up(app, signals):
                return await ending
        if app.metrics is not None:
            metrics = _serve_metrics(app.metrics, metrics_sockets)
            stack.push_async_callback(await _listen(metrics, _url_of(metrics_sockets[-1])))
        # Others may have bound it as well, and listen since.
        site = await _listen(serve_proxy(app.proxy, sockets=sockets), _url_of(sockets[-1]))
        stack.push_async_callback(site.close)
        signals.site = site
        log.info("serving %d models on %s", len(config.models), ", ".join(map(_url_of, sockets)))
        _warn_if_open(config, sockets)
        _spare_collections()
        service.ready()
        signals.reload_by(partial(_reload, app, service, sockets))
        if on_ready is not None:
            on_ready(app, site.port)
        how = await ending
    log.info("%s", how.value)
    return how


def _status(app: App) -> str:
    return status_line(app.switcher.state, app.runtime.health())


def _in_background(stack: AsyncExitStack, work: Coroutine[Any, Any, None]) -> None:
    """Until the stack is left."""
    stack.callback(asyncio.create_task(work).cancel)


def _sockets_for(config: Config) -> tuple[list[socket.socket], list[socket.socket]]:
    """For the API and for the metrics. Raises CannotServe."""
    try:
        return _sockets_for_api(config), bind(config.listen, config.metrics_port) if config.metrics_port else []
    except CannotListen as error:
        raise CannotServe(str(error)) from error


def _sockets_for_api(config: Config) -> list[socket.socket]:
    """Those that systemd holds for the daemon, and what the config says if that is not among them."""
    sockets = inherited(os.environ)
    says_nothing = (config.listen, config.port) == (DEFAULT_LISTEN, DEFAULT_PORT)
    if sockets and (says_nothing or any(is_for(one, config.listen, config.port) for one in sockets)):
        return sockets
    if sockets:
        log.warning(
            "llmuxd.socket listens on %s, the config says %s:%d: both are served, but only the former takes "
            "connections while llmuxd restarts; `systemctl edit llmuxd.socket` changes it",
            ", ".join(map(_url_of, sockets)),
            config.listen,
            config.port,
        )
    return [*sockets, *bind(config.listen, config.port)]


def _url_of(one: socket.socket) -> str:
    host, port = one.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _spare_collections() -> None:
    """Look for garbage less often: what is there by now stays, and requests end without leaving any."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)


def _warn_if_open(config: Config, sockets: list[socket.socket]) -> None:
    """The config's own warning does not know the sockets that systemd holds."""
    addresses = [one.getsockname()[0] for one in sockets]
    if not config.keys and is_loopback(config.listen) and not all(map(is_loopback, addresses)):
        log.warning("anyone who reaches %s may use the models; see keys", ", ".join(map(_url_of, sockets)))


def _close_all(sockets: list[socket.socket]) -> None:
    for one in sockets:
        one.close()


class _Signals:
    """What the daemon has been asked by signals, and how often."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self.hands_over = False
        self.site: Site | None = None
        self._reload: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._reload_wanted = False
        self._tasks: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """SIGTERM, SIGINT. After a handover was begun, the engines are stopped after all."""
        again = self.asked.is_set()
        self.hands_over = False
        (self.hurried if again else self.asked).set()

    def hand_over(self) -> None:
        """SIGUSR2. It cannot take back a stop."""
        if not self.asked.is_set():
            self.hands_over = True
            self.asked.set()
        elif self.hands_over:
            self.hurried.set()

    def hang_up(self) -> None:
        """SIGHUP. A daemon that was started by hand goes with its terminal; a service reads its config anew."""
        if sys.stderr.isatty():
            self.stop()
        elif self._reload is None:
            log.info("SIGHUP while starting: the config is read anew as soon as that is over")
            self._reload_wanted = True
        else:
            task = asyncio.get_running_loop().create_task(self._reload(), name="reload")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def reload_by(self, reload: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """From now on SIGHUP does this; one that came before has it done now."""
        self._reload = reload
        if self._reload_wanted:
            self.hang_up()

    @contextmanager
    def caught(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        handlers = {
            signal.SIGTERM: self.stop,
            signal.SIGINT: self.stop,
            signal.SIGHUP: self.hang_up,
            signal.SIGUSR2: self.hand_over,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)


async def _end_when_asked(app: App, signals: _Signals, service: Service) -> Ending:
    await signals.asked.wait()
    how = Ending.HANDED_OVER if signals.hands_over else Ending.STOPPED
    service.stopping()
    config = app.runtime.config
    bound = config.shutdown_timeout_secs
    # With a process that cannot be killed it might take for ever: then systemd's own bound counts.
    async with service.patience(bound + config.wake_timeout_secs + config.stop_timeout_secs):
        if how is Ending.HANDED_OVER:
            log.info("making way for the next daemon: finishing what is in flight for at most %g s", bound)
            if signals.site is not None:
                signals.site.stop_listening()
                await signals.site.settle()
            closing = asyncio.create_task(app.hand_over(bound))
        else:
            log.info("stopping: finishing what is in flight for at most %g s", bound)
            closing = asyncio.create_task(app.close(bound))
        hurry = asyncio.create_task(signals.hurried.wait())
        await asyncio.wait([closing, hurry], return_when=asyncio.FIRST_COMPLETED)
        # Once the engines are left, they are the next daemon's to stop.
        if not closing.done() and not app.runtime.left:
            log.warning("asked again: %s at once", "leaving" if signals.hands_over else "stopping")
            if signals.hands_over:
                app.runtime.post(HandOver(app.runtime.clock()))
            else:
                if how is Ending.HANDED_OVER:
                    closing.cancel()
                closing, how = asyncio.create_task(app.close(0.0)), Ending.STOPPED
        hurry.cancel()
        await closing
    return how


async def _reload(app: App, service: Service, sockets: list[socket.socket]) -> None:
    service.reloading()
    try:
        await app.reloader.reload()
        _warn_if_open(app.runtime.config, sockets)
    except BadConfig as bad:
        service.status(f"the config was not reloaded: {str(bad).splitlines()[0]}")
    finally:
        service.ready()


async def _finish(ending: asyncio.Task[Ending], signals: _Signals) -> None:
    """Whatever ends the serving, the engines are stopped or left before it is over."""
    signals.asked.set()
    await ending


async def _warm_up(app: App, signals: _Signals) -> bool:
    """Warm every model that has no engine yet; False if asked to end meanwhile. One that fails does not keep the others
    from serving."""
    # One that was saved is as warm as it was then.
    cold = [
        model.name
        for model in app.switcher.state.models.values()
        if model.state in WITHOUT_PROCESS and model.state is not EngineState.CHECKPOINTED
    ]
    warming = asyncio.create_task(run_warmup(app, models=cold))
    asked = asyncio.create_task(signals.asked.wait())
    await asyncio.wait([warming, asked], return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    try:
        await warming
    except ControlFailed as failed:
        log.error("warm-up failed for %s", failed)
    return not signals.asked.is_set()


async def _serve_metrics(app: web.Application, sockets: list[socket.socket]) -> Callable[[], Coroutine[Any, Any, None]]:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    for one in sockets:
        # uvloop would log that it cannot, and go on.
        one.listen()
        await web.SockSite(runner, one).start()
    return runner.cleanup


async def _listen(listening: Awaitable[_T], where: str) -> _T:
    try:
        return await listening
    except OSError as error:
        raise CannotServe(f"cannot listen on {where}: {error.strerror or error}") from error


@contextmanager
def _folders(config: Config) -> Iterator[None]:
    """Make the runtime and state folders, and hold the locks that keep a second daemon out of each of them.

    One that shared the state alone would take the engines of the first for what an earlier daemon has left.
    """
    for folder in (config.runtime_dir, config.state_dir):
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise CannotServe(
                f"cannot make the folder {folder}: {error.strerror}; run as a user who may, or set "
                "LLMUX_RUNTIME_DIR and LLMUX_STATE_DIR to folders of your own"
            ) from error
    with ExitStack() as locks:
        locks.enter_context(_lock(config.runtime_dir / LOCK_NAME))
        if not config.state_dir.samefile(config.runtime_dir):
            locks.enter_context(_lock(config.state_dir / LOCK_NAME))
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
