"""Where bodies end: the same wherever they are cut, and nowhere else than h11 has it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmuxd.proxy import framing
from llmuxd.proxy.framing import LAST_CHUNK, Chunked, Counted, Framing, UntilClose, chunk, framing_of
from llmuxd.proxy.http1 import BadMessage, parse_response

BODY = b'4\r\nWiki\r\n6;x="y"\r\npedia \r\nE\r\nin \r\n\r\nchunks.\r\n0;last\r\nX-Sum: 1\r\nY:\r\n\r\n'
PAYLOAD = b"Wikipedia in \r\n\r\nchunks."


def cut(data: bytes, *at: int) -> list[bytes]:
    return [data[begin:end] for begin, end in zip([0, *at], [*at, len(data)], strict=True)]


def fed(body: Framing, pieces: Iterable[bytes]) -> tuple[bytes, bytes]:
    """The payload, and what was not taken."""
    payload, rest = bytearray(), b""
    for piece in pieces:
        taken = body.feed(piece, payload.extend)
        assert taken == len(piece) or body.ended
        rest += piece[taken:]
    return bytes(payload), rest


def read(pieces: Iterable[bytes]) -> tuple[bytes, bytes, bool] | str:
    """All that there is to know of a chunked body that comes in these pieces."""
    body = Chunked()
    try:
        payload, rest = fed(body, pieces)
    except BadMessage as bad:
        return f"{bad.status} {bad.code} {bad}"
    return payload, rest, body.ended


class TestCounted:
    def test_it_takes_what_belongs_to_it(self) -> None:
        body = Counted(5)
        assert (body.ended, body.between, body.framed) == (False, False, True)
        assert body.feed(b"abc") == 3
        assert not body.ended
        assert body.feed(b"defg") == 2
        assert body.ended
        assert body.feed(b"more") == 0

    def test_one_without_bytes_has_ended(self) -> None:
        assert Counted(0).ended
        assert Counted(0).feed(b"next") == 0

    @pytest.mark.parametrize("at", range(9))
    def test_the_payload_is_the_same_wherever_it_is_cut(self, at: int) -> None:
        assert fed(Counted(5), cut(b"abcdefgh", at)) == (b"abcde", b"fgh")


def test_what_ends_with_its_connection_takes_all() -> None:
    body = UntilClose()
    assert fed(body, [b"abc", b"", b"def"]) == (b"abcdef", b"")
    assert (body.ended, body.between, body.framed) == (False, True, False)


class TestChunked:
    @pytest.mark.parametrize("known", [False, True])
    def test_it_is_the_same_cut_anywhere(self, known: bool) -> None:
        framing._sizes.clear()
        data = BODY + b"GET / HTTP/1.1\r\n"
        expected = (PAYLOAD, b"GET / HTTP/1.1\r\n", True)
        if known:
            assert read([data]) == expected
        assert read([bytes([byte]) for byte in data]) == expected
        for at in range(len(data) + 1):
            assert read(cut(data, at)) == expected
        for one, other in itertools.combinations(range(0, len(data), 3), 2):
            assert read(cut(data, one, other)) == expected

    def test_it_has_ended_only_at_its_end(self) -> None:
        for at in range(len(BODY)):
            body = Chunked()
            assert body.feed(BODY[:at]) == at
            assert not body.ended
            assert body.framed

    def test_between_two_chunks_others_can_be_put(self) -> None:
        ends = {0, BODY.index(b"6;x"), BODY.index(b"E\r\nin"), BODY.index(b"0;last")}
        for at in range(len(BODY) + 1):
            body = Chunked()
            body.feed(BODY[:at])
            assert body.between == (at in ends), BODY[:at]

    def test_it_tells_up_to_where_chunks_are_whole(self) -> None:
        ends = [0, BODY.index(b"6;x"), BODY.index(b"E\r\nin"), BODY.index(b"0;last"), len(BODY)]
        for begin, end in itertools.combinations(range(len(BODY) + 1), 2):
            body = Chunked()
            body.feed(BODY[:begin])
            body.feed(BODY[begin:end])
            whole = max((at for at in ends if begin < at <= end), default=begin)
            assert body.whole == whole - begin

    def test_what_was_whole_before_it_broke_is_told_too(self) -> None:
        body = Chunked()
        with pytest.raises(BadMessage):
            body.feed(b"1\r\na\r\n1\r\nb\r\nX\r\n")
        assert body.whole == 12

    @pytest.mark.parametrize(
        ("body", "payload"),
        [
            (LAST_CHUNK, b""),
            (b"000\r\n\r\n", b""),
            (b"0 \t\r\n\r\n", b""),
            (b"0\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", b""),
            (b"000000000000001\r\na\r\n" + LAST_CHUNK, b"a"),
            (b"a\r\n0123456789\r\nA\r\n0123456789\r\n" + LAST_CHUNK, b"0123456789" * 2),
            (b'1;a;b="\xe9\t; 5"\r\na\r\n' + LAST_CHUNK, b"a"),
            (b"1 \t;a\r\na\r\n" + LAST_CHUNK, b"a"),
            (b"2\r\n\r\n\r\n" + LAST_CHUNK, b"\r\n"),
            (b"7\r\n0\r\n\r\n0\r\r\n" + LAST_CHUNK, b"0\r\n\r\n0\r"),
            (b"1;" + b"x" * 4092 + b"\r\na\r\n" + LAST_CHUNK, b"a"),
            (b"0\r\n" + (b"X: " + b"y" * 1019 + b"\r\n") * 15 + b"\r\n", b""),
        ],
    )
    def test_accepted(self, body: bytes, payload: bytes) -> None:
        assert read([body + b"0\r\n\r\n"]) == (payload, b"0\r\n\r\n", True)

    @pytest.mark.parametrize(
        "body",
        [
            b"\r\n", b"\n", b" 1\r\na\r\n", b"\t1\r\na\r\n", b"1\na\r\n", b"1\ra\r\n", b"1\r\r\na\r\n", b"0x1\r\na\r\n", b"+1\r\na\r\n",
            b"-1\r\na\r\n", b"1_0\r\na\r\n", b"g\r\n", b";x\r\na\r\n", b"1 2\r\na\r\n", b"1,1\r\na\r\n", b"1;a\nb\r\na\r\n",
            b"1;a\rb\r\na\r\n", b"1;\x00\r\na\r\n", b"1;\x7f\r\na\r\n", b"1\x0b\r\na\r\n", b"\xef\xbb\xbf1\r\na\r\n", b"\xd9\xa1\r\na\r\n",
            b"1000000000000000\r\na\r\n", b"0000000000000001\r\na\r\n", b"f" * 16 + b"\r\n", b"ffffffffffffffffff1\r\na\r\n",
            b"1;" + b"x" * 4093 + b"\r\na\r\n", b"1" + b" " * 5000,
            b"1\r\nab\r\n", b"1\r\na\n", b"1\r\na\r0", b"1\r\na0\r\n\r\n", b"1\r\n\r\n\r\n", b"2\r\na\r\n0\r\n\r\n",
            b"0\n\r\n", b"0\r\n\n", b"0\r\nX\r\n\r\n", b"0\r\nX : y\r\n\r\n", b"0\r\n X: y\r\n\r\n", b"0\r\nX: y\r\n z\r\n\r\n",
            b"0\r\nX: y\n\r\n", b"0\r\nX: a\rb\r\n\r\n", b"0\r\nX: \x00\r\n\r\n", b"0\r\n: y\r\n\r\n", b"0\r\nGET / HTTP/1.1\r\n\r\n",
            b"0\r\nX: " + b"y" * 4096 + b"\r\n", b"0\r\n" + (b"X: " + b"y" * 1019 + b"\r\n") * 17, b"0\r\n" + b"X" * 5000,
        ],
    )  # fmt: skip
    def test_refused(self, body: bytes) -> None:
        for known in (False, True):
            framing._sizes.clear()
            if known:
                for size in (b"1", b"2", b"a"):
                    read([size + b"\r\n"])
            whole = read([body + b"\r\n\r\n\n"])
            assert isinstance(whole, str)
            assert whole.startswith("400 invalid_body ")
            assert read([bytes([byte]) for byte in body + b"\r\n\r\n\n"]) == whole

    def test_what_cannot_become_a_size_is_refused_at_once(self) -> None:
        for line in (b"\r", b"x", b" ", b"1x", b"1\x00", b"1;\x00", b"1" * 16, b"1\r\r"):
            assert read([line]) == "400 invalid_body a chunk has no valid size"
        for line in (b"1\r\nab", b"1\r\na\r\r", b"1\r\na1"):
            assert read([line]) == "400 invalid_body a chunk is not as long as it says"
        for line in (b"1", b"1\r", b"1 ", b"1;", b"1;x\r"):
            assert read([line]) == (b"", b"", False)

    def test_what_follows_the_end_is_not_looked_at(self) -> None:
        body = Chunked()
        assert body.feed(LAST_CHUNK + b"\x00\n") == len(LAST_CHUNK)
        assert body.feed(b"5\r\n") == 0

    def test_a_chunk_of_our_own(self) -> None:
        assert read([chunk(b"a") + chunk(b"b" * 300) + LAST_CHUNK]) == (b"a" + b"b" * 300, b"", True)

    def test_sizes_are_remembered_within_bounds(self) -> None:
        framing._sizes.clear()
        for size in range(1, 6000):
            assert read([b"%x\r\n" % size])
        assert len(framing._sizes) <= 4096
        framing._sizes.clear()
        read([b"1;" + b"x" * 100 + b"\r\n", b"a\r\n1" + b" " * 100 + b"\r\n"])
        read([b"0\r\n"])
        assert framing._sizes == {}


# In pieces or whole, remembered or new, and by h11: it is all the same.

PIECES = [
    b"\r\n", b"\n", b"\r", b"0", b"1", b"3", b"a", b"1\r\n", b"1\r\na\r\n", b"3\r\nabc\r\n", b"3;x=y\r\nabc\r\n", b"0\r\n", b"0\r\n\r\n", b"\r\n0",
    b";", b" ", b"\t", b"X: y\r\n", b"x", b"0x", b"\x00", b"\xff", b"ffffffffffffffff", b"a\r\n0123456789\r\n", b"X : y\r\n", b" z\r\n",
]  # fmt: skip
BODIES = st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=8).map(b"".join) | st.lists(
    st.binary(min_size=1, max_size=20), max_size=5
).map(lambda payloads: b"".join(map(chunk, payloads)) + LAST_CHUNK)


def read_by_h11(data: bytes) -> tuple[bytes, bytes, bool] | str:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    payload, ended = b"", False
    try:
        while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            payload += bytes(event.data) if isinstance(event, h11.Data) else b""
            ended = ended or isinstance(event, h11.EndOfMessage)
    except h11.RemoteProtocolError as error:
        return str(error)
    return payload, connection.trailing_data[0] if ended else b"", ended


def cuts_of(data: bytes, at: Sequence[int]) -> list[bytes]:
    return cut(data, *sorted(one % (len(data) + 1) for one in at))


@settings(derandomize=True, database=None, deadline=None, max_examples=600)
@given(BODIES, st.lists(st.integers(0, 1000), max_size=5), st.lists(st.integers(0, 1000), max_size=1))
def test_it_is_read_as_h11_reads_it(data: bytes, at: list[int], changed: list[int]) -> None:
    for where in changed:
        data = data[: where % (len(data) + 1)] + b"\n" + data[where % (len(data) + 1) + 1 :]
    framing._sizes.clear()
    first = read([data])
    assert read([data]) == first, "with the sizes known"
    assert read(cuts_of(data, at)) == first
    if not isinstance(first, str):
        assert read_by_h11(data) == first


@pytest.mark.parametrize(
    ("method", "head", "kind", "ended"),
    [
        ("POST", b"200 OK\r\nContent-Length: 3", Counted, False),
        ("POST", b"200 OK\r\nContent-Length: 0", Counted, True),
        ("POST", b"200 OK\r\nTransfer-Encoding: chunked", Chunked, False),
        ("POST", b"200 OK", UntilClose, False),
        ("GET", b"500 No", UntilClose, False),
        ("HEAD", b"200 OK\r\nContent-Length: 3", Counted, True),
        ("HEAD", b"200 OK\r\nTransfer-Encoding: chunked", Counted, True),
        ("HEAD", b"200 OK", Counted, True),
        ("POST", b"204 No Content", Counted, True),
        ("GET", b"304 Not Modified\r\nContent-Length: 3", Counted, True),
        ("GET", b"101 Switching Protocols", UntilClose, False),
    ],
)
def test_how_the_body_of_an_answer_ends(method: str, head: bytes, kind: type, ended: bool) -> None:
    body = framing_of(parse_response(b"HTTP/1.1 " + head), method)
    assert (type(body), body.ended) == (kind, ended)
