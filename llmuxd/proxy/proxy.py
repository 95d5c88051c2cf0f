"""The proxy's one handler: from a client's request to the end of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from llmuxd.gate import Gate, Refused, Ticket
from llmuxd.metrics import Metrics
from llmuxd.proxy import headers as hdr
from llmuxd.proxy.clients import CLIENTS, Clients
from llmuxd.proxy.errors import error_response, refusal
from llmuxd.proxy.extract import model_of
from llmuxd.proxy.relay import AnswerBroken, EngineGone, Engines, break_off, pass_on
from llmuxd.proxy.routes import Kind, route

log = logging.getLogger("llmuxd.proxy")

NO_MODEL = "-"
"""The metrics' label for requests that name no configured model."""


def build_proxy(gate: Gate, *, max_body_bytes: int, metrics: Metrics) -> web.Application:
    """The application of the API port. Serve it with `serve_proxy`."""
    proxy = _Proxy(gate, max_body_bytes, metrics)
    # aiohttp refuses a body that is as large as its limit.
    app = web.Application(client_max_size=max_body_bytes + 1)
    app[CLIENTS] = proxy.clients
    app.router.add_route("*", "/{path:.*}", proxy.handle)

    async def close_engines(_app: web.Application) -> None:
        await proxy.engines.close()

    app.on_cleanup.append(close_engines)
    return app


@dataclass
class _Exchange:
    """One request on its way."""

    request: web.Request
    id: str
    began: float
    model: str = NO_MODEL
    queue_secs: float | None = None
    switch_secs: float = 0.0
    response: web.StreamResponse | None = None
    refused: Refused | None = None
    """Set if the core ended it while it was in flight."""

    def add_headers(self, response: web.StreamResponse) -> None:
        waited = time.monotonic() - self.began if self.queue_secs is None else self.queue_secs
        response.headers[hdr.REQUEST_ID] = self.id
        response.headers["Server-Timing"] = hdr.server_timing(waited, self.switch_secs)


class _Proxy:
    def __init__(self, gate: Gate, max_body_bytes: int, metrics: Metrics) -> None:
        self._gate = gate
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics
        self._began = int(time.time())
        self.clients = Clients()
        self.engines = Engines()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        exchange = _Exchange(request, hdr.request_id_of(request.headers), time.monotonic())
        try:
            response = await self._answer(exchange)
        except Refused as refused:
            response = error_response(refused)
        except ConnectionError:
            # The client has gone; nobody reads what is returned here.
            self._count(exchange, 499)
            raise
        except asyncio.CancelledError:
            self._count(exchange, 499)
            raise
        if not response.prepared:
            exchange.add_headers(response)
        self._count(exchange, response.status)
        return response

    async def _answer(self, exchange: _Exchange) -> web.StreamResponse:
        request = exchange.request
        found = route(request.method, request.raw_path)
        if found.kind is Kind.HEALTH:
            healthy, reason = self._gate.healthy()
            if healthy:
                return web.json_response({"status": "ok"})
            return web.json_response({"status": "unavailable", "reason": reason}, status=503)
        if found.kind is Kind.MODELS:
            data = [self._model_object(served.id, served.root) for served in self._gate.served_names()]
            return web.json_response({"object": "list", "data": data})
        if found.kind is Kind.MODEL:
            for served in self._gate.served_names():
                if served.id == found.model:
                    return web.json_response(self._model_object(served.id, served.root))
            raise self._not_found(found.model)
        if "Upgrade" in request.headers:
            raise refusal(400, "upgrade_not_supported", "the connection cannot be upgraded")
        body = await self._body(request)
        name = model_of(request.headers, request.query, body)
        model = self._gate.resolve(name)
        if model is None:
            raise self._not_found(name)
        exchange.model = model
        return await self._forward(exchange, body)

    async def _body(self, request: web.Request) -> bytes:
        too_large = refusal(413, "body_too_large", f"the body is larger than {self._max_body_bytes} bytes")
        if (request.content_length or 0) > self._max_body_bytes:
            raise too_large
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise too_large from None

    def _not_found(self, name: str) -> Refused:
        known = ", ".join(served.id for served in self._gate.served_names()) or "none"
        return refusal(404, "model_not_found", f"The model `{name[:200]}` does not exist; there are: {known}")

    def _model_object(self, name: str, root: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._began,
            "owned_by": "llmux",
            "root": root,
            "parent": None,
            "max_model_len": None,
        }

    def _count(self, exchange: _Exchange, status: int) -> None:
        self._metrics.requests.labels(exchange.model, str(status)).inc()

    # Forwarding

    async def _forward(self, exchange: _Exchange, body: bytes) -> web.StreamResponse:
        ticket = self._gate.submit(exchange.model)
        try:
            async with self._interruptible(exchange, ticket):
                return await self._relay(exchange, ticket, body)
        finally:
            # Void if it has ended. If not, something ended the handler: for the core the client has gone.
            ticket.left()

    @contextlib.asynccontextmanager
    async def _interruptible(self, exchange: _Exchange, ticket: Ticket) -> AsyncIterator[None]:
        """Cancel the task if the client goes; end the exchange if the core wants that."""
        task = asyncio.current_task()
        assert task is not None

        def gone() -> None:
            ticket.left()
            task.cancel()

        def abort(refused: Refused) -> None:
            exchange.refused = refused
            task.cancel()

        ticket.on_abort = abort
        unwatch = self.clients.watch(exchange.request, gone)
        try:
            yield
        finally:
            ticket.on_abort = None
            unwatch()

    async def _relay(self, exchange: _Exchange, ticket: Ticket, body: bytes) -> web.StreamResponse:
        try:
            answer = await self._first_answer(exchange, ticket, body)
            try:
                return await self._pass_on(exchange, ticket, answer)
            finally:
                answer.close()
        except asyncio.CancelledError:
            if exchange.refused is None:
                raise
            uncancel = getattr(asyncio.current_task(), "uncancel", None)
            if uncancel is not None:
                uncancel()
            if exchange.response is None:
                raise exchange.refused from None
            await break_off(exchange.request, exchange.response, exchange.refused.message)
            return exchange.response

    async def _first_answer(self, exchange: _Exchange, ticket: Ticket, body: bytes) -> aiohttp.ClientResponse:
        """Wait for the turn, ask the engine; again, if the core allows it, where the engine died on it."""
        request = exchange.request
        headers = hdr.to_engine(request.headers, exchange.id)
        while True:
            grant = await ticket.admitted()
            exchange.queue_secs, exchange.switch_secs = grant.queue_secs, grant.switch_secs
            try:
                return await self.engines.ask(grant.endpoint, request.method, request.raw_path, headers, body)
            except EngineGone as error:
                log.warning("%s: %s died on a request before it answered: %s", exchange.id, exchange.model, error)
                ticket.retry()

    async def _pass_on(self, exchange: _Exchange, ticket: Ticket, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=hdr.to_client(answer.headers))
        exchange.add_headers(response)
        exchange.response = response
        await response.prepare(exchange.request)
        try:
            await pass_on(answer, response)
        except AnswerBroken as error:
            log.warning("%s: %s broke its answer off: %s", exchange.id, exchange.model, error)
            ticket.finish(False)
            await break_off(exchange.request, response, f"the engine of {exchange.model} broke off")
            return response
        # Before the end is written: a client that has read it may count on being out of the engine.
        ticket.finish(answer.status < 500)
        await response.write_eof()
        return response
