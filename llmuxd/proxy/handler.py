"""What all requests share: the gate, the engines, the limits, the keys, the count and the log of them.

`Proxy` is served as fast as possible by `site`. The aiohttp application around it is what a program can serve by
itself: see `hosted`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from email.utils import formatdate
from typing import Any

from aiohttp import web
from prometheus_client import Counter

from llmuxd.config import Config
from llmuxd.gate import Gate, Refused
from llmuxd.metrics import Metrics
from llmuxd.proxy.access import AccessLog, Call, Writer, log_each
from llmuxd.proxy.answers import error_answer, written
from llmuxd.proxy.connection import ClientConnection
from llmuxd.proxy.exchange import Exchange
from llmuxd.proxy.headers import request_id
from llmuxd.proxy.hosted import take_over
from llmuxd.proxy.http1 import RequestHead
from llmuxd.proxy.keys import KeyRing
from llmuxd.proxy.responses import Responses
from llmuxd.proxy.upstream import Engines

CHECK_SECS = 0.25
"""How often it is looked for connections whose time is over."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may be and how long things may take. Durations in seconds."""

    max_body_bytes: int = 67_108_864
    """A larger body is a 413."""
    heartbeat_secs: float = 0.0
    """A stream that is silent for so long is sent a comment; 0 for never."""
    max_head_bytes: int = 65_536
    """A larger head is a 431."""
    max_connections: int = 4096
    """One more is a 503."""
    head_timeout_secs: float = 30.0
    body_timeout_secs: float = 30.0
    """A head, or body, that takes longer is a 408; one that comes fast enough has more time."""
    send_timeout_secs: float = 120.0
    """A client that takes nothing of what it is sent for so long is cut off."""
    cors_origins: tuple[str, ...] = ()
    """Whose pages may read the answers; `*` for everybody's."""

    @classmethod
    def of(cls, config: Config) -> Limits:
        """As the config has them."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


class Proxy:
    """Serves requests, in the event loop that it is first used in."""

    def __init__(self, gate: Gate, limits: Limits, metrics: Metrics, write_log: Writer) -> None:
        self.gate = gate
        self.limits = limits
        self.keys = KeyRing()
        """Whose requests are served."""
        self.responses = Responses()
        self.created = int(time.time())
        self.connections: set[ClientConnection] = set()
        self.logs = True
        """There is an access log."""
        self._write_log = write_log
        self._metrics = metrics
        self._counters: dict[tuple[str, int], Counter] = {}
        self._looks: deque[Callable[[], None]] = deque()
        self._dated = 0
        self._date_line = b""
        self._ending = False
        self._check: asyncio.TimerHandle | None = None
        self._log: AccessLog | None = None

    def start(self) -> None:
        """To be called in the event loop, before the first connection."""
        self.loop = asyncio.get_running_loop()
        self.engines = Engines(self.loop)
        self._log = AccessLog(self.loop, self._write_log)
        self._check = self.loop.call_later(CHECK_SECS, self._check_all)

    def stop(self) -> None:
        """Write what is to be written."""
        self.close_idle()
        if self._check is not None:
            self._check.cancel()
        if self._log is not None:
            self._log.flush()

    def reload(self, config: Config) -> None:
        """Take over the limits and keys of a config. What was counted of keys that stay goes on."""
        self.limits = Limits.of(config)
        self.keys = self.keys.renewed(config.keys)
        self.logs = config.access_log

    # Connections

    def connect(self) -> ClientConnection:
        """A new one."""
        connection = ClientConnection(self)
        # It may have been accepted just before.
        connection.ending = self._ending
        return connection

    def connected(self, connection: ClientConnection) -> Refused | None:
        """It is there. If it is one too many, the refusal that it is told."""
        self.connections.add(connection)
        most = self.limits.max_connections
        if len(self.connections) <= most:
            return None
        message = f"there are as many connections as there may be: {most}"
        return Refused(503, "too_many_connections", "service_unavailable_error", message, 1.0)

    def disconnected(self, connection: ClientConnection) -> None:
        """It is gone."""
        self.connections.discard(connection)

    def end_connections(self) -> None:
        """Serve no further request on those that there are, and one at most on those that still come."""
        self._ending = True
        for connection in list(self.connections):
            connection.end()

    def close_idle(self) -> None:
        """Close the connections to engines that are kept to be used again."""
        if self._check is not None:
            self.engines.close()

    def _check_all(self) -> None:
        now = self.loop.time()
        for connection in list(self.connections):
            connection.check(now)
        self.engines.close_idle(now)
        self._check = self.loop.call_later(CHECK_SECS, self._check_all)

    # Requests

    def exchange(self, connection: ClientConnection, head: RequestHead) -> Exchange:
        """What serves one request."""
        return Exchange(self, connection, head)

    def look_later(self, look: Callable[[], None]) -> None:
        """Look on into a large body, in a later turn of the loop: one of all that there are in each."""
        self._looks.append(look)
        if len(self._looks) == 1:
            self.loop.call_soon(self._look_on)

    def _look_on(self) -> None:
        self._looks[0]()
        # It stays the first until it is done, so that others do not begin a second round of calls.
        self._looks.popleft()
        if self._looks:
            self.loop.call_soon(self._look_on)

    def turn_away(self, connection: ClientConnection, refused: Refused) -> None:
        """Answer what is no request."""
        call = Call(request_id(None))
        call.status = refused.status
        answer = error_answer(refused)
        call.bytes_out = len(answer.body)
        connection.write(written(answer, self.date_line() + call.fields(), keeps=False))
        self.done(call)

    def date_line(self) -> bytes:
        """The Date of an answer that is given here."""
        now = int(time.time())
        if now != self._dated:
            self._dated, self._date_line = now, f"Date: {formatdate(now, usegmt=True)}\r\n".encode()
        return self._date_line

    def done(self, call: Call) -> None:
        """A request is over: count it and log it."""
        labels = call.model, call.status
        counter = self._counters.get(labels)
        if counter is None:
            counter = self._counters[labels] = self._metrics.requests.labels(call.model, str(call.status))
        counter.inc()
        if self.logs and self._log is not None:
            call.end()
            self._log.add(call)


PROXY: Any = web.AppKey("llmux.proxy", Proxy) if hasattr(web, "AppKey") else "llmux.proxy"
"""Where the application of the proxy has it."""


def build_proxy(gate: Gate, limits: Limits, metrics: Metrics, write_log: Writer = log_each) -> web.Application:
    """The proxy's application; `serve_proxy` serves it. So does aiohttp itself, one request per connection."""
    proxy = Proxy(gate, limits, metrics, write_log)

    async def start(_app: web.Application) -> None:
        proxy.start()

    async def stop(_app: web.Application) -> None:
        proxy.stop()

    async def take(request: web.Request) -> web.StreamResponse:
        return await take_over(proxy, request)

    @web.middleware
    async def unroutable(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        # `*` and what else is no path at all: refused in the same words as the rest.
        return await (take if request.match_info.http_exception is not None else handler)(request)

    async def expect(_request: web.Request) -> None:
        # The client is told to go on when its body is wanted, not before.
        return None

    app = web.Application(middlewares=[unroutable])
    app.router.add_route("*", "/{path:.*}", take, expect_handler=expect)
    app[PROXY] = proxy
    app.on_startup.append(start)
    app.on_cleanup.append(stop)
    return app
