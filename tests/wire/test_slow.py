"""Clients that take their time: with a head, with a body, with reading. The clock is moved, nobody waits for it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wire.cases import BODY, SMUGGLED, said
from tests.wire.client import Client, get, post, request
from tests.wire.engine import OK, Asked, echo, ok, plain
from tests.wire.stack import MAX_BODY, Wire, play, turns, until

HEAD_SECS, BODY_SECS, SEND_SECS = 30.0, 40.0, 120.0
LIMITS = {"head_timeout_secs": HEAD_SECS, "body_timeout_secs": BODY_SECS, "send_timeout_secs": SEND_SECS}

HEAD = post(BODY).partition(BODY)[0]
CHUNKED = request("POST /v1/x?model=a HTTP/1.1", "Host: h", "Transfer-Encoding: chunked")


async def timed_out(wire: Wire, client: Client, code: str) -> None:
    answer = await client.answer()
    assert answer is not None
    assert said(answer) == f"408 {code}"
    assert await client.rest() == b""
    assert wire.engine.received == 0


@pytest.mark.parametrize(
    "opening", [b"P", b"POST /v1/x", HEAD[:40], HEAD[:-1], HEAD[:-2], HEAD[:-3], b"\r\n\r\n", b"\r\n\r\nP", b"\r\n\r"]
)
def test_a_head_that_stops(opening: bytes, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(opening)
        await turns()
        await wire.after(HEAD_SECS - 2.0)
        assert not client.reader.at_eof()
        await wire.after(4.0)
        if opening.strip():
            await timed_out(wire, client, "head_timeout")
        else:
            # Blank lines are what follows a request, or nothing.
            got = await client.rest()
            assert got == b"" or b"head_timeout" in got

    play(tmp_path, scenario, ok, limits=LIMITS)


def test_a_head_that_comes_byte_by_byte_gains_no_time(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        passed = 0.0
        for byte in post(BODY, "X: " + "y" * 100):
            if client.reader.at_eof() or client.reader._buffer:  # type: ignore[attr-defined]
                break
            await client.send(bytes([byte]))
            await wire.after(1.0)
            passed += 1.0
        # A second more for every 500 bytes, and the turn in which it is noticed.
        assert HEAD_SECS <= passed <= HEAD_SECS + 2.0
        await timed_out(wire, client, "head_timeout")

    play(tmp_path, scenario, ok, limits=LIMITS)


def test_a_large_head_that_comes_fast_enough_has_the_time_it_needs(tmp_path: Path) -> None:
    """1000 bytes a second, for a minute."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        sent = post(BODY, "X: " + "y" * 60_000)
        for at in range(0, len(sent), 1000):
            await client.send(sent[at : at + 1000])
            await wire.after(1.0)
        assert (await client.answer() or pytest.fail("closed")).status == 200

    play(tmp_path, scenario, ok, limits=LIMITS)


def test_a_client_that_says_nothing_is_not_kept(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await turns()
        await wire.after(3600.0)
        got = await client.rest()
        assert got == b"" or b"head_timeout" in got

    play(tmp_path, scenario, limits=LIMITS)


def test_the_second_head_has_a_time_of_its_own(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for _ in range(3):
            await wire.after(HEAD_SECS * 0.6)
            await client.send(HEAD[:20])
            await turns()
            await wire.after(HEAD_SECS * 0.6)
            await client.send(HEAD[20:] + BODY)
            assert (await client.answer() or pytest.fail("closed")).status == 200
        await client.send(HEAD[:20])
        await turns()
        await wire.after(HEAD_SECS + 1.0)
        answer = await client.answer()
        assert answer is not None
        assert said(answer) == "408 head_timeout"

    play(tmp_path, scenario, ok, limits=LIMITS)


def test_a_pipelined_head_that_stops_has_its_time_from_when_it_is_its_turn(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post(BODY) + HEAD[:30])
        asked = await wire.engine.next()
        await wire.after(1000.0)
        await asked.answer(OK)
        assert (await client.answer() or pytest.fail("closed")).status == 200
        await wire.after(HEAD_SECS - 5.0)
        await client.send(HEAD[30:] + BODY)
        await (await wire.engine.next()).answer(OK)
        assert (await client.answer() or pytest.fail("closed")).status == 200

    play(tmp_path, scenario, limits=LIMITS)


@pytest.mark.parametrize(
    "opening",
    [
        HEAD,
        HEAD + BODY[:1],
        HEAD + BODY[:-1],
        CHUNKED,
        CHUNKED + b"5",
        CHUNKED + b"5\r\n",
        CHUNKED + b"5\r\nabc",
        CHUNKED + b"5\r\nabcde",
        CHUNKED + b"5\r\nabcde\r\n",
        CHUNKED + b"0\r\n",
        CHUNKED + b"0\r\nX: y",
        CHUNKED + b"0\r\nX: y\r\n",
        CHUNKED + b"5;" + b"x" * 100,
    ],
    ids=range(13),
)
def test_a_body_that_stops(opening: bytes, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(opening)
        await turns()
        await wire.after(BODY_SECS - 2.0)
        assert not client.reader.at_eof()
        await wire.after(4.0)
        await timed_out(wire, client, "body_timeout")

    play(tmp_path, scenario, ok, limits=LIMITS)


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_that_comes_byte_by_byte_gains_no_time(framing: str, tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        if framing == "length":
            yield request("POST /v1/x?model=a HTTP/1.1", "Host: h", "Content-Length: 1000")
            yield from [b"x"] * 1000
        else:
            yield CHUNKED
            yield from [b"1\r\nx\r\n"] * 1000

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        passed = 0.0
        for piece in pieces():
            if client.reader._buffer or client.reader.at_eof():  # type: ignore[attr-defined]
                break
            await client.send(piece)
            await wire.after(1.0)
            passed += 1.0
        assert BODY_SECS <= passed <= BODY_SECS + 3.0
        await timed_out(wire, client, "body_timeout")

    play(tmp_path, scenario, ok, limits=LIMITS)


def test_a_large_body_that_comes_fast_enough_has_the_time_it_needs(tmp_path: Path) -> None:
    """1000 bytes a second, for five minutes."""
    body = b"x" * 300_000

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(request("POST /v1/x?model=a HTTP/1.1", "Host: h", f"Content-Length: {len(body)}"))
        for at in range(0, len(body), 2000):
            await client.send(body[at : at + 2000])
            await turns(5)
            await wire.after(2.0)
        answer = await client.answer()
        assert answer is not None
        assert answer.body == body

    play(tmp_path, scenario, echo, limits=LIMITS)


def test_nobody_hurries_a_client_that_waits_for_its_answer(tmp_path: Path) -> None:
    """In the queue, before the first byte, in mid-stream: hours may pass."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post())
        await until(lambda: wire.switcher.state.queued == 1, "it is queued")
        await wire.after(3600.0)
        assert wire.switcher.state.queued == 1
        wire.started("a")
        asked = await wire.engine.next()
        await wire.after(3600.0)
        await asked.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        assert (await client.bytes(15)).startswith(b"HTTP/1.1 200")
        await wire.after(3600.0)
        await asked.answer(b"3\r\ndef\r\n0\r\n\r\n")
        await client.until(b"3\r\ndef\r\n0\r\n\r\n")

    play(tmp_path, scenario, holds=("a",), limits=LIMITS)


@pytest.mark.parametrize("size", [MAX_BODY - 1, MAX_BODY])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_of_almost_the_largest_size(size: int, framing: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(_large(size, framing))
        answer = await client.answer()
        assert answer is not None
        assert len(answer.body) == size

    play(tmp_path, scenario, echo)


def _large(size: int, framing: str) -> bytes:
    if framing == "length":
        return request("POST /v1/x?model=a HTTP/1.1", "Host: h", f"Content-Length: {size}", body=bytes(size))
    whole, rest = divmod(size, 10_000)
    pieces = b"2710\r\n%b\r\n" % bytes(10_000) * whole + (b"%x\r\n%b\r\n" % (rest, bytes(rest)) if rest else b"")
    return CHUNKED + pieces + b"0\r\n\r\n"


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("size", [MAX_BODY + 1, 3 * MAX_BODY])
def test_a_body_too_large_is_refused_so_that_its_client_hears_of_it(size: int, framing: str, tmp_path: Path) -> None:
    """Also by one that writes everything before it reads: what it sends is taken for a while, and thrown away."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(_large(size, framing) + SMUGGLED)
        answer = await client.answer()
        assert answer is not None
        assert said(answer) == "413 body_too_large"
        assert answer.get("connection") == "close"
        await client.rest()
        assert not client.was_reset
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok)


@pytest.mark.parametrize(
    "sent",
    [get("/sleep", "Content-Length: 1000000", method="POST"), get("/health", "Content-Length: -1"), b"BAD\r\n\r\n"],
)
def test_a_client_that_goes_on_sending_after_its_refusal_is_not_heard_for_ever(sent: bytes, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(sent)
        answer = await client.answer()
        assert answer is not None
        for _ in range(20):
            await client.send(b"x" * 1000)
            await wire.after(10.0)
        await client.rest()
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok)


# Clients that do not read


async def stalled(wire: Wire) -> tuple[Client, Asked]:
    """A client that has asked and reads nothing, and its request at the engine."""
    assert wire.site is not None
    client = await Client.connect(wire.site.port, receive_bytes=4096)
    wire.clients.append(client)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await client.send(post())
    return client, await wire.engine.next()


async def stuffed(asked: Asked, head: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 268435456\r\n\r\n") -> int:
    """Send until nothing more is taken; how much was."""
    connected: socket.socket = asked.writer.get_extra_info("socket")
    asked.writer.write(head)
    asked.writer.transport.set_write_buffer_limits(0)
    sent, idle = 0, 0
    while idle < 20:
        if asked.writer.transport.get_write_buffer_size():
            idle += 1
            await asyncio.sleep(0.001)
        else:
            idle = 0
            asked.writer.write(bytes(65536))
            sent += 65536
            await asyncio.sleep(0)
        assert sent < 1 << 27, "there is no end to what is taken"
    assert connected.fileno() >= 0
    return sent


def test_a_client_that_reads_nothing_stops_its_engine(tmp_path: Path) -> None:
    """What is between them is the kernel's buffers and a little more."""

    async def scenario(wire: Wire) -> None:
        client, asked = await stalled(wire)
        sent = await stuffed(asked)
        assert sent < 8 << 20
        client.reset()
        await asked.gone()

    play(tmp_path, scenario)


def test_a_client_that_reads_again_gets_all_of_it(tmp_path: Path) -> None:
    body = bytes(range(256)) * 65536

    async def scenario(wire: Wire) -> None:
        client, asked = await stalled(wire)
        answering = asyncio.ensure_future(asked.answer(plain(body)))
        await wire.after(SEND_SECS / 2)
        assert not answering.done()
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await client.answer()
        assert answer is not None
        assert answer.body == body
        await answering

    play(tmp_path, scenario, limits=LIMITS)


def test_a_client_that_reads_nothing_for_too_long_is_cut_off(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        _client, asked = await stalled(wire)
        await stuffed(asked)
        await wire.after(SEND_SECS / 2)
        assert wire.tickets() == 1
        await wire.after(SEND_SECS / 2 + 2.0)
        await asked.gone()
        await until(lambda: not wire.tickets(), "its request has ended")

    play(tmp_path, scenario, limits=LIMITS)


def test_one_that_reads_now_and_then_is_not(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client, asked = await stalled(wire)
        asked.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 268435456\r\n\r\n" + bytes(24 << 20))
        transport = client.writer.transport
        for _ in range(4):
            await turns(200)
            await wire.after(SEND_SECS * 0.8)
            assert wire.tickets() == 1
            transport.resume_reading()  # type: ignore[attr-defined]
            await client.bytes(2 << 20)
            transport.pause_reading()  # type: ignore[attr-defined]
        client.reset()
        await asked.gone()

    play(tmp_path, scenario, limits=LIMITS)


def test_a_client_that_reads_nothing_holds_up_nobody_else(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        slow, asked = await stalled(wire)
        await stuffed(asked)
        other = await wire.connect()
        for _ in range(3):
            await other.send(post())
            await (await wire.engine.next()).answer(OK)
            assert (await other.answer() or pytest.fail("closed")).status == 200
        slow.reset()
        await asked.gone()

    play(tmp_path, scenario)


def test_a_client_that_never_reads_its_answers_but_goes_on_asking(tmp_path: Path) -> None:
    """Its requests wait in its own buffers, not in the proxy's."""

    async def scenario(wire: Wire) -> None:
        assert wire.site is not None
        client = await Client.connect(wire.site.port, receive_bytes=4096)
        wire.clients.append(client)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.write(get("/v1/models") * 600_000)
        transport = client.writer.transport
        unsent, same = -1, 0
        while same < 20:
            await asyncio.sleep(0.002)
            same = same + 1 if unsent == transport.get_write_buffer_size() else 0
            unsent = transport.get_write_buffer_size()
        assert unsent > 0
        client.reset()

    play(tmp_path, scenario)
