"""One request that goes to an engine, from its ticket to the last byte of its answer.

The ticket ends exactly once: `finish` when the engine's answer is complete or broke off, `left` in every other case
in which the core has not ended it already. Both causes that end a request from outside, the client that goes away
and the core that breaks it off, arrive as a cancellation; `_refused` tells which of them it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientResponse, web

from llmuxd.core.commands import Refusal
from llmuxd.gate import STATUS_OF, Gate, Grant, Refused, Ticket
from llmuxd.proxy.connection import ClientConnection
from llmuxd.proxy.errors import error_body, internal_error
from llmuxd.proxy.headers import SERVER_TIMING, server_timing, to_client, to_engine
from llmuxd.proxy.upstream import ENGINE_FAILED, SAYS_DEAD, Engines, is_event_stream

log = logging.getLogger("llmuxd.proxy")

_ERROR_EVENT_SECS = 1.0
_BODILESS = (204, 304)
ENGINE_DIED_STATUS = STATUS_OF[Refusal.ENGINE_DIED][0]
_ADDED_BY_SERVER = ("Content-Type", "Date", "Server")


@dataclass(frozen=True)
class Forwarded:
    """A client's request, read whole."""

    request: web.Request
    id: str
    model: str
    body: bytes


class RelayedResponse(web.StreamResponse):
    """An engine's head, which goes out with what the engine put into it and nothing that a server adds."""

    unframed = False
    """It ends where the connection ends."""

    def __init__(self, answer: ClientResponse, request: web.Request, request_id: str) -> None:
        super().__init__(status=answer.status, reason=answer.reason, headers=to_client(answer.raw_headers, request_id))
        self._not_given = [name for name in _ADDED_BY_SERVER if name not in self.headers]
        if "Content-Length" in self.headers:
            return
        if request.method == "HEAD" or answer.status in _BODILESS:
            # Said to aiohttp alone, lest it begins a chunked body: `strip` takes it off before it goes out.
            self.headers["Content-Length"] = "0"
            self._not_given.append("Content-Length")
        elif request.version >= (1, 1):
            self.enable_chunked_encoding()
        else:
            self.unframed = True
            self.force_close()

    async def strip(self) -> None:
        """Take off what aiohttp has added. To be called when the head is about to be written."""
        for name in self._not_given:
            self.headers.popall(name, None)


async def strip_added(_request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare` of the application that relays."""
    if isinstance(response, RelayedResponse):
        await response.strip()


class Relay:
    """Takes one request through the gate to its engine, and the answer back."""

    def __init__(self, gate: Gate, engines: Engines, forwarded: Forwarded) -> None:
        self._engines = engines
        self._forwarded = forwarded
        self._request = forwarded.request
        self._ticket: Ticket = gate.submit(forwarded.model)
        self._response: RelayedResponse | None = None
        self._refused: Refused | None = None
        self._tail = b""
        self.status = 0
        """How it ended, for the count; 0 as long as it has not."""

    async def run(self) -> web.StreamResponse:
        """The answer, prepared and written. Raises Refused if there is none, CancelledError if the client left."""
        task = asyncio.current_task()
        assert task is not None

        def abort(refused: Refused) -> None:
            self._refused = refused
            task.cancel()

        self._ticket.on_abort = abort
        try:
            return await self._serve()
        except asyncio.CancelledError:
            if self._refused is None or self._request.transport is None:
                raise
            _uncancel(task)
            if self._response is None or not self._response.prepared:
                raise self._refused from None
            return await self._break_off(self._response, self._refused)
        except Exception as error:
            if self._response is None or not self._response.prepared or isinstance(error, Refused):
                raise
            log.exception("%s: the relay broke", self._forwarded.id)
            return await self._break_off(self._response, internal_error())
        finally:
            self._ticket.left()

    async def _serve(self) -> web.StreamResponse:
        grant, answer, chunk = await self._ask()
        try:
            response = RelayedResponse(answer, self._request, self._forwarded.id)
            response.headers.add(SERVER_TIMING, server_timing(grant.queue_secs, grant.switch_secs))
            self._response = response
            await _to_client(response.prepare(self._request))
            events, died = is_event_stream(response.headers.get("Content-Type", "")), False
            while chunk:
                await _to_client(response.write(chunk))
                if events:
                    self._tail = (self._tail + chunk[-4:])[-4:]
                    died = died or SAYS_DEAD in chunk
                try:
                    chunk = await answer.content.readany()
                except ENGINE_FAILED as error:
                    return await self._break_off(response, _broken(grant.model, error))
            self._ticket.finish(not died)
            self.status = ENGINE_DIED_STATUS if died else response.status
            await _to_client(response.write_eof())
            return response
        finally:
            answer.close()

    async def _ask(self) -> tuple[Grant, ClientResponse, bytes]:
        """Wait for admission and for the answer to begin, twice if the engine goes away in between."""
        request, forwarded = self._request, self._forwarded
        headers = to_engine(request.raw_headers, forwarded.id)
        while True:
            grant = await self._ticket.admitted()
            try:
                answer, first = await self._engines.ask(
                    grant.endpoint, request.method, request.raw_path, headers, forwarded.body
                )
            except ENGINE_FAILED as error:
                log.warning("%s: no answer of %s: %s", forwarded.id, grant.model, error or type(error).__name__)
                self._ticket.retry()
            else:
                return grant, answer, first

    async def _break_off(self, response: RelayedResponse, refused: Refused) -> web.StreamResponse:
        """End an answer that has begun, in a way that cannot be taken for its end."""
        self._ticket.finish(False)
        self.status = refused.status
        log.warning("%s: broken off: %s", self._forwarded.id, refused)
        if self._takes_events(response):
            separator = b"" if self._tail in (b"", b"\r\n\r\n") or self._tail.endswith(b"\n\n") else b"\n\n"
            event = separator + b"data: " + error_body(refused) + b"\n\n"
            try:
                await asyncio.wait_for(response.write(event), _ERROR_EVENT_SECS)
            except (OSError, asyncio.TimeoutError):
                pass
        connection = self._request.protocol
        if isinstance(connection, ClientConnection):
            connection.break_off(framed=not response.unframed)
        else:
            connection.force_close()
        return response

    def _takes_events(self, response: RelayedResponse) -> bool:
        headers = response.headers
        return (
            is_event_stream(headers.get("Content-Type", ""))
            and "Content-Length" not in headers
            and "Content-Encoding" not in headers
        )


async def _to_client(sending: Awaitable[object]) -> None:
    """Send; a client that is not there any more is one that has left."""
    try:
        await sending
    except OSError as error:
        raise asyncio.CancelledError from error


def _broken(model: str, error: Exception) -> Refused:
    message = f"the engine of {model} broke its answer off: {error or type(error).__name__}"
    return Refused.by(Refusal.ENGINE_DIED, message)


def _uncancel(task: asyncio.Task[Any]) -> None:
    """Take back a cancellation that was not meant to end the task (Python 3.11 counts them)."""
    uncancel = getattr(task, "uncancel", None)
    if uncancel is not None:
        uncancel()
