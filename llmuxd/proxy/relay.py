"""One request that goes to an engine, from its ticket to the last byte of its answer.

The ticket ends exactly once: `finish` when the engine's answer is complete or broke off, `left` in every other case
in which the core has not ended it already. Both causes that end a request from outside, the client that goes away
and the core that breaks it off, arrive as a cancellation; `_refused` tells which of them it was.

A stream that waits for long is sent comments, under a head of our own. A refusal that comes after them is an event,
and so is an answer of the engine that is no stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientResponse, web

from llmuxd.core.commands import Refusal
from llmuxd.gate import STATUS_OF, Gate, Grant, Refused, Ticket
from llmuxd.proxy.connection import ClientConnection
from llmuxd.proxy.errors import internal_error
from llmuxd.proxy.events import comment, error_event, is_event_stream, retold
from llmuxd.proxy.headers import SERVER_TIMING, server_timing, to_client, to_engine
from llmuxd.proxy.heartbeat import Heartbeat, waiting_response
from llmuxd.proxy.upstream import ENGINE_FAILED, SAYS_DEAD, Engines, whole_error

log = logging.getLogger("llmuxd.proxy")

_LAST_WORDS_SECS = 1.0
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
    stream: bool
    """It asks for server-sent events, so comments may come before them."""
    most_wait: float | None = None
    """The longest that the client will wait for the model, in seconds, if it says so."""


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


async def before_head(request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare` of the application that relays."""
    if isinstance(response, RelayedResponse):
        await response.strip()
    connection = request.protocol
    if isinstance(connection, ClientConnection) and connection.ending:
        response.headers["Connection"] = "close"
        response.force_close()


class Relay:
    """Takes one request through the gate to its engine, and the answer back."""

    def __init__(self, gate: Gate, engines: Engines, forwarded: Forwarded, heartbeat_secs: float) -> None:
        self._engines = engines
        self._forwarded = forwarded
        self._request = forwarded.request
        # A client of HTTP/1.0 could not tell a stream of comments that broke off from its end.
        self._heartbeat_secs = heartbeat_secs if forwarded.request.version >= (1, 1) else 0.0
        self._since = time.monotonic()
        self._ticket: Ticket = gate.submit(forwarded.model, most_wait=forwarded.most_wait)
        self._grant: Grant | None = None
        """While it waits for the first bytes of an answer, and later."""
        self._answer: ClientResponse | None = None
        self._response: web.StreamResponse | None = None
        """The engine's head, or one of our own if the client was sent a comment before the engine answered."""
        self._begun = False
        """What follows the head is the engine's."""
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
            return await self._fail(self._refused)
        except Refused as refused:
            return await self._fail(refused)
        except Exception:
            if self._response is None or not self._response.prepared:
                raise
            log.exception("%s: the relay broke", self._forwarded.id)
            return await self._fail(internal_error())
        finally:
            self._ticket.left()

    async def _serve(self) -> web.StreamResponse:
        try:
            async with Heartbeat(self._heartbeat_secs if self._forwarded.stream else 0.0, self._say_waiting):
                grant, answer, first = await self._ask()
            if self._response is not None and not _continues(answer):
                return await self._retell(self._response, grant, answer, first)
            self._begun = True
            if self._response is None:
                self._response = RelayedResponse(answer, self._request, self._forwarded.id)
                self._response.headers.add(SERVER_TIMING, server_timing(grant.queue_secs, grant.switch_secs))
                await _to_client(self._response.prepare(self._request))
            died = await self._pass_on(self._response, grant, answer, first)
            self._ticket.finish(not died)
            self.status = ENGINE_DIED_STATUS if died else answer.status
            await _to_client(self._response.write_eof())
            return self._response
        finally:
            if self._answer is not None:
                self._answer.close()

    async def _ask(self) -> tuple[Grant, ClientResponse, bytes]:
        """Wait for admission and for the answer to begin, twice if the engine goes away in between."""
        request, forwarded = self._request, self._forwarded
        headers = to_engine(request.raw_headers, forwarded.id)
        while True:
            grant = self._grant = await self._ticket.admitted()
            try:
                self._answer, first = await self._engines.ask(
                    grant.endpoint, request.method, request.raw_path, headers, forwarded.body
                )
            except ENGINE_FAILED as error:
                log.warning("%s: no answer of %s: %s", forwarded.id, grant.model, error or type(error).__name__)
                self._grant = None
                self._ticket.retry()
            else:
                return grant, self._answer, first

    async def _pass_on(self, response: web.StreamResponse, grant: Grant, answer: ClientResponse, chunk: bytes) -> bool:
        """Relay the body, chunk by chunk. True if it says that the engine is dead."""
        events, died = is_event_stream(response.headers.get("Content-Type", "")), False
        async with Heartbeat(self._heartbeat_secs if _takes_events(response) else 0.0, self._say_silent) as heartbeat:
            while chunk:
                heartbeat.heard()
                if events:
                    self._tail = (self._tail + chunk[-4:])[-4:]
                    died = died or SAYS_DEAD in chunk
                await _to_client(response.write(chunk))
                try:
                    chunk = await answer.content.readany()
                except ENGINE_FAILED as error:
                    raise _broken(grant.model, error) from error
        return died

    async def _say_waiting(self) -> None:
        """There is no answer yet: a comment, in a stream that begins with the first of them."""
        if self._response is None and not _unread(self._request):
            grant = self._grant
            queue_secs = time.monotonic() - self._since if grant is None else grant.queue_secs
            timing = server_timing(queue_secs, 0.0 if grant is None else grant.switch_secs)
            response = waiting_response(self._forwarded.id, timing)
            await response.prepare(self._request)
            self._response = response
        await self._say_silent()

    async def _say_silent(self) -> None:
        """A comment, where one may stand. Never on top of what the client has not taken yet, so they cannot pile up."""
        if self._response is not None and self._between_events() and not _unread(self._request):
            await self._response.write(comment(self._forwarded.model, self._ticket.outlook()))

    def _between_events(self) -> bool:
        return self._tail in (b"", b"\r\n\r\n") or self._tail.endswith(b"\n\n")

    async def _fail(self, refused: Refused) -> web.StreamResponse:
        """The core, the engine or we ourselves ended the request. Raises `refused` if nothing was sent yet."""
        response = self._response
        if response is None or not response.prepared:
            raise refused from None
        if self._begun:
            return await self._break_off(response, refused)
        return await self._tell(response, refused.status, error_event(self._request.path, refused))

    async def _retell(
        self, response: web.StreamResponse, grant: Grant, answer: ClientResponse, first: bytes
    ) -> web.StreamResponse:
        """The engine's answer is no stream, but the client has been told that there is one."""
        try:
            body = await whole_error(answer, first)
        except ENGINE_FAILED as error:
            self._ticket.finish(False)
            raise _broken(grant.model, error) from error
        self._ticket.finish(True)
        # A success without events cannot be handed over any more: a gateway's failure.
        status = answer.status if answer.status >= 400 else 502
        return await self._tell(response, status, retold(self._request.path, answer.status, body))

    async def _tell(self, response: web.StreamResponse, status: int, event: bytes) -> web.StreamResponse:
        """Say in an event what the status and the body of an answer would have said.

        The stream then ends as it should. Nothing of an answer was cut: this event is all of it, and clients raise
        it. Of a connection that breaks they would report only that, or try again.
        """
        self.status = status
        log.info("%s: an error event instead of an answer with status %d", self._forwarded.id, status)
        if not (await _sent_soon(response.write(event)) and await _sent_soon(response.write_eof())):
            self._hang_up(response)
        return response

    async def _break_off(self, response: web.StreamResponse, refused: Refused) -> web.StreamResponse:
        """End an answer that has begun, in a way that cannot be taken for its end."""
        self._ticket.finish(False)
        self.status = refused.status
        log.warning("%s: broken off: %s", self._forwarded.id, refused)
        if _takes_events(response):
            separator = b"" if self._between_events() else b"\n\n"
            await _sent_soon(response.write(separator + error_event(self._request.path, refused)))
        self._hang_up(response)
        return response

    def _hang_up(self, response: web.StreamResponse) -> None:
        connection = self._request.protocol
        if isinstance(connection, ClientConnection):
            connection.break_off(framed=not (isinstance(response, RelayedResponse) and response.unframed))
        else:
            connection.force_close()


def _takes_events(response: web.StreamResponse) -> bool:
    """Whether an event of our own can be put into it."""
    headers = response.headers
    return (
        is_event_stream(headers.get("Content-Type", ""))
        and "Content-Length" not in headers
        and "Content-Encoding" not in headers
    )


def _continues(answer: ClientResponse) -> bool:
    """Whether an engine's answer is a stream that can follow a head of our own."""
    headers = answer.headers
    return (
        answer.status == 200 and is_event_stream(headers.get("Content-Type", "")) and "Content-Encoding" not in headers
    )


def _unread(request: web.Request) -> bool:
    """Whether a client has not taken yet what was sent, or is not there any more."""
    transport = request.transport
    return transport is None or transport.get_write_buffer_size() > 0


async def _sent_soon(sending: Awaitable[object]) -> bool:
    """Send some last words; False if the client does not take them."""
    try:
        await asyncio.wait_for(sending, _LAST_WORDS_SECS)
    except (OSError, asyncio.TimeoutError):
        return False
    return True


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
