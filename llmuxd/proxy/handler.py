"""The application of the proxy: every request comes in here, and is answered, refused or relayed."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import HttpVersion10, HttpVersion11, web

from llmuxd.gate import Gate, Refused, ServedModel
from llmuxd.metrics import Metrics
from llmuxd.proxy.connection import ClientConnection
from llmuxd.proxy.errors import Rejected, error_response, internal_error, model_not_found
from llmuxd.proxy.extract import wanted
from llmuxd.proxy.headers import (
    MODEL_OVERRIDE,
    MOST_WAIT,
    REQUEST_ID,
    SERVER_TIMING,
    request_id,
    seconds_of,
    server_timing,
)
from llmuxd.proxy.relay import Forwarded, Relay, before_head
from llmuxd.proxy.routes import STREAMED, Action, Route, route
from llmuxd.proxy.upstream import Engines

log = logging.getLogger("llmuxd.proxy")

CLIENT_LEFT = 499
"""Counted for a client that left before its answer was complete; never sent."""

_NO_MODEL = "-"
_VERSIONS = (HttpVersion10, HttpVersion11)


@dataclass(slots=True)
class Limits:
    """What a request may be and how long its client may hear nothing. They may change at any time."""

    max_body_bytes: int
    """A larger body is a 413."""
    heartbeat_secs: float = 0.0
    """A stream that is silent for so long is sent a comment; 0 for never."""


def build_proxy(gate: Gate, limits: Limits, metrics: Metrics) -> web.Application:
    """The proxy's application; `serve_proxy` serves it."""
    engines = Engines()
    proxy = _Proxy(gate, engines, limits, metrics)

    @web.middleware
    async def unroutable(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        # `*` and what else is no path at all: refused in the same words as the rest.
        if request.match_info.http_exception is not None:
            return await proxy.serve(request)
        return await handler(request)

    async def close_engines(_app: web.Application) -> None:
        await engines.close()

    app = web.Application(middlewares=[unroutable])

    async def expect(_request: web.Request) -> None:
        # The client is told to go on when its body is wanted, not before.
        return None

    app.router.add_route("*", "/{path:.*}", proxy.serve, expect_handler=expect)
    app.on_response_prepare.append(before_head)
    app.on_cleanup.append(close_engines)
    return app


class _Call:
    """One request as it goes through the proxy."""

    def __init__(self, request: web.Request) -> None:
        self.request = request
        self.id = request_id(request.headers.get(REQUEST_ID, ""))
        self.model = _NO_MODEL
        self.status = CLIENT_LEFT
        self.closes = False
        """The connection cannot be used again: what follows on it may not be a request."""
        self._submitted: float | None = None

    def submitted(self, model: str) -> None:
        self.model = model
        self._submitted = time.monotonic()

    def finish(self, response: web.StreamResponse) -> web.StreamResponse:
        """What every answer of the proxy's own has."""
        waited = 0.0 if self._submitted is None else time.monotonic() - self._submitted
        response.headers[REQUEST_ID] = self.id
        response.headers[SERVER_TIMING] = server_timing(waited, 0.0)
        if self.closes:
            response.force_close()
        self.status = response.status
        return response


class _Proxy:
    def __init__(self, gate: Gate, engines: Engines, limits: Limits, metrics: Metrics) -> None:
        self._gate = gate
        self._engines = engines
        self._limits = limits
        self._metrics = metrics
        self._created = int(time.time())

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer one request, whatever it is, and count it."""
        call = _Call(request)
        connection = request.protocol
        if isinstance(connection, ClientConnection):
            connection.serves(asyncio.current_task())
        try:
            return await self._answer(call)
        except Refused as refused:
            return call.finish(error_response(refused))
        except Exception:
            log.exception("%s: a request broke", call.id)
            return call.finish(error_response(internal_error()))
        finally:
            if isinstance(connection, ClientConnection):
                connection.serves(None)
            self._metrics.requests.labels(call.model, str(call.status)).inc()

    async def _answer(self, call: _Call) -> web.StreamResponse:
        request = call.request
        if "Upgrade" in request.headers or request.method == "CONNECT":
            call.closes = True
            raise Rejected(400, "upgrade_refused", "only HTTP is spoken here")
        if request.version not in _VERSIONS:
            call.closes = True
            raise Rejected(400, "unsupported_version", "only HTTP/1.0 and HTTP/1.1 are spoken here")
        way = route(request.method, request.raw_path)
        if way.action is Action.FORWARD:
            return await self._forward(call, way)
        if way.action is Action.HEALTH:
            healthy, reason = self._gate.healthy()
            return call.finish(_json(200 if healthy else 503, {"status": reason}))
        served = self._gate.served
        if way.action is Action.LIST_MODELS:
            return call.finish(_json(200, {"object": "list", "data": [self._card(one) for one in served]}))
        for one in served:
            if one.id == way.model_id:
                return call.finish(_json(200, self._card(one)))
        raise model_not_found(way.model_id, (one.id for one in served))

    async def _forward(self, call: _Call, way: Route) -> web.StreamResponse:
        request = call.request
        body = await self._read(call)
        name, stream = wanted(
            request.headers.get(MODEL_OVERRIDE),
            way.query,
            request.headers.get("Content-Type", ""),
            request.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"),
            body,
        )
        model = self._gate.resolve(name)
        if model is None:
            raise model_not_found(name, (one.id for one in self._gate.served))
        most_wait = _most_wait(request)
        call.submitted(model)
        stream = stream and request.method == "POST" and way.path in STREAMED
        forwarded = Forwarded(request, call.id, model, body, stream, most_wait)
        relay = Relay(self._gate, self._engines, forwarded, self._limits.heartbeat_secs)
        try:
            return await relay.run()
        finally:
            call.status = relay.status or call.status

    async def _read(self, call: _Call) -> bytes:
        """The whole body, as the client sent it. Raises Rejected (413, 400)."""
        request, limit = call.request, self._limits.max_body_bytes
        too_large = Rejected(413, "body_too_large", f"the body is larger than {limit} bytes")
        pieces: list[bytes] = []
        size = request.content_length or 0
        if size <= limit:
            size = 0
            await _ask_for_body(request)
            try:
                while size <= limit and (piece := await request.content.readany()):
                    size += len(piece)
                    pieces.append(piece)
            except web.RequestPayloadError as error:
                call.closes = True
                raise Rejected(400, "invalid_body", f"the body is not complete: {error}") from error
        if size > limit:
            call.closes = True
            raise too_large
        return b"".join(pieces)

    def _card(self, served: ServedModel) -> dict[str, Any]:
        return {
            "id": served.id,
            "object": "model",
            "created": self._created,
            "owned_by": "llmux",
            "root": served.root,
            "parent": None,
        }


def _most_wait(request: web.Request) -> float | None:
    """How long the client will wait for its model. Raises Rejected if it says so in no way that can be read."""
    try:
        return seconds_of(request.headers.get(MOST_WAIT))
    except ValueError:
        raise Rejected(400, "invalid_wait", f"{MOST_WAIT} has to be seconds, 0 or more", MOST_WAIT) from None


async def _ask_for_body(request: web.Request) -> None:
    """Say 100 to a client that waits for it."""
    if request.version >= (1, 1) and request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _json(status: int, value: object) -> web.Response:
    return web.Response(status=status, body=json.dumps(value).encode(), headers={"Content-Type": "application/json"})
