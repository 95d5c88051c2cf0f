"""Nothing is accepted that h11 refuses, and whatever is accepted is read as h11 reads it: head, body and where both end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmuxd.proxy.framing import Chunked, Counted, Framing, UntilClose, framing_of
from llmuxd.proxy.http1 import HEAD_END, BadMessage, Head, parse_request, parse_response

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass
class Message:
    """What a message says, to whoever reads it."""

    first: tuple[object, ...]
    fields: list[tuple[bytes, bytes]]
    payload: bytes
    ended: bool
    rest: bytes
    """What belongs to the next one."""


def fields_of(head: Head) -> list[tuple[bytes, bytes]]:
    return [(name, line.partition(b":")[2].strip(b" \t")) for name, line in head.lines]


def message(first: tuple[object, ...], head: Head, body: Framing, data: bytes) -> Message:
    payload = bytearray()
    rest = data[body.feed(data, payload.extend) :]
    ended = body.ended or isinstance(body, UntilClose)
    return Message(first, fields_of(head), bytes(payload), ended, rest if ended else b"")


def request_of(data: bytes) -> Message | None:
    """As we read it: None if we refuse it, or its head has no end."""
    block, end, rest = data.partition(HEAD_END)
    try:
        head = parse_request(block)
        body = Chunked() if head.chunked else Counted(head.length or 0)
        return message((head.method, head.target, head.minor), head, body, rest) if end else None
    except BadMessage:
        return None


def answer_of(data: bytes, method: str) -> Message | None:
    block, end, rest = data.partition(HEAD_END)
    try:
        head = parse_response(block)
        return message((head.status, head.reason, head.minor), head, framing_of(head, method), rest) if end else None
    except BadMessage:
        return None


def by_h11(connection: h11.Connection) -> Message | None:
    """As h11 reads what its connection has received: None if it refuses it."""
    first, fields, payload, ended = (), [], b"", False
    try:
        while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Request):
                first = event.method.decode(), event.target.decode(), int(event.http_version[2:])
                fields = list(event.headers)
            elif isinstance(event, h11.Response):
                first = event.status_code, event.reason, int(event.http_version[2:])
                fields = list(event.headers)
            elif isinstance(event, h11.Data):
                payload += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                ended = True
                break
    except h11.RemoteProtocolError:
        return None
    # h11 writes what it understood of these, and not what was there.
    return Message(first, fields, payload, ended, connection.trailing_data[0] if ended else b"")


def same(ours: Message, theirs: Message | None) -> bool:
    assert theirs is not None, "h11 refuses it"
    for one in (ours, theirs):
        one.fields = [(name, value.lower() if name == b"transfer-encoding" else value) for name, value in one.fields]
    assert ours == theirs
    return True


def request_by_h11(data: bytes) -> Message | None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data)
    return by_h11(connection)


def answer_by_h11(data: bytes, method: str, closes: bool) -> Message | None:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "h")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    if closes:
        connection.receive_data(b"")
    return by_h11(connection)


FRAMINGS = [
    b"Content-Length: 5", b"content-length:\t05 ", b"Content-Length: 0", b"Transfer-Encoding: chunked", b"transfer-encoding:Chunked",
    b"Transfer-Encoding: chunked", b"X: y",
]  # fmt: skip
DOUBTFUL = [
    b"Host: i", b"Content-Length: 5", b"Content-Length: 5, 5", b"Content-Length: +5", b"Content-Length : 5", b"Content-Length:",
    b"Content-Length: 12345678901234567890", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b" chunked",
    b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding : chunked", b"X", b"X: \x01", b"X: \x0b", b"X\x00: y",
]  # fmt: skip
PLAIN = [
    b"Connection: close", b"Connection: upgrade", b"Upgrade: websocket", b"Expect: 100-continue", b"X: y", b"X: a\xff \t", b"X:",
    b"Content-Type: a/b", b"Accept: */*",
]  # fmt: skip
FIRST = [
    b"POST /v1/x HTTP/1.1", b"GET / HTTP/1.1", b"HEAD / HTTP/1.0", b"POST /v1/x HTTP/1.0", b"OPTIONS * HTTP/1.1", b"post / HTTP/1.1",
    b"CONNECT h:1 HTTP/1.1", b"POST /v1/x  HTTP/1.1", b"POST /v1/x HTTP/2.0", b"POST /v1/x",
]  # fmt: skip
ANSWERED = [
    b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK", b"HTTP/1.1 204 No Content", b"HTTP/1.1 304 x", b"HTTP/1.1 404", b"HTTP/1.1 500 \xe9",
    b"HTTP/1.1 200", b"HTTP/1.1  200 OK", b"HTTP/1.1 2x0 OK", b"HTTP/2.0 200 OK",
]  # fmt: skip
COUNTED = [b"hello", b"hello, world", b"hel", b"", b"helloGET / HTTP/1.1\r\n"]
CHUNKED = [
    b"5\r\nhello\r\n0\r\n\r\n", b"5;x=y\r\nhello\r\n2\r\n\r\n\r\n0\r\nX: y\r\n\r\n", b"3\r\nhello\r\n", b"0\r\n\r\nGET /", b"5\r\nhel",
    b"05 \r\nhello\r\n0\r\nX : y\r\n\r\n",
]  # fmt: skip
SPOILS = [
    b"\n",
    b"\r",
    b"\r\n",
    b" ",
    b"\t",
    b"\x00",
    b":",
    b",",
    b"0",
    b"x",
    b"\xa0",
    b"\r\n ",
    b"\r\n\r\n",
    b";",
    b"\x7f",
]


@st.composite
def messages(draw: Draw, first: list[bytes]) -> bytes:
    """A message that is good, or nearly so."""
    framing = draw(st.sampled_from(FRAMINGS))
    fields = [b"Host: h", framing, *draw(st.lists(st.sampled_from(PLAIN), max_size=2, unique=True))]
    if draw(st.integers(0, 5)) == 0:
        fields.append(draw(st.sampled_from(DOUBTFUL)))
    lines = [draw(st.sampled_from(first)), *draw(st.permutations(fields))]
    data = b"\r\n".join(lines) + HEAD_END + draw(st.sampled_from(CHUNKED if b"hunked" in framing else COUNTED))
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.sampled_from(SPOILS)) + data[at + draw(st.integers(0, 1)) :]
    return data


CHECKED = settings(derandomize=True, database=None, deadline=None, max_examples=800)


@CHECKED
@given(messages(FIRST))
def test_requests(data: bytes) -> None:
    ours = request_of(data)
    assert ours is None or same(ours, request_by_h11(data))


@CHECKED
@given(messages(ANSWERED), st.sampled_from(["GET", "HEAD", "POST"]))
def test_answers(data: bytes, method: str) -> None:
    ours = answer_of(data, method)
    assert ours is None or same(ours, answer_by_h11(data, method, closes=ours.ended))


@pytest.mark.parametrize("body", COUNTED)
def test_good_ones_with_a_length_are_accepted(body: bytes) -> None:
    ours = request_of(b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 5" + HEAD_END + body)
    assert ours is not None
    assert (ours.payload, ours.rest, ours.ended) == (body[:5], body[5:], len(body) >= 5)


SMUGGLED = [
    b"Content-Length: 5\r\nContent-Length: 6", b"Content-Length: 5, 6", b"Content-Length: 5\r\nTransfer-Encoding: gzip",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: xchunked", b"Transfer-Encoding: chunked, x", b"Transfer-Encoding : chunked", b"Transfer-Encoding\t: chunked",
    b"Content-Length: -5", b"Content-Length: 0x5", b"Content-Length: 5 5", b"Content-Length: five", b"Content-Length:", b"Host: i", b"X",
    b"X y: z", b": x", b"X: \x00", b"X\xff: y",
]  # fmt: skip
LAXER = [
    b"Content-Length: 5\r\nContent-Length: 5", b"Content-Length: 5, 5", b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    b"X: y\r\n folded", b"X: y\nContent-Length: 5", b"X: \x01", b"Content-Type: a\r\nContent-Type: b",
]  # fmt: skip
"""What h11 can make something of, and we refuse: another program may make something else of it."""


@pytest.mark.parametrize("lines", [*SMUGGLED, *LAXER])
def test_what_could_hide_a_request_is_refused(lines: bytes) -> None:
    data = b"POST /v1/x HTTP/1.1\r\nHost: h\r\n" + lines + HEAD_END + b"0\r\n\r\nGET /sleep HTTP/1.1\r\nHost: h\r\n\r\n"
    assert request_of(data) is None
    assert (request_by_h11(data) is None) == (lines in SMUGGLED)
