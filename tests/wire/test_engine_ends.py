"""Engines that end at every byte of an answer, or stop there: a client is never told that a part is the whole."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.wire.cases import BODY
from tests.wire.client import Answer, Client, get, post
from tests.wire.engine import OK, Asked, chunked, plain
from tests.wire.stack import Wire, play, turns, until

STREAM = b'{"model": "a", "stream": true}'
EVENTS = (b"data: 1\n\n", b"data: 2\n\ndata: 3\n", b"\ndata: [DONE]\n\n")
DEAD = b'data: {"error": {"message": "EngineCore encountered an issue. See stack trace.", "code": 500}}\n\n'

OPENAI = ["/v1/completions", "/v1/chat/completions", "/v1/responses"]
ANTHROPIC = ["/v1/messages"]

LENGTH = plain(b"some words", "Content-Type: text/plain")
CHUNKS = chunked(b"some", b" words", content_type="text/plain")
STREAMED = chunked(*EVENTS)
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nsome words"


def first_byte(raw: bytes) -> int:
    """Up to where there is nothing of the body."""
    begin = raw.index(b"\r\n\r\n") + 4
    return raw.index(b"\r\n", begin) + 2 if b"chunked" in raw else begin


def events_of(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    """The events with JSON objects, with their names."""
    found = []
    for event in body.replace(b"\r\n", b"\n").split(b"\n\n"):
        fields = dict(line.split(b": ", 1) for line in event.split(b"\n") if b": " in line)
        if fields.get(b"data", b"").startswith(b"{"):
            found.append((fields.get(b"event", b"").decode(), json.loads(fields[b"data"])))
    return found


async def answer_to(client: Client) -> Answer:
    answer = await client.answer()
    assert answer is not None
    return answer


async def dies_after(wire: Wire, raw: bytes, at: int, sent: bytes, die: str) -> Client:
    """A client whose engine goes when so much of the answer is sent."""
    client = await wire.connect()
    await client.send(sent)
    asked = await wire.engine.next()
    await asked.send(raw[:at])
    await turns(at % 5)
    if die == "kill":
        asked.die()
    else:
        await asked.answer(b"", keep=False)
    return client


DYING = pytest.mark.parametrize("die", ["close", "kill"])


@DYING
@pytest.mark.parametrize(
    "raw", [LENGTH, CHUNKS, STREAMED, UNTIL_CLOSE], ids=["length", "chunks", "events", "until close"]
)
def test_before_the_first_byte_of_the_body_it_is_asked_once_more(raw: bytes, die: str, tmp_path: Path) -> None:
    begin = raw.index(b"\r\n\r\n") + 4
    # Without a length, an empty body is as good as any.
    last = begin - 1 if raw is UNTIL_CLOSE else begin

    async def scenario(wire: Wire) -> None:
        for count, at in enumerate(range(last + 1), 1):
            client = await dies_after(wire, raw, at, post(STREAM), die)
            await wire.revive_when_bounced(count)
            again = await wire.engine.next()
            assert again.body == STREAM
            await again.answer(raw, keep=raw is not UNTIL_CLOSE)
            answer = await answer_to(client)
            assert answer.complete
            assert answer.body in (b"some words", b"".join(EVENTS))
            client.close()
        assert len(wire.engine.asked) == 2 * (last + 1)

    play(tmp_path, scenario)


@DYING
@pytest.mark.parametrize("raw", [LENGTH, CHUNKS], ids=["length", "chunks"])
def test_in_the_middle_of_a_body_its_client_can_tell(raw: bytes, die: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        for at in range(first_byte(raw) + 1, len(raw)):
            client = await dies_after(wire, raw, at, post(BODY), die)
            answer = await answer_to(client)
            assert not answer.complete, at
            assert b"some words".startswith(answer.body)
            assert await client.rest() == b""
            client.close()
        assert wire.bounced() == 0
        await until(lambda: wire.idle() and not wire.tickets(), "all have ended")

    play(tmp_path, scenario)


def test_between_the_size_of_the_first_chunk_and_its_first_byte_either_will_do(tmp_path: Path) -> None:
    """Asked once more, or broken off: nothing of it is taken for an answer."""

    async def scenario(wire: Wire) -> None:
        for at in range(CHUNKS.index(b"\r\n\r\n") + 5, first_byte(CHUNKS) + 1):
            bounced = wire.bounced()
            client = await dies_after(wire, CHUNKS, at, post(BODY), "close")
            await until(lambda: wire.bounced() > bounced or not wire.tickets(), "it has come to an end")  # noqa: B023
            if wire.tickets():
                wire.revive()
                await (await wire.engine.next()).answer(OK)
                assert (await answer_to(client)).complete
            else:
                answer = await answer_to(client)
                assert (answer.body, answer.complete) == (b"", False)
            client.close()

    play(tmp_path, scenario)


async def dies_in_mid_stream(wire: Wire, rest: bytes, path: str, die: str) -> Answer:
    """What a client gets whose engine goes this much behind the first event."""
    client = await wire.connect()
    await client.send(post(STREAM, target=path))
    asked = await wire.engine.next()
    await asked.send(chunked(EVENTS[0], end=b""))
    got = await client.until(EVENTS[0] + b"\r\n")
    await asked.send(rest)
    await turns(len(rest) % 5)
    if die == "kill":
        asked.die()
    else:
        await asked.answer(b"", keep=False)
    client.put_back(got)
    answer = await answer_to(client)
    client.close()
    return answer


MIDDLE = STREAMED[len(chunked(EVENTS[0], end=b"")) : -len(b"0\r\n\r\n")]
BETWEEN_CHUNKS = (0, MIDDLE.index(b"\r\nf\r\n") + 2, len(MIDDLE))


@DYING
@pytest.mark.parametrize("path", [*OPENAI, *ANTHROPIC])
def test_between_the_chunks_of_a_stream_it_is_told_in_an_event(path: str, die: str, tmp_path: Path) -> None:
    """In that API's form, and set off from an event that is not whole."""

    async def scenario(wire: Wire) -> None:
        for at in BETWEEN_CHUNKS:
            assert_told(await dies_in_mid_stream(wire, MIDDLE[:at], path, die), path)
        assert wire.bounced() == 0

    play(tmp_path, scenario)


@DYING
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_in_every_byte_of_the_chunks_of_a_stream_it_is_told_in_an_event(path: str, die: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        for at in range(len(MIDDLE) + 1):
            assert_told(await dies_in_mid_stream(wire, MIDDLE[:at], path, die), path)
        assert wire.bounced() == 0

    play(tmp_path, scenario)


@DYING
def test_in_the_end_of_a_stream_it_is_still_not_the_end(die: str, tmp_path: Path) -> None:
    """When the last chunk has begun there is no place for an event."""

    async def scenario(wire: Wire) -> None:
        for at in range(len(b"0\r\n\r\n")):
            answer = await dies_in_mid_stream(wire, MIDDLE + b"0\r\n\r\n"[:at], "/v1/completions", die)
            assert not answer.complete
            assert answer.body.startswith(b"".join(EVENTS))

    play(tmp_path, scenario)


def assert_told(answer: Answer, path: str) -> None:
    """The engine's events as far as they came, then one that says what happened, and no end."""
    assert (answer.status, answer.complete) == (200, False)
    told = events_of(answer.body)
    assert len(told) == 1, answer.body
    assert_error(path, *told[0])
    begin = b"event: error" if path in (*ANTHROPIC, "/v1/responses") else b'data: {"error"'
    before = answer.body[: answer.body.rindex(begin)]
    assert b"".join(EVENTS).startswith(before.rstrip(b"\n"))
    assert before.endswith(b"\n\n")
    assert answer.body.endswith(b"\n\n")


def assert_error(path: str, name: str, event: dict[str, Any]) -> None:
    if path in ANTHROPIC:
        assert name == "error"
        assert event["type"] == "error"
        assert set(event["error"]) >= {"type", "message"}
    elif path == "/v1/responses":
        assert (name, event["type"]) == ("error", "error")
        assert event["code"] == event["error"]["code"] == "engine_died"
    else:
        assert event["error"]["code"] == "engine_died"
        assert event["error"]["type"] == "server_error"


@DYING
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_a_stream_that_ends_with_its_connection(path: str, die: str, tmp_path: Path) -> None:
    """HTTP cannot tell whether it is complete: it ends, and no more is made of it than that."""
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + b"".join(EVENTS)

    async def scenario(wire: Wire) -> None:
        for at in range(len(raw) - 20, len(raw) + 1):
            client = await dies_after(wire, raw, at, post(STREAM, target=path), die)
            answer = await answer_to(client)
            assert answer.body.startswith(raw[raw.index(b"data: 1") : at])
            client.close()

    play(tmp_path, scenario)


@pytest.mark.parametrize("die", ["close", "kill"])
@pytest.mark.parametrize("keep", ["", "Connection: keep-alive"])
def test_a_client_of_http_1_0_can_tell_too(keep: str, die: str, tmp_path: Path) -> None:
    """By a reset: it has nothing else to tell an end by."""

    async def scenario(wire: Wire) -> None:
        for at in range(first_byte(CHUNKS) + 1, len(CHUNKS)):
            sent = get("/v1/x?model=a", *([keep] if keep else []), version="1.0")
            client = await dies_after(wire, CHUNKS, at, sent, die)
            answer = await answer_to(client)
            assert not answer.complete, at
            client.close()

    play(tmp_path, scenario)


BAD_CHUNKS = {
    "no size": b"zz\r\n",
    "a negative size": b"-1\r\n",
    "an empty size": b"\r\n",
    "a byte too many": b"5\r\nabcdeX\r\n",
    "no line break behind the data": b"5\r\nabcde0\r\n",
    "LF behind the data": b"5\r\nabcde\n0\r\n",
    "LF behind the size": b"5\nabcde\r\n",
    "LF in an extension": b"5;\n\r\nabcde\r\n",
    "a size that is too large": b"f" * 17 + b"\r\n",
    "a size without an end": b"5" * 5000,
    "an extension without an end": b"5;" + b"x" * 5000,
    "a trailer that is none": b"0\r\nHTTP/1.1 200 OK\r\n",
    "a trailer with a bare LF": b"0\r\nX: y\n",
}


@pytest.mark.parametrize("pieces", ["at once", "byte by byte"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", BAD_CHUNKS)
def test_chunks_that_turn_bad(kind: str, stream: bool, pieces: str, tmp_path: Path) -> None:
    """They go no further: what the client gets is HTTP as far as it goes, and it is told."""
    bad = BAD_CHUNKS[kind] + b"data: {}\n\n" + b"0\r\n\r\n"

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post(STREAM if stream else BODY))
        asked = await wire.engine.next()
        await asked.send(chunked(EVENTS[0], content_type="text/event-stream" if stream else "text/plain", end=b""))
        client.put_back(await client.until(EVENTS[0] + b"\r\n"))
        for piece in [bad] if pieces == "at once" else [bad[at : at + 1] for at in range(len(bad))]:
            try:
                await asked.send(piece)
            except ConnectionError:
                break
            await asyncio.sleep(0)
        answer = await answer_to(client)
        assert not answer.complete
        assert answer.body.startswith(EVENTS[0])
        # When the last chunk has begun there need not be a place for an event any more.
        if "trailer" not in kind:
            assert (b"engine_died" in answer.body) == stream
        await asked.gone()
        assert not wire.tickets()

    play(tmp_path, scenario)


@pytest.mark.parametrize("path", [*OPENAI, *ANTHROPIC])
def test_a_stream_in_which_the_engine_says_that_it_is_dead(path: str, tmp_path: Path) -> None:
    """Its words are complete, but no answer is: the client is told, and cannot take it for the end."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post(STREAM, target=path))
        asked = await wire.engine.next()
        await asked.send(chunked(EVENTS[0], end=b""))
        assert (await client.bytes(12)) == b"HTTP/1.1 200"
        await turns()
        await asked.answer(b"%x\r\n%b\r\n0\r\n\r\n" % (len(DEAD), DEAD))
        rest = await client.rest()
        assert b'"error"' in rest
        await until(lambda: not wire.tickets(), "it has ended")

    play(tmp_path, scenario)


# Engines that take their time


@pytest.mark.parametrize(
    "raw", [LENGTH, CHUNKS, STREAMED, UNTIL_CLOSE], ids=["length", "chunks", "events", "until close"]
)
def test_an_engine_may_stop_anywhere_for_as_long_as_it_likes(raw: bytes, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        for at in range(0, len(raw), 5):
            client = await wire.connect()
            await client.send(post(STREAM))
            asked = await wire.engine.next()
            await asked.send(raw[:at])
            await wire.after(7200.0)
            assert wire.tickets() == 1
            await asked.answer(raw[at:], keep=raw is not UNTIL_CLOSE)
            answer = await answer_to(client)
            assert answer.complete
            assert answer.body in (b"some words", b"".join(EVENTS))
            client.close()

    play(tmp_path, scenario)


@pytest.mark.parametrize("raw", [STREAMED, CHUNKS], ids=["events", "chunks"])
def test_comments_come_only_between_events(raw: bytes, tmp_path: Path) -> None:
    """Wherever a stream stops, what its client reads is the engine's events and whole comments."""

    async def scenario(wire: Wire) -> None:
        for at in range(0, len(raw), 3):
            client = await wire.connect()
            await client.send(post(STREAM))
            asked = await wire.engine.next()
            await asked.send(raw[:at])
            await turns()
            for _ in range(3):
                await wire.after(10.0)
            await asked.answer(raw[at:])
            answer = await answer_to(client)
            if raw is CHUNKS and (answer.get("content-type") or "").startswith("text/event-stream"):
                client.close()  # The client was told that it is a stream, and then why it is none.
                continue
            lines = [line for line in answer.body.split(b"\n\n") if not line.startswith(b":")]
            expected = b"some words" if raw is CHUNKS else b"".join(EVENTS)
            assert b"\n\n".join(lines) == expected, at
            client.close()

    play(tmp_path, scenario, limits={"heartbeat_secs": 5.0})


def test_what_an_engine_sends_in_pieces_is_passed_on_as_it_comes(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post(STREAM))
        asked = await wire.engine.next()
        await asked.send(chunked(end=b""))
        for n in range(50):
            event = b"data: %d\n\n" % n
            await asked.send(b"%x\r\n%b\r\n" % (len(event), event))
            got = b""
            while not got.endswith(event + b"\r\n"):
                data = await client.read()
                assert data
                got += data
        await asked.answer(b"0\r\n\r\n")
        assert await client.bytes(5) == b"0\r\n\r\n"

    play(tmp_path, scenario)


@pytest.mark.parametrize("kind", ["length", "chunks", "events", "until close"])
def test_an_engine_that_is_faster_than_its_client_is_held_up(kind: str, tmp_path: Path) -> None:
    """By then nothing but the kernel's buffers, and a little of the proxy's, is full; in the end all has come."""
    size, piece = 16 << 20, b"x" * 65_534 + b"\n\n"
    heads = {
        "length": b"Content-Length: %d\r\n" % size,
        "chunks": b"Transfer-Encoding: chunked\r\n",
        "events": b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n",
        "until close": b"",
    }
    sent = 0

    async def script(asked: Asked) -> None:
        nonlocal sent
        asked.writer.transport.set_write_buffer_limits(0)
        await asked.send(b"HTTP/1.1 200 OK\r\n" + heads[kind] + b"\r\n")
        while sent < size:
            await asked.send(b"10000\r\n%b\r\n" % piece if b"chunked" in heads[kind] else piece)
            sent += len(piece)
        await asked.answer(b"0\r\n\r\n" if b"chunked" in heads[kind] else b"", keep=False)

    async def scenario(wire: Wire) -> None:
        assert wire.site is not None
        client = await Client.connect(wire.site.port, receive_bytes=4096)
        wire.clients.append(client)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(post(STREAM))
        await until(lambda: sent, "it has begun")
        before, same = -1, 0
        while same < 20:
            await asyncio.sleep(0.001)
            same = same + 1 if sent == before else 0
            before = sent
        assert 0 < sent < 8 << 20
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        answer = await answer_to(client)
        assert (len(answer.body), answer.complete) == (size, True)

    play(tmp_path, scenario, script)
