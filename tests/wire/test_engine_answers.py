"""What an engine may answer: what is no HTTP is never passed on, what is comes through whole, and nothing more."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from tests.wire.cases import BODY, said
from tests.wire.client import Answer, Client, get, post
from tests.wire.engine import OK, Asked, answering, chunked, first_then, plain
from tests.wire.stack import MAX_BODY, Wire, play, turns, until

POISON = plain(b"poison", "X-Poison: 1")
"""An answer that nobody has asked for."""


async def ask(wire: Wire, client: Client | None = None) -> Answer:
    """Ask on this connection or a new one; the whole answer."""
    client = client or await wire.connect()
    await client.send(post(BODY))
    answer = await client.answer()
    assert answer is not None
    return answer


def head(*lines: str, first: str = "HTTP/1.1 200 OK", body: bytes = b"ok") -> bytes:
    return "\r\n".join([first, *lines, "", ""]).encode("latin-1") + body


NO_ANSWERS = {
    "nothing": b"",
    "a line break": b"\r\n",
    "garbage": b"\x00\x01\x02garbage\r\n\r\n",
    "text": b"Internal Server Error\r\n\r\n",
    "a request": get("/sleep"),
    "TLS": b"\x15\x03\x01\x00\x02\x02\x46",
    "half a status line": b"HTTP/1.1 20",
    "a status line": b"HTTP/1.1 200 OK\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n",
    "no version": head(first="200 OK"),
    "HTTP/2": head(first="HTTP/2 200 OK"),
    "HTTP/2.0": head(first="HTTP/2.0 200 OK"),
    "HTTP/0.9": head(first="HTTP/0.9 200 OK"),
    "HTTP in lower case": head(first="http/1.1 200 OK"),
    "another protocol": head(first="ICY 200 OK"),
    "a space before": head(first=" HTTP/1.1 200 OK"),
    "no status": head(first="HTTP/1.1 OK"),
    "a status of two digits": head(first="HTTP/1.1 20 OK"),
    "a status of four digits": head(first="HTTP/1.1 2000 OK"),
    "a status below 100": head(first="HTTP/1.1 099 OK"),
    "a negative status": head(first="HTTP/1.1 -200 OK"),
    "a status with a plus": head(first="HTTP/1.1 +200 OK"),
    "a status in hexadecimal": head(first="HTTP/1.1 0xc8 OK"),
    "a control character in the reason": head(first="HTTP/1.1 200 O\x07K"),
    "a NUL in the reason": head(first="HTTP/1.1 200 O\x00K"),
    "a bare CR in the reason": head(first="HTTP/1.1 200 O\rK"),
    "a name with a space": head("X Y: z"),
    "a space before a colon": head("X : y"),
    "an empty name": head(": y"),
    "no colon": head("Content-Length"),
    "a fold": head("X: y", " z"),
    "a fold in the first line": head(" X: y"),
    "a NUL in a value": head("X: \x00"),
    "a bare CR in a value": head("X: y\rX-Poison: 1"),
    "a bare LF in a value": head("X: y\nX-Poison: 1"),
    "bare LF everywhere": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    "no number for a length": head("Content-Length: ok"),
    "a negative length": head("Content-Length: -2"),
    "a length with a plus": head("Content-Length: +2"),
    "an empty length": head("Content-Length:"),
    "a length in hexadecimal": head("Content-Length: 0x2"),
    "two lengths": head("Content-Length: 2", "Content-Length: 3"),
    "a list of lengths": head("Content-Length: 2, 3"),
    "a length and chunks": head("Content-Length: 2", "Transfer-Encoding: chunked", body=b"2\r\nok\r\n0\r\n\r\n"),
    "an unknown coding": head("Transfer-Encoding: gzip"),
    "a coding and chunks": head("Transfer-Encoding: gzip, chunked", body=b"2\r\nok\r\n0\r\n\r\n"),
    "an obscure coding": head("Transfer-Encoding: xchunked", body=b"2\r\nok\r\n0\r\n\r\n"),
    "chunks in HTTP/1.0": head("Transfer-Encoding: chunked", first="HTTP/1.0 200 OK", body=b"2\r\nok\r\n0\r\n\r\n"),
    "no size of the first chunk": head("Transfer-Encoding: chunked", body=b"zz\r\nok\r\n0\r\n\r\n"),
    "a negative size of the first chunk": head("Transfer-Encoding: chunked", body=b"-2\r\nok\r\n0\r\n\r\n"),
    "a size with a prefix": head("Transfer-Encoding: chunked", body=b"0x2\r\nok\r\n0\r\n\r\n"),
    "a size without an end": head("Transfer-Encoding: chunked", body=b"2" * 100_000),
    "LF after the size of the first chunk": head("Transfer-Encoding: chunked", body=b"2\nok\r\n0\r\n\r\n"),
    "a head of a megabyte": head("X: " + "y" * (1 << 20)),
    "a head without an end": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200_000,
    "a line without an end": b"HTTP/1.1 200 " + b"O" * (1 << 20),
    "thousands of fields": head(*["X: y"] * 5000),
    "another protocol, unasked": head("Upgrade: x", "Connection: Upgrade", first="HTTP/1.1 101 Switching Protocols"),
    "only a 100": b"HTTP/1.1 100 Continue\r\n\r\n",
    "only a 103": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
    "a 100 and half a head": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 O",
    "a head and no body": head("Content-Length: 2", body=b""),
    "a head and no chunk": head("Transfer-Encoding: chunked", body=b""),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_ANSWERS)
def test_no_answer_is_asked_for_once_more_unseen(kind: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post(BODY))
        await wire.revive_when_bounced()
        answer = await client.answer()
        assert answer is not None
        assert (answer.status, answer.body) == (200, b'{"ok": true}')
        assert wire.bounced() == 1
        assert wire.engine.bodies == [BODY, BODY]
        assert (await ask(wire, client)).status == 200

    play(tmp_path, scenario, first_then(NO_ANSWERS[kind]))


@pytest.mark.parametrize("kind", ["nothing", "garbage", "half a head", "a list of lengths", "a head and no body"])
def test_but_only_once(kind: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post(BODY) + get("/health"))
        await wire.revive_when_bounced()
        answer = await client.answer()
        assert answer is not None
        assert said(answer) == "502 engine_died"
        assert len(wire.engine.asked) == 2
        assert (await client.answer() or answer).status == 200

    play(tmp_path, scenario, answering(NO_ANSWERS[kind]))


@pytest.mark.parametrize("kind", ["garbage", "no status", "a bare LF in a value", "two lengths", "an unknown coding"])
def test_what_is_no_answer_need_not_end(kind: str, tmp_path: Path) -> None:
    """It is known for what it is before its engine closes the connection, if it ever does."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post(BODY))
        await wire.revive_when_bounced()
        answer = await client.answer()
        assert answer is not None
        assert answer.status == 200
        await wire.engine.asked[0].gone()

    play(tmp_path, scenario, first_then(NO_ANSWERS[kind] + b"\r\n\r\n", keep=True))


ANSWERS = {
    "a length": (head("Content-Length: 2"), b"ok"),
    "an empty body": (head("Content-Length: 0", body=b""), b""),
    "a length with blanks": (head("Content-Length:  2 "), b"ok"),
    "no reason": (head("Content-Length: 2", first="HTTP/1.1 200 "), b"ok"),
    "no reason and no space": (head("Content-Length: 2", first="HTTP/1.1 200"), b"ok"),
    "a long reason": (head("Content-Length: 2", first="HTTP/1.1 200 " + "O" * 1000), b"ok"),
    "a reason in Latin-1": (head("Content-Length: 2", first="HTTP/1.1 200 gr\xfcn"), b"ok"),
    "a tab in the reason": (head("Content-Length: 2", first="HTTP/1.1 200 a\tb"), b"ok"),
    "a value in Latin-1": (head("Content-Length: 2", "X: gr\xfcn"), b"ok"),
    "an empty value": (head("Content-Length: 2", "X:"), b"ok"),
    "names in capitals": (head("CONTENT-LENGTH: 2"), b"ok"),
    "80 fields": (head("Content-Length: 2", *[f"X-{n}: y" for n in range(80)]), b"ok"),
    "a large field": (head("Content-Length: 2", "X: " + "y" * 10_000), b"ok"),
    "chunks": (head("Transfer-Encoding: chunked", body=b"1\r\no\r\n1\r\nk\r\n0\r\n\r\n"), b"ok"),
    "chunks in capitals": (head("TRANSFER-ENCODING: Chunked", body=b"2\r\nok\r\n0\r\n\r\n"), b"ok"),
    "chunks with extensions": (head("Transfer-Encoding: chunked", body=b'2;x="y"\r\nok\r\n0;z\r\n\r\n'), b"ok"),
    "chunks with zeros": (head("Transfer-Encoding: chunked", body=b"0002\r\nok\r\n000\r\n\r\n"), b"ok"),
    "chunks of hexadecimal sizes": (head("Transfer-Encoding: chunked", body=b"1A\r\n" + b"k" * 26 + b"\r\n0\r\n\r\n"), b"k" * 26),
    "chunks and none": (head("Transfer-Encoding: chunked", body=b"0\r\n\r\n"), b""),
    "no length": (head(body=b"ok"), b"ok"),
    "no length and no body": (head(body=b""), b""),
    "HTTP/1.0": (head("Content-Length: 2", first="HTTP/1.0 200 OK"), b"ok"),
    "HTTP/1.0 without a length": (head(first="HTTP/1.0 200 OK"), b"ok"),
    "HTTP/1.0 that keeps": (head("Content-Length: 2", "Connection: keep-alive", first="HTTP/1.0 200 OK"), b"ok"),
    "that closes": (head("Content-Length: 2", "Connection: close"), b"ok"),
    "behind a 100": (b"HTTP/1.1 100 Continue\r\n\r\n" + head("Content-Length: 2"), b"ok"),
    "behind a 102": (b"HTTP/1.1 102 Processing\r\n\r\n" * 5 + head("Content-Length: 2"), b"ok"),
    "behind a 103": (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + head("Content-Length: 2"), b"ok"),
    "behind a 103 with a length": (b"HTTP/1.1 103 x\r\nContent-Length: 9\r\n\r\n" + head("Content-Length: 2"), b"ok"),
    "a NUL in the body": (head("Content-Length: 3", body=b"\x00\r\n"), b"\x00\r\n"),
    "an answer in the body": (head(f"Content-Length: {len(POISON)}", body=POISON), POISON),
}  # fmt: skip


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_comes_through_whole(kind: str, tmp_path: Path) -> None:
    raw, body = ANSWERS[kind]

    async def scenario(wire: Wire) -> None:
        for _ in range(2):
            answer = await ask(wire)
            assert (answer.status, answer.body, answer.complete, answer.informed) == (200, body, True, [])
        assert wire.bounced() == 0
        assert len(wire.engine.asked) == 2

    play(tmp_path, scenario, answering(raw))


@pytest.mark.parametrize("kind", ANSWERS)
def test_in_whatever_pieces_it_comes(kind: str, tmp_path: Path) -> None:
    raw, body = ANSWERS[kind]
    cuts = range(1, len(raw), 1 + len(raw) // 300)
    at = iter(cuts)

    async def script(asked: Asked) -> None:
        cut = next(at)
        await asked.send(raw[:cut])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asked.answer(raw[cut:], keep=False)

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for cut in cuts:
            answer = await ask(wire, client)
            assert (answer.status, answer.body, answer.complete) == (200, body, True), cut
            if answer.get("connection") == "close":
                client = await wire.connect()
        assert wire.bounced() == 0

    play(tmp_path, scenario, script)


def test_byte_by_byte(tmp_path: Path) -> None:
    raw = chunked(b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n")

    async def script(asked: Asked) -> None:
        for byte in raw:
            await asked.send(bytes([byte]))
            await asyncio.sleep(0)
        asked.answered.set()

    async def scenario(wire: Wire) -> None:
        answer = await ask(wire)
        assert (answer.body, answer.complete) == (b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n", True)

    play(tmp_path, scenario, script)


BODILESS = {
    "204": head(first="HTTP/1.1 204 No Content", body=b""),
    "204 with a length": head("Content-Length: 0", first="HTTP/1.1 204 No Content", body=b""),
    "204 with a body": head("Content-Length: 2", first="HTTP/1.1 204 No Content"),
    "204 with chunks": head(
        "Transfer-Encoding: chunked", first="HTTP/1.1 204 No Content", body=b"2\r\nok\r\n0\r\n\r\n"
    ),
    "204 with another answer": head(first="HTTP/1.1 204 No Content", body=POISON),
    "304": head(first="HTTP/1.1 304 Not Modified", body=b""),
    "304 with a length": head("Content-Length: 200", first="HTTP/1.1 304 Not Modified", body=b""),
    "304 with a body": head("Content-Length: 2", first="HTTP/1.1 304 Not Modified"),
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", BODILESS)
def test_what_has_no_body_is_given_none(kind: str, keep: bool, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for _ in range(3):
            answer = await ask(wire, client)
            assert (answer.status, answer.body, answer.complete) == (int(kind[:3]), b"", True)
        await client.send(get("/health"))
        assert (await client.answer() or answer).status == 200

    play(tmp_path, scenario, answering(BODILESS[kind], keep=keep))


SPLIT = [
    head("Content-Length: 2", body=b"ok" + POISON),
    head("Content-Length: 2", body=b"ok" + b"garbage"),
    head("Content-Length: 0", body=POISON),
    head("Transfer-Encoding: chunked", body=b"2\r\nok\r\n0\r\n\r\n" + POISON),
    head("Transfer-Encoding: chunked", body=b"2\r\nok\r\n0\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    head(first="HTTP/1.1 204 No Content", body=POISON),
]


@pytest.mark.parametrize("raw", SPLIT, ids=range(len(SPLIT)))
@pytest.mark.parametrize("later", [False, True])
def test_what_comes_behind_an_answer_is_nobodys(raw: bytes, later: bool, tmp_path: Path) -> None:
    """Neither at once nor later, neither to the same client nor to another one."""
    all_sent = asyncio.Event()

    async def script(asked: Asked) -> None:
        if all_sent.is_set():
            await asked.answer(plain(asked.body))
            return
        cut = raw.index(POISON) if POISON in raw and later else len(raw)
        await asked.send(raw[:cut])
        await turns(10)
        try:
            await asked.answer(raw[cut:])
        except ConnectionError:
            asked.answered.set()
        all_sent.set()

    async def scenario(wire: Wire) -> None:
        client, other = await wire.connect(), await wire.connect()
        first = await ask(wire, client)
        assert first.complete
        assert first.body in (b"ok", b"")
        await all_sent.wait()
        for one in (client, other, client, other):
            assert (await ask(wire, one)).body == BODY
        assert wire.bounced() == 0

    play(tmp_path, scenario, script)


@pytest.mark.parametrize("order", ["the engine first", "the client first"])
@pytest.mark.parametrize("what", ["speaks", "closes"])
def test_an_idle_connection_is_looked_at_before_it_is_used_again(what: str, order: str, tmp_path: Path) -> None:
    """Both in one turn of the proxy's loop: what has come over it by then is no answer, and its end no death."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for _ in range(3):
            await client.send(post(BODY))
            asked = await wire.engine.next()
            await asked.answer(OK)
            assert (await client.answer() or pytest.fail("closed")).body == b'{"ok": true}'
            connected = asked.writer.get_extra_info("socket")
            await wire.after(0.01)
            if order == "the client first":
                client.write(post(BODY))
            if connected.fileno() >= 0:
                asked.writer.write(POISON) if what == "speaks" else connected.shutdown(socket.SHUT_RDWR)
            if order == "the engine first":
                client.write(post(BODY))
            answering = asyncio.ensure_future(wire.engine.next())
            await until(lambda: answering.done() or wire.bounced(), "it is asked")  # noqa: B023
            assert wire.bounced() == 0
            await (await answering).answer(plain(b"its own"))
            assert (await client.answer() or pytest.fail("closed")).body == b"its own"

    play(tmp_path, scenario)


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize(
    "raw", [OK.replace(b"\r\n", b"\r\nConnection: close\r\n", 1), OK.replace(b"1.1", b"1.0", 1)], ids=["said", "1.0"]
)
def test_an_engine_that_closes_its_connection_behind_each_answer(raw: bytes, pipelined: bool, tmp_path: Path) -> None:
    """No request is sent on one that is going to be closed: every one is served, once."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        requests = [post(b'{"model": "a", "n": %d}' % n) for n in range(30)]
        if pipelined:
            await client.send(b"".join(requests))
        for one in requests:
            if not pipelined:
                await client.send(one)
            answer = await client.answer()
            assert answer is not None
            assert answer.status == 200
        assert len(set(wire.engine.bodies)) == len(wire.engine.bodies) == 30
        assert wire.bounced() == 0

    play(tmp_path, scenario, answering(raw, keep=False))


@pytest.mark.parametrize("then", ["closes", "resets", "goes on"])
@pytest.mark.parametrize("status", ["413 Content Too Large", "200 OK"])
def test_an_engine_that_answers_before_it_has_read_the_body(status: str, then: str, tmp_path: Path) -> None:
    """Its answer counts, even where the rest of the request cannot be sent any more."""

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(plain(b"early", status=status))
        await writer.drain()
        if then == "goes on":
            while await reader.read(1 << 16):
                pass
        else:
            await turns(10)
            if then == "resets":
                writer.transport.abort()
        writer.close()

    async def scenario(wire: Wire) -> None:
        wire.engine.raw = early
        for _ in range(2):
            client = await wire.connect()
            await client.send(post(BODY + b" " * (MAX_BODY - 20)))
            answer = await client.answer()
            assert answer is not None
            assert (answer.status, answer.body, answer.complete) == (int(status[:3]), b"early", True)
        assert wire.bounced() == 0

    play(tmp_path, scenario)


def test_what_an_engine_says_of_its_own_connection_is_not_passed_on(tmp_path: Path) -> None:
    lines = [
        "Connection: X-Hop, close",
        "X-Hop: 1",
        "Keep-Alive: timeout=5",
        "Proxy-Connection: close",
        "Proxy-Authenticate: Basic",
        "TE: trailers",
        "Trailer: X",
        "Upgrade: h2c",
        "x-request-id: theirs",
        "X-Kept: yes",
    ]

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for _ in range(2):
            answer = await ask(wire, client)
            names = {name for name, _ in answer.headers}
            gone = {"x-hop", "keep-alive", "proxy-connection", "proxy-authenticate", "te", "trailer", "upgrade"}
            assert not names & gone
            assert answer.get("x-kept") == "yes"
            assert answer.get("x-request-id") not in (None, "theirs")

    play(tmp_path, scenario, answering(plain(b"ok", *lines)))


def test_an_error_of_the_engine_is_its_own(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for status in (400, 404, 422, 429, 500, 503):
            await client.send(post(BODY))
            asked = await wire.engine.next()
            body = b'{"error": {"message": "theirs", "code": %d}}' % status
            await asked.answer(plain(body, status=f"{status} Theirs"))
            answer = await client.answer()
            assert answer is not None
            assert (answer.status, answer.body) == (status, body)
        await until(wire.idle, "all have ended")

    play(tmp_path, scenario)
