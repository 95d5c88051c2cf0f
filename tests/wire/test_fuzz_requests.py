"""Requests at random, right and wrong ones in a row, on the wire.

Whatever comes: nothing breaks, every answer is HTTP, nothing is forwarded twice, to a development endpoint, or where
h11 reads another request than the proxy, and nothing is left.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import h11
from hypothesis import given
from hypothesis import strategies as st

from llmuxd.config import KeyConfig
from tests.vllm_paths import DEVELOPMENT
from tests.wire.client import answers_in
from tests.wire.engine import Asked, plain
from tests.wire.fuzz import Draw, bounded, in_segments, made_wrong
from tests.wire.stack import Wire, play, turns

ANSWERED = {200, 204, 400, 401, 403, 404, 405, 408, 413, 417, 429, 431, 501, 503}
"""What may be answered where every engine is well. A 500 is never right."""

TARGETS = [
    "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/x?y=z", "/tokenize", "/v2/rerank",
    "/upstream/a/v1/completions", "/upstream/b/tokenize?q=r", "/inference/v1/generate", "/v1/responses/resp_1/cancel",
]  # fmt: skip
TRICKS = [
    "{}",
    "/v1/..{}",
    "//h{}",
    "/v1/%2e%2e{}",
    "{}?model=a",
    "http://h{}",
    "/upstream/a{}",
    "/v1/..;{}",
    "{}/",
    "/upstream/a/v1/..{}",
]
FIELDS = [
    "X: y", "Connection: keep-alive", "Connection: close", "Expect: 100-continue", "model-override: a", "Accept: */*", "TE: trailers",
    "x-request-id: mine", "x-llmux-wait: 5", "x-llmux-priority: -1", "Upgrade: h2c", "Content-Encoding: identity", "Cookie: a=b",
    "Authorization: Bearer sk", "x-api-key: sk", "Origin: https://app.test", "X-Original-URL: /sleep",
]  # fmt: skip
MARK = re.compile(rb"mark-[0-9]+-")


class Play(NamedTuple):
    """What one client does."""

    segments: list[bytes]
    leaves: str


def a_body(draw: Draw, number: int) -> tuple[bytes, str]:
    """A body with a mark of its own, and its type."""
    mark = f"mark-{number}-"
    kind = draw(st.sampled_from(["json", "json", "json", "form", "text", "none"]))
    if kind == "form":
        parts = [("x", mark), ("model", draw(st.sampled_from(["a", "b", "z"])))]
        text = "".join(
            f'--xyz\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in parts
        )
        return made_wrong(draw, f"{text}--xyz--\r\n".encode(), 2), "multipart/form-data; boundary=xyz"
    if kind == "text":
        return mark.encode() + draw(st.binary(max_size=30)), "text/plain"
    if kind == "none":
        return b"", "application/json"
    value = {"model": draw(st.sampled_from(["a", "b", "org/alias", "z"])), "mark": mark, "stream": draw(st.booleans())}
    return made_wrong(draw, json.dumps(value).encode(), draw(st.sampled_from([0, 0, 0, 2]))), "application/json"


def a_request(draw: Draw, number: int) -> bytes:
    """A request that is right, or was until something of it was changed."""
    method = draw(st.sampled_from(["POST", "POST", "POST", "GET", "HEAD", "DELETE", "OPTIONS"]))
    target = draw(st.sampled_from([*TARGETS, "/v1/models", "/health", "/v1/models/a"]))
    if draw(st.integers(0, 7)) == 7:
        target = draw(st.sampled_from(TRICKS)).format(draw(st.sampled_from(DEVELOPMENT)))
    if draw(st.integers(0, 9)) == 9:
        target += ("&" if "?" in target else "?") + "model=a"
    body, kind = a_body(draw, number)
    lines = [f"{method} {target} HTTP/1.{draw(st.sampled_from('1110'))}", "Host: h", f"Content-Type: {kind}"]
    lines += draw(st.lists(st.sampled_from(FIELDS), max_size=3))
    if draw(st.booleans()):
        lines.append(f"Content-Length: {len(body)}")
    else:
        lines.append("Transfer-Encoding: chunked")
        cut = draw(st.integers(0, len(body)))
        pieces = [piece for piece in (body[:cut], body[cut:]) if piece]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    whole = "\r\n".join([*lines, "", ""]).encode() + body
    return made_wrong(draw, whole) if draw(st.integers(0, 2)) == 2 else whole


@st.composite
def plays(draw: Draw) -> Play:
    sent = b"".join(a_request(draw, number) for number in range(draw(st.integers(1, 4))))
    if draw(st.integers(0, 4)) == 4:
        sent = made_wrong(draw, sent, 2)
    leaves = draw(st.sampled_from(["stays", "stays", "stays", "closes", "half-closes", "resets"]))
    return Play(in_segments(draw, sent), leaves)


class Read(NamedTuple):
    """A request as h11 reads it."""

    method: str
    target: str
    body: bytes


def as_h11_reads(sent: bytes) -> tuple[list[Read], list[str]]:
    """The whole requests in these bytes, up to where h11 finds none; and all methods, also of one that is not whole."""
    found: list[Read] = []
    methods: list[str] = []
    while True:
        sent = sent.lstrip(b"\r\n")
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 17)
        parser.receive_data(sent)
        head, body = None, b""
        try:
            while not isinstance(event := parser.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Request):
                    head = event
                    methods.append(head.method.decode())
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    return found, methods
        except h11.RemoteProtocolError:
            return found, methods
        assert head is not None
        found.append(Read(methods[-1], head.target.decode("latin-1"), body))
        sent = parser.trailing_data[0]


def assert_read_alike(asked: list[Asked], read: list[Read]) -> None:
    """Each request that an engine got is one that h11 reads, too, in this order."""
    left = iter(read)
    for one in asked:
        for other in left:
            alike = other.target == one.target or re.fullmatch(
                f"/upstream/(a|b|org/alias){re.escape(one.target)}", other.target
            )
            if other.method == one.method and alike and other.body == one.body:
                break
        else:
            raise AssertionError(f"h11 does not read {one.method} {one.target} {one.body!r}: {read!r}")


async def echo(asked: Asked) -> None:
    """In one of the framings that there are, so that the next answer has to be found behind it."""
    body, how = asked.body, len(asked.body) % 4
    if how == 0 or not body:
        await asked.answer(plain(body))
    elif how == 1:
        await asked.answer(plain(body, "Connection: close"), keep=False)
    elif how == 2:
        await asked.answer(b"HTTP/1.1 200 OK\r\n\r\n" + body, keep=False)
    else:
        await asked.answer(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        )


async def played(wire: Wire, one: Play) -> bytes:
    """Do as it says; all that the client got."""
    client = await wire.connect()

    async def received() -> bytes:
        got = b""
        try:
            while data := await client.reader.read(1 << 16):
                got += data
        except ConnectionError:
            pass
        return got

    receiving = asyncio.ensure_future(received())
    for segment in one.segments:
        await client.send(segment)
        await turns(3)
    if one.leaves != "stays":
        {"closes": client.close, "half-closes": client.half_close, "resets": client.reset}[one.leaves]()
    await turns(30)
    # What is not complete by now never will be: the proxy's time for it is over.
    for _ in range(50):
        if receiving.done():
            return await receiving
        await wire.after(100.0)
    receiving.cancel()
    raise AssertionError(f"the connection never ends, and holds {wire.tickets()} requests")


def assert_answered(got: bytes, methods: list[str], leaves: str) -> None:
    # Of what a client did not stay for, anything may be missing.
    if leaves in ("closes", "resets"):
        return
    if leaves == "half-closes":
        got = b"" if b"\r\n\r\n" not in got else got
    for answer in answers_in(got, methods):
        assert answer.status in ANSWERED, answer
        assert answer.complete or leaves == "half-closes", answer


KEYS = (KeyConfig("one", "7a5f5b5cb6ff4b1d5a8f4b6cf5b3b8e8b7a8a4f1f9b36c1a1d1c1b1a19181716"),)


@bounded(150)
@given(st.lists(plays(), min_size=1, max_size=3), st.booleans())
def test_requests_at_random(several: list[Play], together: bool) -> None:
    async def scenario(wire: Wire) -> None:
        if together:
            results = await asyncio.gather(*(played(wire, one) for one in several))
        else:
            results = [await played(wire, one) for one in several]
        asked = [one for engine in wire.engines.values() for one in engine.asked]
        sent = [b"".join(one.segments) for one in several]
        read = []
        for one, got, data in zip(several, results, sent, strict=True):
            its, methods = as_h11_reads(data)
            assert_answered(got, methods, one.leaves)
            read.append(its)
        if len(several) == 1:
            in_order = sorted(asked, key=lambda one: one.number)
            assert_read_alike(in_order, read[0])
        seen = list(itertools.chain.from_iterable(MARK.findall(one.body) for one in asked))
        for mark in set(seen):
            # A chunk may end in the middle of one.
            given_in = [b"".join(sent), b"".join(one.body for its in read for one in its)]
            assert seen.count(mark) <= max(one.count(mark) for one in given_in), "it was forwarded twice"
        assert wire.bounced() == 0

    with tempfile.TemporaryDirectory() as folder:
        play(Path(folder), scenario, echo, models=("a", "b"), limits={"cors_origins": ("https://app.test",)})


@bounded(50)
@given(st.lists(plays(), min_size=1, max_size=2))
def test_without_a_key_nothing_comes_through(several: list[Play]) -> None:
    async def scenario(wire: Wire) -> None:
        for one in several:
            await played(wire, one)
        assert [engine.received for engine in wire.engines.values()] == [0, 0]

    with tempfile.TemporaryDirectory() as folder:
        play(Path(folder), scenario, echo, models=("a", "b"), keys=KEYS)


@bounded(100)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_at_all(sent: bytes, behind: bool) -> None:
    """Alone, or where a body was expected."""
    opening = b"POST /v1/x?model=a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" if behind else b""

    async def scenario(wire: Wire) -> None:
        got = await played(wire, Play([opening + sent], "stays"))
        read, methods = as_h11_reads(opening + sent)
        assert_answered(got, methods, "stays")
        assert_read_alike(wire.engine.asked, read)

    with tempfile.TemporaryDirectory() as folder:
        play(Path(folder), scenario, echo)
