"""One request that goes to an engine, from its ticket to the last byte of its answer.

The ticket ends exactly once: `finish` when the engine's answer is complete or broke off, `left` in every other case
in which the core has not ended it already. Everything here is a reaction to something that has happened, on the
client's side, the engine's or the core's; `_over` says that nothing more may.

The bytes of an answer go to the client as they came, chunks and all. A stream that waits for long is sent comments,
under a head of our own. A refusal that comes after them is an event, and so is an answer of the engine that is no
stream.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from llmuxd.core.commands import Refusal
from llmuxd.gate import Grant, Refused
from llmuxd.proxy.access import CLIENT_LEFT, Call
from llmuxd.proxy.events import comment, error_event, is_event_stream, retold
from llmuxd.proxy.framing import LAST_CHUNK, Chunked, Framing, UntilClose, chunk
from llmuxd.proxy.headers import relayed_head, stream_head
from llmuxd.proxy.heartbeat import Heartbeat
from llmuxd.proxy.http1 import RequestHead, ResponseHead
from llmuxd.proxy.routes import RESPONSES
from llmuxd.proxy.upstream import SAYS_DEAD, SWITCHING, EngineConnection, EngineFailed

if TYPE_CHECKING:
    from llmuxd.proxy.connection import ClientConnection
    from llmuxd.proxy.handler import Proxy

log = logging.getLogger("llmuxd.proxy")

_ERROR_BYTES = 64 * 1024
"""No error that an engine means for a human is longer."""

_HELD_BYTES = 64 * 1024
"""A chunk of a stream that is larger is passed on in parts."""
_LAST_EVENT = b"data: [DONE]"
_TAIL_BYTES = len(_LAST_EVENT) + len(b"\r\n\r\n" + b"\r\n")
"""Enough of what was sent last to see whether it ends with an event, in a chunk, and with the last one."""


@dataclass(slots=True)
class Forwarded:
    """A client's request, read whole, as its engine gets it."""

    head: RequestHead
    path: str
    """As the engine knows it."""
    sent_head: bytes
    body: bytearray
    stream: bool
    """It asks for server-sent events, so comments may come before them."""
    upgrade: bool = False
    """It asks for a WebSocket."""
    most_wait: float | None = None
    """The longest that the client will wait for the model, in seconds, if it says so."""
    priority: int = 0


class Owner(Protocol):
    """Whose request it is."""

    def refuse(self, refused: Refused) -> None:
        """There is no answer of an engine, and nothing was sent."""

    def answered(self, status: int, keep: bool) -> None:
        """The answer is complete; `keep` if another one can follow it."""

    def broke_off(self, status: int) -> None:
        """The answer ended in its middle, and the connection with it."""


class Relay:
    """Takes one request through the gate to its engine, and the answer back."""

    __slots__ = (
        "_begun",
        "_call",
        "_client",
        "_connecting",
        "_engine",
        "_events",
        "_forwarded",
        "_framing",
        "_grant",
        "_head",
        "_heartbeat",
        "_heartbeat_secs",
        "_held",
        "_keep",
        "_mid_chunk",
        "_over",
        "_own_head",
        "_owner",
        "_proxy",
        "_tail",
        "_ticket",
        "_unwraps",
        "_wraps",
    )

    def __init__(self, proxy: Proxy, client: ClientConnection, owner: Owner, call: Call, forwarded: Forwarded) -> None:
        self._proxy = proxy
        self._client = client
        self._owner = owner
        self._call = call
        self._forwarded = forwarded
        # A client of HTTP/1.0 could not tell a stream of comments that broke off from its end.
        self._heartbeat_secs = proxy.limits.heartbeat_secs if forwarded.head.minor else 0.0
        self._heartbeat: Heartbeat | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._engine: EngineConnection | None = None
        self._grant: Grant | None = None
        """While it waits for the first bytes of an answer, and later."""
        self._head: ResponseHead | None = None
        self._framing: Framing | None = None
        self._held = b""
        """What has come of the body before it was clear what to do with the answer."""
        self._own_head = False
        """The client was sent a head of our own, and comments, before the engine answered."""
        self._begun = False
        """The client was sent something of the engine's answer."""
        self._wraps = False
        """What the engine sends is put into chunks."""
        self._unwraps: Chunked | None = None
        """What the engine sends is taken out of its chunks."""
        self._events = False
        """Events of our own can be put into the answer."""
        self._tail = b""
        self._mid_chunk = False
        """The client was sent a part of a chunk that is too large to be waited for."""
        self._keep = False
        self._over = False
        self._ticket = proxy.gate.submit(call.model, most_wait=forwarded.most_wait, priority=forwarded.priority)

    def start(self) -> None:
        """Begin."""
        self._ticket.on_abort = self._fail
        if self._forwarded.stream and self._heartbeat_secs:
            self._heartbeat = Heartbeat(self._proxy.loop, self._heartbeat_secs, self._beat)
        self._ticket.when_decided(self._decided)

    # What the core says

    def _decided(self, decision: Grant | Refused) -> None:
        if self._over:
            return
        if isinstance(decision, Refused):
            self._fail(decision)
            return
        self._grant = decision
        self._call.queue_secs, self._call.switch_secs = decision.queue_secs, decision.switch_secs
        forwarded = self._forwarded
        engine = self._proxy.engines.take(decision.endpoint, forwarded.head.method, self)
        if engine is None:
            self._connecting = self._proxy.loop.create_task(self._connect(decision))
        else:
            self._engine = engine
            engine.send(forwarded.sent_head, forwarded.body)

    async def _connect(self, grant: Grant) -> None:
        forwarded = self._forwarded
        try:
            engine = await self._proxy.engines.open(grant.endpoint, forwarded.head.method, self)
        except EngineFailed as error:
            self._connecting = None
            self.engine_failed(error)
            return
        self._connecting = None
        self._engine = engine
        engine.send(forwarded.sent_head, forwarded.body)

    # What the engine does

    def engine_answers(self, head: ResponseHead, framing: Framing) -> None:
        if head.status == SWITCHING and not self._forwarded.upgrade:
            self._close_engine()
            self.engine_failed(EngineFailed("it changes the protocol, unasked"))
            return
        self._head, self._framing = head, framing
        if head.status == SWITCHING:
            self._begin(head, framing, b"", 0)
            self.client_sent(self._client.take_received())

    def engine_sent(self, data: bytes) -> None:
        head, framing = self._head, self._framing
        if self._over or head is None or framing is None:
            return
        came = len(data)
        if self._held:
            data, self._held = self._held + data, b""
        if not self._begun:
            if self._knows_enough(head, framing, data):
                self._take_answer(head, framing, data, came)
            else:
                self._held = data
            return
        if self._events and isinstance(framing, Chunked):
            data = self._whole_chunks(framing, data, came)
        if self._says_dead(data):
            self._break_off(_died(self._call.model, "it says that its EngineCore is dead"))
            return
        if data:
            self._pass_on(data)
        if framing.ended:
            self._complete()

    def engine_failed(self, error: EngineFailed) -> None:
        if self._over:
            return
        self._engine = None
        if self._begun:
            self._break_off(_died(self._call.model, str(error)))
            return
        if self._held:
            # It has begun to answer, and nobody has seen it: that is no reason to ask twice.
            self._ticket.finish(False)
            self._fail(_died(self._call.model, str(error)))
            return
        log.warning("%s: no answer of %s: %s", self._call.id, self._call.model, error)
        self._grant = self._head = self._framing = None
        self._held = b""
        self._ticket.retry(self._decided)

    def engine_takes_more(self) -> None:
        self._client.pause_reading(False)

    # What the client does

    def client_sent(self, data: bytes) -> bool:
        """Bytes on the connection; False unless it is a WebSocket's by now."""
        if not (self._begun and self._head is not None and self._head.status == SWITCHING):
            return False
        if self._engine is not None and data:
            self._engine.write(data)
            if self._engine.full:
                self._client.pause_reading(True)
        return True

    def client_left(self) -> int:
        """The client went away. With what status the request ended by that.

        OpenAI's client goes when it has read the last event, and does not wait for the end of the answer.
        """
        if self._over:
            return CLIENT_LEFT
        complete = self._events and _LAST_EVENT in self._tail and not self._client.unread
        self._end()
        if complete and self._head is not None:
            self._ticket.finish(True)
            return self._head.status
        self._ticket.left()
        return CLIENT_LEFT

    def client_paused(self, paused: bool) -> None:
        """The client does not read, or reads again."""
        if self._engine is not None and self._begun:
            self._engine.pause(paused)

    # The answer

    def _knows_enough(self, head: ResponseHead, framing: Framing, held: bytes) -> bool:
        """Whether what has come tells what to do with the answer.

        The head alone does not: vLLM sends that of a stream before it has looked at the request.
        """
        if framing.ended:
            return True
        if self._own_head and not _continues(head):
            return len(held) >= _ERROR_BYTES
        if head.status == 500 and head.length is not None and head.length <= _ERROR_BYTES:
            return False
        if _is_stream(head) and isinstance(framing, Chunked):
            return framing.between or framing.whole > 0 or len(held) > _HELD_BYTES
        return bool(held)

    def _take_answer(self, head: ResponseHead, framing: Framing, held: bytes, came: int) -> None:
        if (head.status == 500 or _is_stream(head)) and _tells_death(held):
            self._close_engine()
            self.engine_failed(EngineFailed("it answers that its EngineCore is dead"))
        elif self._own_head and not _continues(head):
            self._retell(head, held)
        else:
            self._begin(head, framing, held, came)
            if framing.ended:
                self._complete()

    def _begin(self, head: ResponseHead, framing: Framing, data: bytes, came: int) -> None:
        """The answer is what the client gets."""
        self._begun = True
        # It is not asked again, so that what it was asked need not be kept.
        self._forwarded.body = bytearray()
        call, client = self._call, self._client
        call.begins()
        chunks = isinstance(framing, Chunked)
        self._wraps = self._own_head and not chunks
        if chunks and not self._forwarded.head.minor:
            self._unwraps = Chunked()
        self._keep = self._own_head or (framing.framed and self._unwraps is None)
        self._events = _is_plain_stream(head) and (self._wraps or head.length is None)
        if self._events and self._heartbeat_secs and self._heartbeat is None:
            self._heartbeat = Heartbeat(self._proxy.loop, self._heartbeat_secs, self._beat)
        if self._events and isinstance(framing, Chunked):
            data = self._whole_chunks(framing, data, came)
        if self._forwarded.path == RESPONSES:
            self._proxy.responses.learn(data, call.model, call.key_name)
        if self._own_head:
            self._pass_on(data)
        else:
            keeps = self._keep and self._owner_keeps()
            sent = relayed_head(head, call.fields(), keeps, self._unwraps is not None, self._forwarded.head.minor)
            self._pass_on(data, sent)
        if client.paused and self._engine is not None:
            self._engine.pause(True)

    def _whole_chunks(self, framing: Chunked, data: bytes, came: int) -> bytes:
        """What can be passed on of a stream: chunks that are whole, so that an event of our own can follow.

        Of `data` the last `came` bytes are new. Engines write their chunks whole, and one that is not is an event that
        is of no use yet.
        """
        if framing.between or framing.ended:
            self._mid_chunk = False
            return data
        whole = len(data) - came + framing.whole if framing.whole else 0
        if (self._mid_chunk and not whole) or len(data) - whole > _HELD_BYTES:
            self._mid_chunk = True
            return data
        self._mid_chunk = False
        self._held = data[whole:]
        return data[:whole]

    def _owner_keeps(self) -> bool:
        return self._forwarded.head.keep_alive and not self._client.ending

    def _pass_on(self, data: bytes, head: bytes = b"") -> None:
        """Send bytes of the engine's answer, after the head if it is not sent yet."""
        if self._events:
            self._tail = data[-_TAIL_BYTES:] if len(data) >= _TAIL_BYTES else (self._tail + data)[-_TAIL_BYTES:]
        if self._heartbeat is not None:
            self._heartbeat.heard()
        self._call.sent(data)
        if self._unwraps is not None:
            pieces: list[bytes] = []
            self._unwraps.feed(data, pieces.append)
            data = b"".join(pieces)
        elif self._wraps and data:
            data = chunk(data)
        self._client.write(head + data if head else data)

    def _says_dead(self, data: bytes) -> bool:
        """Whether vLLM says in mid-stream that it is dead: it then ends the stream as if nothing were wrong."""
        return SAYS_DEAD in data and self._events and _tells_death(data)

    def _complete(self) -> None:
        """The engine's answer is there, whole."""
        assert self._head is not None
        if self._wraps:
            self._client.write(LAST_CHUNK)
        self._end()
        self._ticket.finish(True)
        self._owner.answered(self._head.status, self._keep)

    def _retell(self, head: ResponseHead, held: bytes) -> None:
        """The engine's answer is no stream, but the client has been told that there is one."""
        pieces: list[bytes] = []
        if head.chunked:
            Chunked().feed(held, pieces.append)
            held = b"".join(pieces)
        self._end()
        self._ticket.finish(True)
        # A success without events cannot be handed over any more: a gateway's failure.
        status = head.status if head.status >= 400 else 502
        self._tell(status, retold(self._forwarded.path, head.status, held[:_ERROR_BYTES]))

    # Waiting

    def _beat(self) -> None:
        """The client has heard nothing for long: a comment, where one may stand.

        Never on top of what the client has not taken yet, so they cannot pile up.
        """
        if self._client.unread or not self._between_events():
            return
        sent = b""
        if not self._begun and not self._own_head:
            self._own_head = True
            if self._grant is None:
                self._call.waits()
            sent = stream_head(self._call.fields(), self._owner_keeps())
        said = comment(self._call.model, self._ticket.outlook())
        self._client.write(sent + self._own(said))

    def _own(self, event: bytes) -> bytes:
        """An event of our own, as it stands in the answer."""
        plain = self._begun and not self._wraps and isinstance(self._framing, UntilClose)
        return event if plain or self._unwraps is not None else chunk(event)

    def _between_events(self) -> bool:
        if not self._begun:
            return True
        return self._events and not self._mid_chunk and self._ends_event(self._tail)

    def _ends_event(self, tail: bytes) -> bool:
        """Whether what was sent so far, and ends so, ends with an event."""
        if isinstance(self._framing, Chunked):
            tail = tail[:-2]  # The line break that ends a chunk.
        return not tail or tail.endswith((b"\n\n", b"\r\n\r\n"))

    # Failing

    def _fail(self, refused: Refused) -> None:
        """The core ended the request."""
        if self._over:
            return
        if self._begun:
            self._break_off(refused)
            return
        if self._grant is None:
            self._call.waits()
        self._end()
        self._ticket.left()
        if self._own_head:
            self._tell(refused.status, error_event(self._forwarded.path, refused))
        else:
            self._owner.refuse(refused)

    def _tell(self, status: int, event: bytes) -> None:
        """Say in an event what the status and the body of an answer would have said.

        The stream then ends as it should. Nothing of an answer was cut: this event is all of it, and clients raise
        it. Of a connection that breaks they would report only that, or try again.
        """
        log.info("%s: an error event instead of an answer with status %d", self._call.id, status)
        self._client.write(chunk(event) + LAST_CHUNK)
        self._owner.answered(status, True)

    def _break_off(self, refused: Refused) -> None:
        """End an answer that has begun, in a way that cannot be taken for its end."""
        framing = self._framing
        self._end()
        self._ticket.finish(False)
        log.warning("%s: broken off: %s", self._call.id, refused)
        if self._events and not self._mid_chunk:
            separator = b"" if self._ends_event(self._tail) else b"\n\n"
            self._client.write(self._own(separator + error_event(self._forwarded.path, refused)))
        self._client.break_off(framed=self._own_head or (framing is not None and framing.framed and not self._unwraps))
        self._owner.broke_off(refused.status)

    def _end(self) -> None:
        """Nothing more happens."""
        self._over = True
        self._ticket.on_abort = None
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        if self._connecting is not None:
            self._connecting.cancel()
        self._close_engine()

    def _close_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _is_stream(head: ResponseHead) -> bool:
    return is_event_stream(head.values.get(b"content-type", b"").decode("latin-1"))


def _is_plain_stream(head: ResponseHead) -> bool:
    """Whether something can be put between its events."""
    return _is_stream(head) and b"content-encoding" not in head.values


def _continues(head: ResponseHead) -> bool:
    """Whether an engine's answer is a stream that can follow a head of our own."""
    return head.status == 200 and _is_plain_stream(head)


def _tells_death(data: bytes) -> bool:
    """Whether it has vLLM's words for it, in an error and not in a text that quotes them."""
    return SAYS_DEAD in data and b'"error"' in data


def _died(model: str, why: str) -> Refused:
    return Refused.by(Refusal.ENGINE_DIED, f"the engine of {model} broke its answer off: {why}")
