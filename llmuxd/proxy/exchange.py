"""One request from its head on: it is answered here, refused, or handed to a relay. What all requests share is the
proxy's, in `handler`; reading the body is the connection's."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from llmuxd.gate import Refused, ServedModel
from llmuxd.proxy import cors
from llmuxd.proxy.access import CLIENT_LEFT, NONE, Call
from llmuxd.proxy.answers import Answer, error_answer, written
from llmuxd.proxy.connection import ClientConnection, too_large
from llmuxd.proxy.errors import Rejected, internal_error, model_not_found
from llmuxd.proxy.extract import Looking, Wanted, look
from llmuxd.proxy.headers import (
    MODEL_OVERRIDE,
    MOST_WAIT,
    PRIORITY,
    REQUEST_ID,
    request_id,
    seconds_of,
    to_engine,
)
from llmuxd.proxy.http1 import RequestHead
from llmuxd.proxy.keys import Key
from llmuxd.proxy.relay import Forwarded, Relay
from llmuxd.proxy.routes import REALTIME, STREAMED, Action, Route, is_anthropic, route

if TYPE_CHECKING:
    from llmuxd.proxy.handler import Proxy

log = logging.getLogger("llmuxd.proxy")

_SHOWN_CHARS = 200
UPGRADE_REFUSED = "upgrade_refused"


class Exchange:
    """Serves one request of one connection."""

    __slots__ = (
        "_admitted",
        "_body",
        "_call",
        "_client",
        "_head",
        "_key",
        "_most_wait",
        "_over",
        "_priority",
        "_proxy",
        "_relay",
        "_way",
    )

    def __init__(self, proxy: Proxy, client: ClientConnection, head: RequestHead) -> None:
        self._proxy = proxy
        self._client = client
        self._head = head
        self._call = Call(request_id(head.text(REQUEST_ID)), head.method, head.target.partition("?")[0][:_SHOWN_CHARS])
        self._call.added = cors.allowed(head, proxy.limits.cors_origins)
        self._way: Route | None = None
        self._key: Key | None = None
        """Whose request it is, once that is known."""
        self._admitted = False
        """It is counted among the requests of its key."""
        self._priority = 0
        self._most_wait: float | None = None
        self._body = bytearray()
        self._relay: Relay | None = None
        self._over = False

    # What the connection tells

    def begin(self) -> None:
        try:
            self._begin()
        except Refused as refused:
            self.refuse(refused)
        except Exception:
            self._broke()

    def body_read(self, body: bytearray) -> None:
        self._body = body
        self._call.bytes_in = len(body)
        assert self._way is not None
        head, way = self._head, self._way
        encoded = head.values.get(b"content-encoding", b"identity").lower() not in (b"", b"identity")
        named = way.model or head.text(MODEL_OVERRIDE)
        if way.response:
            made, key = self._proxy.responses, self._call.key_name
            named = named or made.made_by(way.response, key)
            if made.is_anothers(way.response, key) or (named is None and "model=" not in way.query):
                self.refuse(_response_not_found(way.response))
                return
        self._look(look(named, way.query, head.text(b"content-type") or "", encoded, body))

    def client_sent(self, data: bytes) -> bool:
        return self._relay is not None and self._relay.client_sent(data)

    def client_left(self) -> None:
        self._finish(CLIENT_LEFT if self._relay is None else self._relay.client_left())

    def client_paused(self, paused: bool) -> None:
        if self._relay is not None:
            self._relay.client_paused(paused)

    # What the relay tells; the connection refuses, too

    def refuse(self, refused: Refused) -> None:
        if not self._over:
            path = "" if self._way is None else self._way.path
            # What follows a refused upgrade may be of the other protocol.
            self._answer(error_answer(refused, is_anthropic(path)), keep=refused.code != UPGRADE_REFUSED)

    def answered(self, status: int, keep: bool) -> None:
        self._finish(status)
        self._client.finish(keep and self._head.keep_alive)

    def broke_off(self, status: int) -> None:
        self._finish(status)

    # The request

    def _begin(self) -> None:
        head, gate = self._head, self._proxy.gate
        if head.method == "CONNECT":
            raise Rejected(400, UPGRADE_REFUSED, "only HTTP is spoken here")
        way = self._way = route(head.method, head.target, gate)
        self._check_upgrade(way)
        if b"expect" in head.values and head.values[b"expect"].lower() != b"100-continue":
            raise Rejected(417, "expectation_failed", "the only expectation that is met here is 100-continue")
        if way.action is Action.OPTIONS:
            self._answer(Answer(204, added=cors.preflight(head, self._proxy.limits.cors_origins)))
            return
        if way.action is Action.HEALTH:
            healthy, reason = gate.healthy()
            self._answer(_json(200 if healthy else 503, {"status": reason}))
            return
        self._find_key()
        if way.action is Action.FORWARD:
            self._read()
        elif way.action is Action.LIST_MODELS:
            self._answer(_json(200, {"object": "list", "data": [self._card(one) for one in self._usable()]}))
        else:
            self._show(way.model)

    def _check_upgrade(self, way: Route) -> None:
        """HTTP goes on where another HTTP is offered; where something else is meant, it cannot."""
        asked = self._head.values.get(b"upgrade", b"").lower()
        if not asked or asked == b"h2c":
            return
        if not self._is_handshake(way):
            raise Rejected(400, UPGRADE_REFUSED, f"the only upgrade here is a WebSocket's, on {REALTIME}")

    def _is_handshake(self, way: Route) -> bool:
        head = self._head
        return (
            way.path == REALTIME
            and way.action is Action.FORWARD
            and head.method == "GET"
            and head.minor == 1
            and not head.chunked
            and not head.length
            and head.values.get(b"upgrade", b"").lower() == b"websocket"
            and b"upgrade" in head.tokens(b"connection")
            and b"sec-websocket-key" in head.values
        )

    def _find_key(self) -> None:
        """Whose request it is. Raises Refused for nobody's, and for one too many."""
        values = self._head.values
        self._key = key = self._proxy.keys.identify(values.get(b"authorization"), values.get(b"x-api-key"))
        self._call.key_name = key.name or NONE
        self._priority = key.priority_of(self._head.text(PRIORITY))

    def _usable(self) -> Iterable[ServedModel]:
        assert self._key is not None
        return [one for one in self._proxy.gate.served if self._key.may_use(one.model)]

    def _show(self, name: str) -> None:
        for one in self._usable():
            if one.id == name:
                self._answer(_json(200, self._card(one)))
                return
        raise model_not_found(name, (one.id for one in self._usable()))

    def _card(self, served: ServedModel) -> dict[str, Any]:
        return {
            "id": served.id,
            "object": "model",
            "created": self._proxy.created,
            "owned_by": "llmux",
            "root": served.root,
            "parent": None,
        }

    def _read(self) -> None:
        head, limit = self._head, self._proxy.limits.max_body_bytes
        try:
            self._most_wait = seconds_of(head.text(MOST_WAIT))
        except ValueError:
            name = MOST_WAIT.decode()
            raise Rejected(400, "invalid_wait", f"{name} has to be seconds, 0 or more", name) from None
        if head.length is not None and head.length > limit:
            raise too_large(limit)
        self._client.read_body(head)

    def _look(self, looking: Looking) -> None:
        """Look for the model a little further."""
        if self._over:
            return
        try:
            try:
                next(looking)
            except StopIteration as found:
                self._forward(found.value)
                return
        except Refused as refused:
            self.refuse(refused)
        except Exception:
            self._broke()
        else:
            self._proxy.look_later(partial(self._look, looking))

    def _forward(self, wanted: Wanted) -> None:
        way, head, key = self._way, self._head, self._key
        assert way is not None
        assert key is not None
        model = self._proxy.gate.resolve(wanted.model)
        if model is None:
            raise model_not_found(wanted.model, (one.id for one in self._usable()))
        if not key.may_use(model):
            raise key.model_not_allowed(wanted.model)
        refused = key.admit(self._proxy.loop.time())
        if refused is not None:
            raise refused
        self._admitted = True
        self._call.model = model
        body, self._body = self._body, bytearray()
        upgrade = self._is_handshake(way)
        forwarded = Forwarded(
            head,
            way.path,
            to_engine(head, way.target, self._call.id, len(body), upgrade=upgrade),
            body,
            self._streams(way, wanted),
            upgrade,
            self._most_wait,
            self._priority,
        )
        self._relay = Relay(self._proxy, self._client, self, self._call, forwarded)
        self._relay.start()

    def _streams(self, way: Route, wanted: Wanted) -> bool:
        """Whether an answer of events is asked for."""
        if self._head.method == "GET":
            return bool(way.response) and "stream=true" in way.query.split("&")
        return wanted.stream and self._head.method == "POST" and way.path in STREAMED

    # Its end

    def _broke(self) -> None:
        log.exception("%s: a request broke", self._call.id)
        self.refuse(internal_error())

    def _answer(self, answer: Answer, keep: bool = True) -> None:
        """Answer it here, and now."""
        head, client = self._head, self._client
        keeps = keep and head.keep_alive and not client.ending and client.can_follow
        client.write(written(answer, self._proxy.date_line() + self._call.fields(), keeps, head))
        self._call.bytes_out = len(answer.body)
        self._finish(answer.status)
        client.finish(keeps)

    def _finish(self, status: int) -> None:
        if self._over:
            return
        self._over = True
        # It refers to this exchange: neither is to wait for the garbage collector.
        self._relay = None
        self._call.status = status
        if self._key is not None and self._admitted:
            self._key.release(self._proxy.loop.time())
        self._proxy.done(self._call)


def _response_not_found(response: str) -> Rejected:
    message = f"no engine has made a response {response}, or has made it for somebody else, or it was forgotten"
    return Rejected(404, "response_not_found", message)


def _json(status: int, value: object) -> Answer:
    return Answer(status, json.dumps(value).encode())
