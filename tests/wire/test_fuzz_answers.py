"""Engines' answers at random, right and wrong ones, cut anywhere, in whatever segments, to clients of all kinds.

Whatever comes: nothing breaks, every client gets HTTP, an answer that is complete for it is complete for h11, too, and
has the same body, and nothing of an answer reaches another request.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import h11
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.client import DEADLINE_SECS, Answer, answers_in, post, request
from tests.wire.engine import Asked, chunked, plain
from tests.wire.fuzz import Draw, bounded, in_segments, made_wrong
from tests.wire.stack import Wire, play, turns

COMMENT = re.compile(rb": llmux [^\n]*\n\n")
MARK = re.compile(rb"from-[0-9]+-")


class Answering(NamedTuple):
    """What an engine does with one request."""

    segments: list[bytes]
    end: str
    pause: float
    """Seconds between the segments."""


class Asking(NamedTuple):
    """What a client asks."""

    method: str
    stream: bool
    minor: int
    path: str


def an_answer(draw: Draw, number: int) -> bytes:
    mark = b"from-%d-" % number
    status = draw(
        st.sampled_from(
            ["200 OK", "200 OK", "200 OK", "400 Bad Request", "404 Not Found", "204 No Content", "304 x", "503 x"]
        )
    )
    events = [b"data: %b\n\n" % mark, b"data: 2\n\ndata: 3", b"\n\n", b"data: [DONE]\n\n"]
    kind = draw(st.sampled_from(["length", "length", "chunks", "events", "events", "until close", "HTTP/1.0", "dead"]))
    if kind == "length":
        raw = plain(mark + bytes(draw(st.integers(0, 50))), "Content-Type: text/plain", "X: y", status=status)
    elif kind == "chunks":
        raw = chunked(mark, b"x", b"\x00" * 20, content_type="application/json")
    elif kind == "events":
        raw = chunked(*events[: draw(st.integers(1, 4))])
    elif kind == "until close":
        raw = b"HTTP/1.1 %b\r\nContent-Type: text/event-stream\r\n\r\n" % status.encode() + b"".join(events)
    elif kind == "HTTP/1.0":
        raw = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + mark
    else:
        raw = chunked(
            events[0], b'data: {"error": {"message": "EngineCore encountered an issue."}}\n\n', b"data: [DONE]\n\n"
        )
    if draw(st.integers(0, 5)) == 5:
        raw = (
            draw(st.sampled_from([b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"]))
            + raw
        )
    raw = made_wrong(draw, raw) if draw(st.booleans()) else raw
    return raw[: draw(st.integers(0, len(raw)))] if draw(st.integers(0, 3)) == 3 else raw


@st.composite
def answerings(draw: Draw, number: int) -> Answering:
    end = draw(st.sampled_from(["keep", "close", "close", "kill"]))
    segments = in_segments(draw, an_answer(draw, number))
    if draw(st.integers(0, 5)) == 5:
        # Not later: of what comes when the next request is under way nobody can tell what it belongs to.
        segments[-1] += draw(st.sampled_from([b"garbage", plain(b"poison"), b"\r\n", b"0\r\n\r\n"]))
    return Answering(segments, end, draw(st.sampled_from([0.0, 0.0, 0.0, 6.0])))


ASKINGS = st.builds(
    Asking,
    st.sampled_from(["POST", "POST", "POST", "GET", "HEAD"]),
    st.booleans(),
    st.sampled_from([1, 1, 1, 0]),
    st.sampled_from(["/v1/completions", "/v1/messages", "/v1/responses", "/v1/embeddings"]),
)


def asked_by(asking: Asking) -> bytes:
    body = json.dumps({"model": "a", "stream": asking.stream}).encode()
    if asking.minor:
        return post(body, target=asking.path).replace(b"POST", asking.method.encode(), 1)
    return request(
        f"{asking.method} {asking.path} HTTP/1.0", "Connection: keep-alive", f"Content-Length: {len(body)}", body=body
    )


class Whole(NamedTuple):
    """An answer as h11 reads it."""

    status: int
    body: bytes


def as_h11_reads(raw: bytes, method: str, closed: bool) -> Whole | None:
    """None if it is none, or not complete."""
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    parser.send(h11.Request(method=method, target="/", headers=[("Host", "h")]))
    parser.send(h11.EndOfMessage())
    if raw:
        parser.receive_data(raw)
    if closed:
        parser.receive_data(b"")
    status, body = 0, b""
    try:
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif not isinstance(event, h11.InformationalResponse):
                return None
    except h11.RemoteProtocolError:
        return None
    return Whole(status, body)


class Engine:
    """Answers each request once as it was told to, and properly when it is asked again."""

    def __init__(self, wire: Wire, answerings: list[Answering]) -> None:
        self.wire = wire
        self.left = list(answerings)
        self.given: dict[str, Answering] = {}
        """By the request's id."""

    async def answer(self, asked: Asked) -> None:
        (id_,) = asked.all("x-request-id")
        if id_ in self.given:
            await asked.answer(plain(b"again"))
            return
        self.given[id_] = one = self.left.pop(0)
        try:
            for segment in one.segments:
                await asked.send(segment)
                await turns(3)
                if one.pause:
                    await self.wire.after(one.pause)
            await asked.answer(b"", keep=one.end == "keep")
        except ConnectionError:
            asked.answered.set()
        if one.end == "kill":
            asked.die()


def assert_of(answer: Answer, number: int, asking: Asking, one: Answering) -> None:
    """Of the engine's answer, of its second one, or a word of the proxy's that there is none."""
    for mark in MARK.findall(answer.body):
        assert mark == b"from-%d-" % number
    assert b"poison" not in answer.body or b"poison" in b"".join(one.segments)
    if not answer.complete or answer.status == 502 or answer.get("retry-after"):
        return
    if answer.body == b"again" or (asking.method == "HEAD" and answer.get("content-length") == "5"):
        return
    own, raw = answer.body, b"".join(one.segments)
    if (answer.get("content-type") or "").lower().startswith("text/event-stream"):
        if any(code in own for code in (b'"engine_error"', b'"engine_died"', b'"model_unavailable"')):
            return  # There was no stream to go on with behind the comments.
        own = COMMENT.sub(b"", own)
    whole = as_h11_reads(raw, asking.method, one.end != "keep")
    assert whole is not None, f"complete for the client, and not for h11: {answer}"
    assert answer.status == whole.status
    assert own == whole.body


@bounded(150)
@given(st.data(), st.lists(ASKINGS, min_size=1, max_size=3))
def test_answers_at_random(data: st.DataObject, askings: list[Asking]) -> None:
    answers = [data.draw(answerings(number)) for number in range(len(askings))]

    async def scenario(wire: Wire) -> None:
        wire.engine.script = Engine(wire, answers).answer
        client = await wire.connect()
        received = b""

        async def receive() -> None:
            nonlocal received
            try:
                while piece := await client.reader.read(1 << 16):
                    received += piece
            except ConnectionError:
                client.was_reset = True

        receiving = asyncio.ensure_future(receive())
        await client.send(b"".join(asked_by(asking) for asking in askings))
        bounced = idle = 0
        for _ in range(500):
            if receiving.done():
                break
            seen = len(received)
            await turns(60)
            if wire.bounced() > bounced:
                bounced += 1
                wire.revive()
            elif not wire.tickets():
                await wire.after(100.0)  # Nothing more is to come: an idle connection is closed some time.
            idle = idle + 1 if len(received) == seen else 0
            if idle > 10 and wire.tickets():
                client.close()  # An answer that never ends.
                client.was_reset = True
                break
        await asyncio.wait_for(receiving, DEADLINE_SECS)
        got = answers_in(received, [asking.method for asking in askings])
        for number, (answer, asking, one) in enumerate(zip(got, askings, answers, strict=False)):
            if client.was_reset and answer is got[-1]:
                answer.complete = False
            assert_of(answer, number, asking, one)

    with tempfile.TemporaryDirectory() as folder:
        play(Path(folder), scenario, limits={"heartbeat_secs": 5.0})
