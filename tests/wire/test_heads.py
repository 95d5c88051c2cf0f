"""A request's head is spelled as the standard has it, or refused: no program behind this one can read another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wire.cases import BAD, BODY, SMUGGLED, Case, check, refused, rejected, said, served, table
from tests.wire.client import get, post, request
from tests.wire.engine import ok
from tests.wire.stack import MAX_HEAD, Wire, play, until

TOO_LARGE = "431 head_too_large"
VERSION = ("400 unsupported_version", BAD)
METHOD = ("400 unsupported_method", BAD)
URL = ("400 invalid_url", BAD)


def line(first: str) -> bytes:
    """A request with this first line that would be served if the line were one."""
    return request(first, "Host: h", "model-override: a", "Content-Length: 14", body=BODY)


def field(raw: bytes) -> bytes:
    """A request with these bytes as a line of its head."""
    start = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n"
    return start + raw + b"\r\nContent-Length: 14\r\nmodel-override: a\r\n\r\n" + BODY


FIRST_LINES = [
    refused("two spaces before the target", line("POST  /v1/completions HTTP/1.1")),
    refused("two spaces before the version", line("POST /v1/completions  HTTP/1.1")),
    refused("a space at the end", line("POST /v1/completions HTTP/1.1 ")),
    refused("a space at the beginning", line(" POST /v1/completions HTTP/1.1")),
    refused("a tab at the end", line("POST /v1/completions HTTP/1.1\t")),
    refused("tabs", line("POST\t/v1/completions\tHTTP/1.1")),
    refused("a tab before the version", line("POST /v1/completions\tHTTP/1.1")),
    refused("a vertical tab", line("POST\x0b/v1/completions HTTP/1.1")),
    refused("two targets", line("POST /v1/completions /sleep HTTP/1.1")),
    refused("two versions", line("POST /v1/completions HTTP/1.1 HTTP/1.1")),
    refused("no target", line("POST HTTP/1.1")),
    refused("an empty target", line("POST  HTTP/1.1")),
    refused("no method", line("/v1/completions HTTP/1.1")),
    refused("an empty method", line(" /v1/completions HTTP/1.1")),
    refused("only a method", line("POST")),
    refused("a version of its own", line("HTTP/1.1")),
    refused("HTTP/0.9", line("GET /v1/completions")),
    refused("HTTP/0.9 with a model", line("GET /v1/completions?model=a")),
    refused("a NUL in the method", line("PO\x00ST /v1/completions HTTP/1.1")),
    refused("a NUL in the target", line("POST /v1/comp\x00letions HTTP/1.1"), URL),
    refused("a NUL in the version", line("POST /v1/completions HTTP/1.1\x00")),
    refused("a DEL in the target", line("POST /v1/completions\x7f HTTP/1.1"), URL),
    refused("a control character in the target", line("POST /v1/\x01completions HTTP/1.1"), URL),
    refused("a byte above ASCII in the target", line("POST /v1/completions\xe9 HTTP/1.1"), URL),
    refused("UTF-8 in the target", line("POST /v1/\xc3\xa9 HTTP/1.1"), URL),
    refused("a no-break space in the target", line("POST /v1/\xa0x HTTP/1.1"), URL),
    refused("a next-line character in the target", line("POST /v1/x\x85y HTTP/1.1"), URL),
    refused("a byte above ASCII in the method", line("P\xd6ST /v1/completions HTTP/1.1")),
    refused("a separator in the method", line("PO(ST /v1/completions HTTP/1.1")),
    refused("a colon in the method", line("POST: /v1/completions HTTP/1.1")),
    refused("a quote in the method", line('"POST" /v1/completions HTTP/1.1')),
    refused("a slash in the method", line("PO/ST /v1/completions HTTP/1.1")),
    refused("a byte order mark", b"\xef\xbb\xbf" + line("POST /v1/completions HTTP/1.1")),
    refused("a bare CR inside", line("POST /v1/completions\r HTTP/1.1")),
    refused("a bare CR for a space", line("POST\r/v1/completions HTTP/1.1")),
    refused("a bare LF at the end", line("POST /v1/completions HTTP/1.1").replace(b"\r\n", b"\n", 1)),
    refused("two CR at the end", line("POST /v1/completions HTTP/1.1").replace(b"\r\n", b"\r\r\n", 1)),
    refused("a bare LF before it", b"\n" + line("POST /v1/completions HTTP/1.1")),
    refused("a bare CR before it", b"\r" + line("POST /v1/completions HTTP/1.1")),
    refused("HTTP in lower case", line("POST /v1/completions http/1.1"), VERSION),
    refused("HTTP in mixed case", line("POST /v1/completions Http/1.1"), VERSION),
    refused("HTTPS", line("POST /v1/completions HTTPS/1.1"), VERSION),
    refused("ICY", line("POST /v1/completions ICY/1.1"), VERSION),
    refused("HTTP/1", line("POST /v1/completions HTTP/1"), VERSION),
    refused("HTTP/1.", line("POST /v1/completions HTTP/1."), VERSION),
    refused("HTTP/11", line("POST /v1/completions HTTP/11"), VERSION),
    refused("HTTP/1,1", line("POST /v1/completions HTTP/1,1"), VERSION),
    refused("HTTP/1.1.1", line("POST /v1/completions HTTP/1.1.1"), VERSION),
    refused("HTTP/1.10", line("POST /v1/completions HTTP/1.10"), VERSION),
    refused("HTTP/01.1", line("POST /v1/completions HTTP/01.1"), VERSION),
    refused("HTTP/+1.1", line("POST /v1/completions HTTP/+1.1"), VERSION),
    refused("HTTP/-1.1", line("POST /v1/completions HTTP/-1.1"), VERSION),
    refused("HTTP/0x1.1", line("POST /v1/completions HTTP/0x1.1"), VERSION),
    refused("HTTP/ 1.1", line("POST /v1/completions HTTP/ 1.1"), VERSION),
    refused("HTTP /1.1", line("POST /v1/completions HTTP /1.1"), VERSION),
    refused("HTTP/1.2", line("POST /v1/completions HTTP/1.2"), VERSION),
    refused("HTTP/1.9", line("POST /v1/completions HTTP/1.9"), VERSION),
    refused("HTTP/0.9 said", line("POST /v1/completions HTTP/0.9"), VERSION),
    refused("HTTP/2.0", line("POST /v1/completions HTTP/2.0"), VERSION),
    refused("HTTP/3", line("POST /v1/completions HTTP/3"), VERSION),
    refused("HTTP/9.9", line("POST /v1/completions HTTP/9.9"), VERSION),
    refused("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), VERSION),
    refused("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xab" * 64 + b"\r\n\r\n"),
    refused("SSH", b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
    refused("SMTP", b"EHLO example.org\r\n\r\n"),
    refused("Redis", b"*1\r\n$4\r\nPING\r\n\r\n"),
    refused("the PROXY protocol", b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n" + line("POST /v1/completions HTTP/1.1")),
    refused("an answer", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", (BAD, *VERSION)),
    refused("CONNECT to a host", get("localhost:80", method="CONNECT"), (*METHOD, *URL, "400 upgrade_refused")),
    refused("CONNECT to a path", get("/v1/completions", method="CONNECT"), (*METHOD, "400 upgrade_refused")),
    served("a blank line before it", b"\r\n" + line("POST /v1/completions HTTP/1.1")),
    served("blank lines before it", b"\r\n" * 5 + line("POST /v1/completions HTTP/1.1")),
]

METHODS = ["TRACE", "post", "Post", "BREW", "PROPFIND", "MOVE", "COPY", "LINK", "SEARCH", "M-SEARCH", "QUERY", "X"]


@table(FIRST_LINES)
def test_first_lines(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_are_not_served(method: str, tmp_path: Path) -> None:
    """Whether the connection stays is the proxy's to choose: what follows is another request or nothing at all."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(line(f"{method} /v1/completions HTTP/1.1") + get("/health"))
        answer = await client.answer()
        assert answer is not None
        assert said(answer) == "400 unsupported_method"
        following = await client.answer()
        assert following is None or following.status == 200
        assert wire.engine.asked == []

    play(tmp_path, scenario, ok)


NAMES = {
    "empty": b": x",
    "a space": b" : x",
    "a space inside": b"X Y: z",
    "a space behind": b"X : y",
    "a tab behind": b"X\t: y",
    "a space before": b" X: y",
    "a tab before": b"\tX: y",
    "a NUL": b"X\x00: y",
    "a NUL before": b"\x00X: y",
    "a backspace": b"X\x08: y",
    "an escape": b"X\x1b: y",
    "a DEL": b"X\x7f: y",
    "a bare CR": b"X\r: y",
    "a bare LF": b"X\n: y",
    "Latin-1": b"\xe9: y",
    "UTF-8": "\u017fost: y".encode(),
    "a byte order mark": b"\xef\xbb\xbfX: y",
    **{f"a {chr(byte)}": b"X%cY: z" % byte for byte in b'"(),/;<=>?@[\\]{}'},
}

VALUES = {
    "a NUL": b"X: \x00",
    "a NUL inside": b"X: y\x00z",
    "a backspace": b"X: \x08",
    "a vertical tab": b"X: \x0b",
    "a form feed": b"X: y\x0cz",
    "a unit separator": b"X: y\x1fz",
    "an escape": b"X: \x1b[31m",
    "a DEL": b"X: \x7f",
    "a bare CR": b"X: y\rz",
    "a bare CR at the end": b"X: y\r",
    "a bare LF": b"X: y\nz",
    "a bare LF and a field": b"X: y\nY: z",
    "a bare CR and a field": b"X: y\rY: z",
    "a bare LF and an end": b"X: y\n\nGET /sleep HTTP/1.1",
    "an end of CR CR LF": b"X: y\r\r\n",
    "an end of LF LF": b"X: y\n\n",
    "an end of LF CR LF": b"X: y\n\r\n",
    "a fold with a space": b"X: y\r\n z",
    "a fold with a tab": b"X: y\r\n\tz",
    "a fold that is empty": b"X: y\r\n \r\nZ: z",
    "a fold that is all": b"X:\r\n y",
    "no colon": b"X",
    "no colon but an equals sign": b"X=y",
    "a request line": b"GET /sleep HTTP/1.1",
    "only a space": b" ",
}

FIELDS = [
    *(refused(f"a name, {name}", field(raw)) for name, raw in NAMES.items()),
    *(refused(f"a line with {name}", field(raw)) for name, raw in VALUES.items()),
    refused("a fold right behind the first line", request("POST /v1/completions HTTP/1.1", " Host: h", body=BODY)),
    refused("bare LF everywhere", post().replace(b"\r\n", b"\n")),
    refused("bare CR everywhere", post().replace(b"\r\n", b"\r") + b"\r\n\r\n"),
    refused("LF at the end of the head", post().replace(b"\r\n\r\n", b"\r\n\n")),
    refused("no Host", request("POST /v1/completions HTTP/1.1", "Content-Length: 14", body=BODY)),
    refused("two Hosts", post(BODY, "Host: h")),
    refused("two different Hosts", post(BODY, "host: sleep")),
    refused("two Hosts in HTTP/1.0", get("/health", "Host: i", version="1.0")),
    refused("a Host with a space before its colon", request("GET /health HTTP/1.1", "Host : h")),
    refused("two credentials", post(BODY, "Authorization: Bearer 1", "Authorization: Bearer 2"), (BAD, "401 invalid_api_key")),
    served("an empty Host", post().replace(b"Host: h", b"Host:")),
    served("a Host that is another's", post().replace(b"Host: h", b"Host: example.org:1")),
    served("an empty value", field(b"X:")),
    served("a value of blanks", field(b"X: \t ")),
    served("a value with a tab", field(b"X: y\tz")),
    served("a value with a colon", field(b"X: y: z")),
    served("a value in Latin-1", field(b"X: gr\xfcn")),
    served("a value that is no UTF-8", field(b"X: \xff\xfe\x80")),
    served("a value with markup", field(b"X: <a href=\"/sleep\">'`$(sleep)${sleep}\\r\\n</a>")),
    served("a name of every letter there may be", field(b"!#$%&'*+-.^_`|~09azAZ: y")),
    served("a field given twice", field(b"X: y\r\nx: z")),
]  # fmt: skip


@table(FIELDS)
def test_fields(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def of_bytes(count: int) -> bytes:
    """A request whose head, with the empty line that ends it, has so many bytes."""
    bare = len(post(BODY, "X: ")) - len(BODY)
    return post(BODY, "X: " + "y" * (count - bare))


def of_fields(count: int) -> bytes:
    """A request with so many fields."""
    return post(BODY, *(f"X-{n}: y" for n in range(count - 3)))


SIZES = [
    served("almost the largest head", of_bytes(MAX_HEAD - 4)),
    refused("a head that is larger", of_bytes(MAX_HEAD + 5), TOO_LARGE),
    refused("a head that is far larger", of_bytes(4 * MAX_HEAD), TOO_LARGE),
    refused("a head of many fields that is larger", request("GET /health HTTP/1.1", *["X: " + "y" * 900] * 80), TOO_LARGE),
    refused("a target that is too long", get("/v1/completions?model=a&x=" + "y" * MAX_HEAD), TOO_LARGE),
    refused("a path that is too long", get("/v1/" + "y" * MAX_HEAD), TOO_LARGE),
    refused("a method that is too long", b"X" * (MAX_HEAD + 5), TOO_LARGE),
    refused("a first line without an end", b"POST /" + b"x" * (MAX_HEAD + 5), TOO_LARGE),
    refused("a field without an end", b"POST /v1/completions HTTP/1.1\r\nX: " + b"y" * (MAX_HEAD + 5), TOO_LARGE),
    refused("100000 blank lines", b"\r\n" * 100_000 + b"\n", (BAD, TOO_LARGE)),
    served("a long target", line("POST /v1/completions?x=" + "y" * 60_000 + " HTTP/1.1")),
    served("100 fields", of_fields(100)),
    refused("101 fields", of_fields(101), TOO_LARGE),
    refused("1000 fields", of_fields(1000), TOO_LARGE),
    rejected("a method of 32 letters", line("X" * 32 + " /v1/completions HTTP/1.1"), METHOD),
    refused("a method of 1000 letters", line("X" * 1000 + " /v1/completions HTTP/1.1"), METHOD),
]  # fmt: skip


@table(SIZES)
def test_sizes(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def test_a_head_of_the_configured_size(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        for count, expected in ((500, "200"), (600, TOO_LARGE)):
            client = await wire.connect()
            await client.send(of_bytes(count))
            answer = await client.answer()
            assert answer is not None
            assert said(answer) == expected

    play(tmp_path, scenario, ok, limits={"max_head_bytes": 550})


@pytest.mark.parametrize("opening", [b"\x16\x03\x01\x02", b"\x05\x01\x00", b"\x00\n", b"GET / HTTP/1.1\n\n", b"help\n"])
def test_what_is_no_http_leaves_nothing_behind(tmp_path: Path, opening: bytes) -> None:
    """It need not be answered, but it never gets further, and goes when its client does."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(opening)
        await wire.after(0.0)
        client.half_close()
        await client.rest()
        await until(lambda: not wire.tickets(), "nothing is left")
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok)


def test_an_error_shows_nothing_that_a_terminal_or_a_page_would_obey(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        for sent in (
            field(b"\x1b[31m<script>\xff: x"),
            line("GET /\x1b[31m HTTP/1.1"),
            get("/<script>alert(1)</script>"),
        ):
            client = await wire.connect()
            await client.send(sent)
            answer = await client.answer()
            assert answer is not None
            assert answer.status in (400, 404)
            assert answer.get("content-type") == "application/json"
            assert answer.body.isascii()
            assert b"\x1b" not in answer.body
            assert not any(ord(letter) < 32 for letter in answer.error["message"])
        assert SMUGGLED not in wire.engine.bodies

    play(tmp_path, scenario, ok)
