"""Which headers pass the proxy, and the heads that it writes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from llmuxd.proxy.headers import (
    connection_line,
    relayed_head,
    request_id,
    seconds_of,
    server_timing,
    stream_head,
    to_engine,
)
from llmuxd.proxy.http1 import RequestHead, ResponseHead, parse_request, parse_response

HOP_BY_HOP = [
    "Connection",
    "Keep-Alive",
    "Proxy-Authenticate",
    "Proxy-Authorization",
    "Proxy-Connection",
    "TE",
    "Trailer",
    "Upgrade",
]
CLIENTS_OWN = [
    "Authorization",
    "X-Api-Key",
    "Cookie",
    "Model-Override",
    "Expect",
    "X-LLMux-Wait",
    "X-LLMux-Priority",
    "X-HTTP-Method",
    "X-HTTP-Method-Override",
    "X-Method-Override",
    "X-Original-URL",
    "X-Rewrite-URL",
]
CORS = ["Allow-Origin", "Allow-Methods", "Allow-Headers", "Allow-Credentials", "Expose-Headers", "Max-Age"]

ADDED = b"X-Added: 1\r\n"
PLAIN = ("Accept: */*",)


def request(*lines: str, method: str = "POST") -> RequestHead:
    return parse_request("\r\n".join([f"{method} /v1/x HTTP/1.1", "Host: client", *lines]).encode())


def answer(*lines: str, status: str = "200 OK") -> ResponseHead:
    return parse_response("\r\n".join([f"HTTP/1.1 {status}", *lines]).encode())


def lines_of(head: bytes) -> list[str]:
    assert head.endswith(b"\r\n\r\n")
    lines = head.decode().split("\r\n")[:-2]
    assert all(lines)
    return lines


def asked(*lines: str, length: int = 0, method: str = "POST", upgrade: bool = False) -> list[str]:
    """What an engine is sent for a request with those fields, less what it is always sent."""
    sent = lines_of(to_engine(request(*lines, method=method), "/v1/x?y", "id", length, upgrade=upgrade))
    assert sent[:3] == [f"{method} /v1/x?y HTTP/1.1", "Host: localhost", "x-request-id: id"]
    return sent[3:]


def told(*lines: str, status: str = "200 OK", keeps: bool = True, unframed: bool = False, minor: int = 1) -> list[str]:
    """What a client is sent of an answer with those fields, less what it is always sent."""
    sent = lines_of(relayed_head(answer(*lines, status=status), ADDED, keeps, unframed, minor))
    assert sent[0] == f"HTTP/1.1 {status}"
    sent.remove("X-Added: 1")
    return sent[1:]


@pytest.mark.parametrize("name", HOP_BY_HOP)
@pytest.mark.parametrize("spell", [str.lower, str.upper, str])
def test_what_concerns_one_connection_stays_there(name: str, spell: Callable[[str], str]) -> None:
    given = (f"{spell(name)}: x", *PLAIN)
    assert asked(*given) == [*PLAIN]
    assert told(*given) == [*PLAIN]


def test_what_a_connection_header_names_stays_too() -> None:
    given = ("Connection: close, X-A", "connection:  x-b ", "X-A: 1", "x-B: 2", "X-C: 3")
    assert asked(*given) == told(*given) == ["X-C: 3"]


def test_a_connection_header_cannot_take_away_what_a_body_is() -> None:
    given = ("Connection: content-type, Content-Length, x-request-id, host", "Content-Type: a/b", "Content-Length: 3")
    assert asked(*given, length=3) == ["Content-Type: a/b", "Content-Length: 3"]
    assert told(*given) == ["Content-Type: a/b", "Content-Length: 3"]


@pytest.mark.parametrize("name", CLIENTS_OWN)
@pytest.mark.parametrize("spell", [str.lower, str.upper, str])
def test_what_is_the_clients_with_the_daemon_does_not_reach_an_engine(name: str, spell: Callable[[str], str]) -> None:
    assert asked(f"{spell(name)}: secret", *PLAIN) == [*PLAIN]


@pytest.mark.parametrize("name", CORS)
def test_which_pages_may_read_an_answer_is_not_the_engines_to_say(name: str) -> None:
    assert told(f"Access-Control-{name}: *", f"access-control-{name.lower()}: x", *PLAIN) == [*PLAIN]


def test_the_rest_passes_with_its_spelling_and_order() -> None:
    given = [
        "X-b:1",
        "x-A:  2\t",
        "X-B: 3",
        "Content-Encoding: gzip",
        "X-Empty:",
        "X-E: \u00e9",
    ]
    assert asked(*given) == given
    assert told(*given) == given


def test_there_is_one_request_id() -> None:
    assert asked("X-Request-ID: theirs") == []
    assert told("X-Request-ID: theirs", "Set-Cookie: a", "Set-Cookie: b") == ["Set-Cookie: a", "Set-Cookie: b"]


@pytest.mark.parametrize(
    ("lines", "length", "sent"),
    [
        ((), 0, []),
        (("Content-Length: 0",), 0, ["Content-Length: 0"]),
        (("Content-Length: 007",), 7, ["Content-Length: 7"]),
        (("Transfer-Encoding: chunked",), 12, ["Content-Length: 12"]),
        (("Transfer-Encoding: chunked",), 0, ["Content-Length: 0"]),
    ],
)
def test_an_engine_is_told_how_long_the_body_is(lines: tuple[str, ...], length: int, sent: list[str]) -> None:
    assert asked(*lines, length=length) == sent


def test_a_handshake_is_put_anew() -> None:
    handshake = ("Connection: keep-alive, Upgrade", "Upgrade: WebSocket", "Sec-WebSocket-Key: k")
    sent = asked(*handshake, method="GET", upgrade=True)
    assert sent == ["Sec-WebSocket-Key: k", "Connection: Upgrade", "Upgrade: websocket"]
    assert asked(*handshake, method="GET") == ["Sec-WebSocket-Key: k"]


def test_a_length_is_passed_on_unless_the_body_is_framed_otherwise() -> None:
    assert told("Content-Length: 3") == ["Content-Length: 3"]
    assert told("Transfer-Encoding: Chunked") == ["Transfer-Encoding: chunked"]
    assert told("Transfer-Encoding: chunked", unframed=True, keeps=False, minor=0) == ["Connection: close"]
    assert told(keeps=False) == ["Connection: close"]


def test_an_answer_that_changes_the_protocol() -> None:
    head = answer("Sec-WebSocket-Accept: x", "upgrade: websocket", "connection: upgrade", status="101 Go")
    sent = lines_of(relayed_head(head, ADDED, True, False, 1))
    assert sent == [
        "HTTP/1.1 101 Go",
        "Sec-WebSocket-Accept: x",
        "X-Added: 1",
        "Connection: Upgrade",
        "Upgrade: websocket",
    ]


@pytest.mark.parametrize(
    ("keeps", "minor", "line"),
    [(True, 1, b""), (False, 1, b"Connection: close\r\n"), (False, 0, b"Connection: close\r\n"), (True, 0, b"Connection: keep-alive\r\n")],
)  # fmt: skip
def test_a_client_is_told_what_it_does_not_expect(keeps: bool, minor: int, line: bytes) -> None:
    assert connection_line(keeps, minor) == line
    assert line in relayed_head(answer("Content-Length: 0"), b"", keeps, False, minor)


def test_the_head_of_a_stream_that_waits() -> None:
    head = parse_response(stream_head(ADDED, keeps=True).removesuffix(b"\r\n\r\n"))
    assert (head.status, head.chunked) == (200, True)
    assert head.values[b"content-type"].startswith(b"text/event-stream")
    assert head.values[b"x-added"] == b"1"
    assert b"connection" not in head.values
    assert b"\r\nConnection: close\r\n" in stream_head(ADDED, keeps=False)


@pytest.mark.parametrize("given", ["a", "req_1-2.3~4:5/6+7=8@9", "x" * 128])
def test_a_clients_request_id_is_kept(given: str) -> None:
    assert request_id(given) == given


@pytest.mark.parametrize("given", [None, "", " ", "a b", "a\n", 'a"b', "\u00e9", "x" * 129])
def test_or_made(given: str | None) -> None:
    made = {request_id(given), request_id(given)}
    assert len(made) == 2
    assert given not in made
    assert all(request_id(one) == one for one in made)


def test_server_timing() -> None:
    assert server_timing(1.23456, 0) == "queue;dur=1234.6, switch;dur=0.0"


@pytest.mark.parametrize(("given", "seconds"), [(None, None), ("0", 0.0), ("12", 12.0), (" 1.5 ", 1.5)])
def test_how_long_a_client_will_wait(given, seconds):
    assert seconds_of(given) == seconds


@pytest.mark.parametrize("given", ["", "-1", "soon", "1e9", "inf", "nan", "1,5", "0x10", "1" * 30, "\u0661"])
def test_what_is_no_number_of_seconds_is_refused(given):
    with pytest.raises(ValueError, match=f"^{re.escape(given)}$"):
        seconds_of(given)
