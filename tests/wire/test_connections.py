"""What a connection is good for: several requests in order, one at a time or at once, and when it ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.wire.cases import BODY, SMUGGLED, Case, check, said, table
from tests.wire.client import Answer, Client, get, post, request
from tests.wire.engine import answering, echo, ok, plain
from tests.wire.stack import MAX_BODY, Wire, play


def numbered(n: int, *headers: str) -> bytes:
    """A request that is told from others by its body."""
    return post(b'{"model": "a", "n": %d}' % n, *headers)


def body(n: int) -> bytes:
    return b'{"model": "a", "n": %d}' % n


def chunked(n: int) -> bytes:
    """The same in chunks."""
    whole = body(n)
    framed = b"4\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (whole[:4], len(whole) - 4, whole[4:])
    return request("POST /v1/completions HTTP/1.1", "Host: h", "Transfer-Encoding: chunked", body=framed)


async def whole(client: Client, method: str = "POST") -> Answer:
    answer = await client.answer(method)
    assert answer is not None
    assert answer.complete
    return answer


# Several at once


@pytest.mark.parametrize("pieces", ["one", "each", "bytes"])
def test_answers_come_in_the_order_of_their_requests(pieces: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        requests = [(chunked if n % 3 == 2 else numbered)(n) for n in range(9)]
        if pieces == "one":
            await client.send(b"".join(requests))
        elif pieces == "each":
            await client.send(*requests)
        else:
            await client.send(*(bytes([byte]) for byte in b"".join(requests)))
        for n in range(9):
            assert (await whole(client)).body == body(n)
        assert wire.engine.bodies == [body(n) for n in range(9)]

    play(tmp_path, scenario, echo)


def test_they_may_be_split_anywhere(tmp_path: Path) -> None:
    bare = get("/v1/responses/r1?model=a", version="1.0").replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n")
    sent = chunked(1) + b"\r\n" + bare + get("/health")

    async def scenario(wire: Wire) -> None:
        for at in range(1, len(sent)):
            client = await wire.connect()
            await client.send(sent[:at])
            await asyncio.sleep(0)
            await client.send(sent[at:])
            assert [(await whole(client)).status for _ in range(3)] == [200, 200, 200], at
            client.close()
        assert wire.engine.bodies == [body(1), b""] * (len(sent) - 1)

    play(tmp_path, scenario, ok)


def test_one_is_served_at_a_time(tmp_path: Path) -> None:
    """The second does not reach the engine before the first is answered."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(numbered(0) + numbered(1))
        first = await wire.engine.next()
        await wire.after(0.0)
        assert len(wire.engine.asked) == 1
        await first.answer(plain(b"0"))
        second = await wire.engine.next()
        await second.answer(plain(b"1"))
        assert [(await whole(client)).body for _ in range(2)] == [b"0", b"1"]

    play(tmp_path, scenario)


def test_hundreds_at_once(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        sending = asyncio.ensure_future(client.send(b"".join(numbered(n) for n in range(300))))
        for n in range(300):
            assert (await whole(client)).body == body(n)
        await sending

    play(tmp_path, scenario, echo)


def test_what_is_not_served_yet_is_not_read_without_end(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(numbered(0))
        asked = await wire.engine.next()
        client.write(numbered(1) * 100_000)
        transport = client.writer.transport
        unsent = -1
        while unsent != (unsent := transport.get_write_buffer_size()):
            await wire.after(0.0)
        assert unsent > 0
        await asked.answer(plain(b"0"))
        assert (await whole(client)).body == b"0"
        client.reset()
        await (await wire.engine.next()).answer(plain(b"1"))

    play(tmp_path, scenario)


MIXED = [
    Case("a bad one in the middle", numbered(0) + b"BAD\r\n\r\n" + SMUGGLED, ("200", "400 bad_request"), (body(0),)),
    Case("a bad one at the beginning", b"BAD\r\n\r\n" + numbered(0), ("400 bad_request",)),
    Case("a bad length in the middle", numbered(0) + post(BODY, "Content-Length: 1") + SMUGGLED, ("200", "400 bad_request"), (body(0),)),
    Case("one that does not exist in the middle", numbered(0) + get("/x") + numbered(1), ("200", "404 unknown_url", "200"), (body(0), body(1)), open=True),
    Case("bad JSON in the middle", numbered(0) + post(b"{") + numbered(1), ("200", "400 invalid_json", "200"), (body(0), body(1)), open=True),
    Case("an unknown model in the middle", post(b'{"model": "z"}') + numbered(1), ("404 model_not_found", "200"), (body(1),), open=True),
    Case("blank lines between", numbered(0) + b"\r\n\r\n" + numbered(1) + b"\r\n", ("200", "200"), (body(0), body(1)), open=True),
    Case("behind one that closes", numbered(0, "Connection: close") + SMUGGLED, ("200",), (body(0),)),
    Case("behind one that closes, in capitals", numbered(0, "CONNECTION: CLOSE") + SMUGGLED, ("200",), (body(0),)),
    Case("behind one that closes, in a list", numbered(0, "Connection: keep-alive, close") + SMUGGLED, ("200",), (body(0),)),
    Case("behind one that closes, in two fields", numbered(0, "Connection: x", "Connection: close") + SMUGGLED, ("200",), (body(0),)),
    Case("behind one that keeps", numbered(0, "Connection: keep-alive") + numbered(1), ("200", "200"), (body(0), body(1)), open=True),
    Case("behind one with another option", numbered(0, "Connection: closed") + numbered(1), ("200", "200"), (body(0), body(1)), open=True),
    Case("behind an error that closes", get("/x", "Connection: close") + SMUGGLED, ("404 unknown_url",)),
    Case("behind HTTP/1.0", get("/health", version="1.0") + SMUGGLED, ("200",)),
    Case("behind HTTP/1.0 that closes", get("/health", "Connection: close", version="1.0") + SMUGGLED, ("200",)),
    Case("behind HTTP/1.0 that keeps", get("/health", "Connection: keep-alive", version="1.0") + numbered(1), ("200", "200"), (body(1),), open=True),
    Case("behind HTTP/1.0 that keeps, in capitals", get("/health", "Connection: Keep-Alive", version="1.0") + numbered(1), ("200", "200"), (body(1),), open=True),
    Case("behind HTTP/1.0 that keeps and closes", get("/health", "Connection: keep-alive, close", version="1.0") + SMUGGLED, ("200",)),
    Case("behind HTTP/1.0 with a Keep-Alive alone", get("/health", "Keep-Alive: timeout=5", version="1.0") + SMUGGLED, ("200",)),
    Case("behind a body too large", post(bytes(MAX_BODY + 1)) + SMUGGLED, ("413 body_too_large",)),
    Case("behind an expectation", numbered(0, "Expect: 200-ok") + SMUGGLED, ("417 expectation_failed",)),
]  # fmt: skip


@table(MIXED)
def test_requests_in_a_row(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


# When it stays


@pytest.mark.parametrize(
    ("version", "asked", "told"),
    [
        ("1.1", (), None),
        ("1.1", ("Connection: close",), "close"),
        ("1.0", (), "close"),
        ("1.0", ("Connection: keep-alive",), "keep-alive"),
    ],
)
@pytest.mark.parametrize("target", ["/health", "/x", "/v1/responses/r1?model=a"])
def test_the_answer_says_whether_the_connection_stays(
    version: str, asked: tuple[str, ...], told: str | None, target: str, tmp_path: Path
) -> None:
    """HTTP/1.0 has no other way to know; HTTP/1.1 need not be told that it stays."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(get(target, *asked, version=version))
        answer = await whole(client, "GET")
        given = (answer.get("connection") or "").lower()
        if told == "keep-alive":
            assert given == "keep-alive"
        elif told == "close":
            assert given in ("close", "") if version == "1.0" else given == "close"
        else:
            assert given in ("", "keep-alive")
        if told == "close":
            assert await client.rest() == b""
        else:
            await client.send(get("/health"))
            assert (await whole(client)).status == 200

    play(tmp_path, scenario, ok)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nX: y\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nabcde",
        b"HTTP/1.0 200 OK\r\n\r\nabcde",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde",
    ],
)
@pytest.mark.parametrize("keep", [True, False])
def test_http_1_0_gets_no_chunks(raw: bytes, keep: bool, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        lines = ["Connection: keep-alive"] if keep else []
        await client.send(get("/v1/x?model=a", *lines, version="1.0"))
        answer = await whole(client, "GET")
        assert answer.body == b"abcde"
        assert answer.get("transfer-encoding") is None
        if keep and answer.get("content-length") is not None:
            await client.send(get("/health"))
            assert (await whole(client)).status == 200
        else:
            assert (answer.get("connection") or "close") == "close"
            assert await client.rest() == b""

    play(tmp_path, scenario, answering(raw))


def test_a_connection_that_is_not_used_is_closed_some_time(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(get("/health"))
        await whole(client)
        await wire.after(10.0)
        await client.send(get("/health"))
        await whole(client)
        await wire.after(3600.0)
        assert await client.rest() == b""

    play(tmp_path, scenario)


def test_one_connection_too_many_is_told_so(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        first = [await wire.connect() for _ in range(3)]
        for client in first:
            await client.send(get("/health"))
            await whole(client)
        late = await wire.connect()
        await late.send(get("/health"))
        answer = await whole(late)
        assert said(answer) == "503 too_many_connections"
        assert await late.rest() == b""
        for client in (first[0], late):
            client.close()
            await client.writer.wait_closed()
        await wire.after(0.0)
        again = await wire.connect()
        await again.send(get("/health"))
        assert (await whole(again)).status == 200

    play(tmp_path, scenario, limits={"max_connections": 3})
