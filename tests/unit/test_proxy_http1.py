"""Heads of requests and answers: what is read, what is refused, and that nothing is read that h11 would not read so."""

from __future__ import annotations

import pytest

from llmuxd.proxy import http1
from llmuxd.proxy.http1 import BadMessage, RequestHead, is_field_line, parse_request, parse_response

HOST = b"Host: h"


def head(*lines: bytes, first: bytes = b"POST /v1/x HTTP/1.1") -> RequestHead:
    return parse_request(b"\r\n".join([first, *lines]))


def refusal(*lines: bytes, first: bytes = b"POST /v1/x HTTP/1.1") -> str:
    with pytest.raises(BadMessage) as bad:
        head(*lines, first=first)
    return f"{bad.value.status} {bad.value.code}: {bad.value}"


class TestRequestLines:
    @pytest.mark.parametrize(
        ("line", "method", "target", "minor"),
        [
            (b"GET / HTTP/1.1", "GET", "/", 1),
            (b"POST /v1/chat/completions?a=b%20c HTTP/1.0", "POST", "/v1/chat/completions?a=b%20c", 0),
            (b"get * HTTP/1.1", "get", "*", 1),
            (b"CONNECT h:80 HTTP/1.1", "CONNECT", "h:80", 1),
            (b"GET http://h/ HTTP/1.1", "GET", "http://h/", 1),
            (b"!#$%&'*+-.^_`|~09 !~ HTTP/1.1", "!#$%&'*+-.^_`|~09", "!~", 1),
            (b"X" * 32 + b" /" + b"y" * 60_000 + b" HTTP/1.1", "X" * 32, "/" + "y" * 60_000, 1),
        ],
    )
    def test_accepted(self, line: bytes, method: str, target: str, minor: int) -> None:
        found = head(HOST, first=line)
        assert (found.method, found.target, found.minor) == (method, target, minor)

    @pytest.mark.parametrize(
        "line",
        [
            b"", b"GET", b"GET /", b"GET / ", b" GET / HTTP/1.1", b"GET / HTTP/1.1 ", b"GET  / HTTP/1.1", b"GET /  HTTP/1.1",
            b"GET\t/ HTTP/1.1", b"GET / x HTTP/1.1", b"GET / HTTP/1.1\t", b"GET / http/1.1", b"GET / HTTP/1", b"GET / HTTP/11",
            b"GET / HTTP/1.10", b"GET / HTTP/+1.1", b"GET / HTTPS/1.1", b"GET / HTTP/1,1", b"GET /\xe9 HTTP/1.1", b"G(T / HTTP/1.1",
            b"GET: / HTTP/1.1", b"G\xc9T / HTTP/1.1", b"X" * 33 + b" / HTTP/1.1", b"HTTP/1.1 200 OK", b"GET  HTTP/1.1",
            b"\xef\xbb\xbfGET / HTTP/1.1",
        ],
    )  # fmt: skip
    def test_refused(self, line: bytes) -> None:
        assert refusal(HOST, first=line) == "400 bad_request: the request line is not METHOD TARGET HTTP/1.1"

    @pytest.mark.parametrize("version", [b"0.9", b"1.2", b"1.9", b"2.0", b"3.0", b"9.1", b"0.1"])
    def test_versions_that_are_not_spoken(self, version: bytes) -> None:
        assert refusal(HOST, first=b"GET / HTTP/" + version).startswith("400 unsupported_version: ")


class TestLines:
    @pytest.mark.parametrize(
        "block",
        [
            b"GET / HTTP/1.1\nHost: h", b"GET / HTTP/1.1\r\nHost: h\nX: y", b"GET / HTTP/1.1\r\nHost: h\r", b"GET / HTTP/1.1\r\r\nHost: h",
            b"GET / HTTP/1.1\r\nHost: h\rX: y", b"GET / HTTP/1.1\r\nHost: h\n\rX: y", b"GET / HTTP/1.1\r\nHost: h\n", b"\nGET / HTTP/1.1",
        ],
    )  # fmt: skip
    def test_each_ends_in_crlf(self, block: bytes) -> None:
        with pytest.raises(BadMessage, match="a line of the head does not end in CRLF"):
            parse_request(block)
        with pytest.raises(BadMessage, match="a line of the head does not end in CRLF"):
            parse_response(block.replace(b"GET / HTTP/1.1", b"HTTP/1.1 200 OK"))

    def test_no_control_character_stands_in_one(self) -> None:
        for byte in [*range(0x20), 0x7F]:
            if byte in (0x09, 0x0A, 0x0D):
                continue
            for block in (
                b"GET /%c HTTP/1.1\r\nHost: h",
                b"GET / HTTP/1.1\r\nHost: h\r\nX: a%cb",
                b"GET / HTTP/1.1\r\nHost: h\r\nX%c: y",
            ):
                with pytest.raises(BadMessage, match="a control character in the head"):
                    parse_request(block % byte)

    def test_there_are_a_hundred_at_most(self) -> None:
        lines = [b"X%d: y" % number for number in range(99)]
        assert len(head(HOST, *lines).lines) == 100
        assert refusal(HOST, *lines, b"Y: z") == "431 head_too_large: more than 100 header fields"
        assert refusal(HOST, *[b"X: y"] * 100).startswith("431 head_too_large")

    def test_an_empty_one_is_no_field(self) -> None:
        assert refusal(HOST, b"", b"X: y").startswith("400 bad_request: not a header field")
        assert refusal(HOST, b"").startswith("400 bad_request: not a header field")


class TestFields:
    def test_names_are_known_in_any_spelling_and_lines_stay_as_they_are(self) -> None:
        found = head(
            b"hOsT:h", b"X-A:  1 \t", b"x-a:\t2", b"X-Empty:", b'X-B: \xc3\xa9\xff:;,"', b"!#$%&'*+-.^_`|~09: x"
        )
        assert found.lines == [
            (b"host", b"hOsT:h"),
            (b"x-a", b"X-A:  1 \t"),
            (b"x-a", b"x-a:\t2"),
            (b"x-empty", b"X-Empty:"),
            (b"x-b", b"X-B: \xc3\xa9\xff:;,\""),
            (b"!#$%&'*+-.^_`|~09", b"!#$%&'*+-.^_`|~09: x"),
        ]  # fmt: skip
        assert found.values[b"x-a"] == b"1, 2"
        assert found.values[b"x-empty"] == b""
        assert found.values[b"x-b"] == b'\xc3\xa9\xff:;,"'
        assert found.text(b"x-b") == '\u00e9\ufffd:;,"'
        assert found.text(b"x-c") is None

    @pytest.mark.parametrize(
        "line",
        [
            b"X", b"Host", b"X-Api-Key", b": y", b" X: y", b"\tX: y", b"X : y", b"X\t: y", b"X y: z", b" folded", b"X\xe9: y", b"X(y): z",
            b'"X": y', b"X/y: z", b"X@y: z", b"X=y", b"GET /sleep HTTP/1.1", b"HTTP/1.1 200 OK", b"[X]: y", b"{X}: y", b"X,Y: z", b"X;Y: z",
        ],
    )  # fmt: skip
    def test_what_is_none(self, line: bytes) -> None:
        # The names are known by then.
        head(HOST, b"X: y", b"X-Api-Key: z")
        assert refusal(HOST, line).startswith("400 bad_request: not a header field: ")
        assert refusal(HOST, line, b"X: y").isascii()

    @pytest.mark.parametrize(
        "name",
        [
            b"Authorization", b"Content-Length", b"Content-Type", b"Expect", b"Host", b"Model-Override", b"Transfer-Encoding", b"Upgrade",
            b"X-Api-Key", b"X-LLMux-Priority", b"X-LLMux-Wait", b"X-Request-Id",
        ],
    )  # fmt: skip
    def test_what_decides_something_is_there_once(self, name: bytes) -> None:
        value = b"5" if name == b"Content-Length" else b"chunked" if name == b"Transfer-Encoding" else b"x"
        lines = [] if name == b"Host" else [HOST]
        assert head(*lines, name + b": " + value).values[name.lower()] == value
        said = f"400 bad_request: the field {name.decode().lower()} is there twice"
        assert refusal(*lines, name + b": " + value, name.lower() + b":" + value) == said
        assert refusal(*lines, name + b": " + value, b"X: y", name.upper() + b": " + value) == said

    def test_one_host_in_1_1_and_one_at_most_in_1_0(self) -> None:
        assert refusal(b"X: y") == "400 bad_request: no Host"
        assert head(b"Host:").values[b"host"] == b""
        old = b"GET / HTTP/1.0"
        assert head(first=old).values == {}
        assert head(HOST, first=old).values == {b"host": b"h"}
        assert refusal(HOST, HOST, first=old) == "400 bad_request: the field host is there twice"

    def test_lines_are_remembered_within_bounds_and_secrets_never(self) -> None:
        for number in range(3000):
            head(HOST, b"X-%d: y" % number, b"X-Long: " + b"y" * 200)
        for name in (b"Authorization", b"X-API-Key", b"cookie", b"Proxy-Authorization"):
            head(HOST, name + b": secret")
        assert len(http1._fields) <= 1024
        assert not [line for line in http1._fields if b"secret" in line or len(line) > 128]


class TestFraming:
    @pytest.mark.parametrize(
        ("lines", "length", "chunked"),
        [
            ([], None, False),
            ([b"Content-Length: 0"], 0, False),
            ([b"Content-Length:\t0012 "], 12, False),
            ([b"Content-Length: " + b"9" * 18], 10**18 - 1, False),
            ([b"Transfer-Encoding: chunked"], None, True),
            ([b"transfer-encoding:\tChunked "], None, True),
        ],
    )
    def test_how_a_body_is_framed(self, lines: list[bytes], length: int | None, chunked: bool) -> None:
        found = head(HOST, *lines)
        assert (found.length, found.chunked) == (length, chunked)

    @pytest.mark.parametrize(
        "value",
        [
            b"", b"-1", b"+1", b"0x10", b"1.0", b"1e3", b"1 2", b"1,1", b"1, 1", b"1;", b"1_0", b"five", b"\xd9\xa1", b"\xef\xbc\x91", b"9" * 19,
            b"0" * 19, b"\"1\"", b"1\xa0", b"1\x85",
        ],
    )  # fmt: skip
    def test_a_length_is_digits(self, value: bytes) -> None:
        assert refusal(HOST, b"Content-Length: " + value) == "400 bad_request: Content-Length is not a number"

    @pytest.mark.parametrize(
        "value",
        [
            b"", b"identity", b"gzip", b"gzip, chunked", b"chunked, chunked", b"chunked, gzip", b"chunked,", b",chunked", b"chunked;q=1",
            b"xchunked", b"chunkedx", b"\"chunked\"", b"chun ked", b"chunk", b"\xa0chunked", b"chunked\x85", b"trailers",
        ],
    )  # fmt: skip
    def test_the_only_coding_is_chunked(self, value: bytes) -> None:
        assert refusal(HOST, b"Transfer-Encoding: " + value).startswith("501 unsupported_transfer_encoding: ")

    def test_never_both_and_no_coding_in_1_0(self) -> None:
        length, coding = b"Content-Length: 5", b"Transfer-Encoding: chunked"
        for lines in ([length, coding], [coding, length]):
            assert refusal(HOST, *lines) == "400 bad_request: both Content-Length and Transfer-Encoding"
        assert refusal(coding, first=b"POST / HTTP/1.0") == "400 bad_request: HTTP/1.0 has no Transfer-Encoding"
        assert refusal(HOST, coding, coding) == "400 bad_request: the field transfer-encoding is there twice"
        assert refusal(HOST, length, b"Content-Length: 6") == "400 bad_request: the field content-length is there twice"


@pytest.mark.parametrize(
    ("minor", "lines", "keeps"),
    [
        (1, [], True),
        (1, [b"Connection: close"], False),
        (1, [b"Connection: Keep-Alive"], True),
        (1, [b"Connection: keep-alive, CLOSE"], False),
        (1, [b"Connection: x", b"Connection: close"], False),
        (1, [b"Connection: closed"], True),
        (0, [], False),
        (0, [b"Connection: keep-alive"], True),
        (0, [b"Connection: x ,\tKeep-Alive"], True),
        (0, [b"Connection: keep-alive, close"], False),
        (0, [b"Connection: x"], False),
    ],
)
def test_whether_the_connection_is_used_again(minor: int, lines: list[bytes], keeps: bool) -> None:
    assert head(HOST, *lines, first=b"GET / HTTP/1.%d" % minor).keep_alive is keeps


def test_the_members_of_a_list() -> None:
    found = head(HOST, b"Connection: Upgrade ,, x", b"connection:Y")
    assert found.tokens(b"connection") == [b"upgrade", b"", b"x", b"y"]
    assert found.tokens(b"te") == []


class TestAnswers:
    @pytest.mark.parametrize(
        ("line", "minor", "status", "reason"),
        [
            (b"HTTP/1.1 200 OK", 1, 200, b"OK"),
            (b"HTTP/1.0 404 Not\tFound, \xe9", 0, 404, b"Not\tFound, \xe9"),
            (b"HTTP/1.1 200 ", 1, 200, b""),
            (b"HTTP/1.1 599", 1, 599, b""),
            (b"HTTP/1.1 100 Continue", 1, 100, b"Continue"),
        ],
    )
    def test_status_lines(self, line: bytes, minor: int, status: int, reason: bytes) -> None:
        found = parse_response(line)
        assert (found.minor, found.status, found.reason) == (minor, status, reason)

    @pytest.mark.parametrize(
        "line",
        [
            b"", b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1  200 OK", b"HTTP/1.1 200OK", b"HTTP/1.2 200 OK",
            b"HTTP/2.0 200 OK", b"HTTP/2 200", b"http/1.1 200 OK", b"ICY 200 OK", b" HTTP/1.1 200 OK", b"HTTP/1.1 099 x", b"HTTP/1.1 600 x",
            b"HTTP/1.1 -200 x", b"HTTP/1.1\t200\tOK", b"{}", b"GET / HTTP/1.1",
        ],
    )  # fmt: skip
    def test_what_is_none(self, line: bytes) -> None:
        with pytest.raises(BadMessage, match=r"the status line is not HTTP/1.1 STATUS REASON"):
            parse_response(line)

    @pytest.mark.parametrize(
        "lines",
        [
            b"Content-Length: 1\r\nContent-Length: 1", b"Content-Length: x", b"Content-Length: 1\r\nTransfer-Encoding: chunked",
            b"Transfer-Encoding: gzip, chunked", b"X", b" folded", b"X : y", b"Content-Type: a\r\nContent-Type: b", b"X: y\r\n" * 100 + b"X: y",
        ],
    )  # fmt: skip
    def test_their_fields_are_read_as_strictly(self, lines: bytes) -> None:
        with pytest.raises(BadMessage):
            parse_response(b"HTTP/1.1 200 OK\r\n" + lines)

    def test_they_need_no_host(self) -> None:
        found = parse_response(b"HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nContent-Length: 3")
        assert (found.length, found.values[b"set-cookie"]) == (3, b"a, b")


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        (b"X: y\r\n", True), (b"X:\r\n", True), (b"X:\t\xe9 :\r\n", True), (b"X: y", False), (b"X: y\n", False), (b"\r\n", False), (b"X\r\n", False),
        (b" X: y\r\n", False), (b"X : y\r\n", False), (b": y\r\n", False), (b"X: \x00\r\n", False), (b"X: a\rb\r\n", False), (b"X: y\r\n\r\n", False),
    ],
)  # fmt: skip
def test_a_field_by_itself(line: bytes, is_one: bool) -> None:
    assert is_field_line(line) is is_one
