"""What the proxy passes on, it passes on as it is: requests, answers, pieces as they come, no faster than is read."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import socket
from pathlib import Path

import pytest

from llmuxd.core import events as e
from tests.integration.proxy_stack import (
    MAX_BODY,
    Asked,
    Client,
    answering,
    plain,
    post,
    serving,
    settled,
    soon,
    until,
)

OK = plain(b'{"ok": true}', "Content-Type: application/json", "Date: today", "Server: uvicorn")


def test_a_request_goes_through_unchanged(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            body = b'{ "model" :"a",  "prompt":"\xc3\xa9\\u00e9", "n":1e0 }\n'
            target = "/v1/chat/completions?b=%41+x&&a[]=1&b="
            await client.send(
                post(
                    target,
                    body,
                    "X-Odd: 1",
                    "X-Odd: 2",
                    "Accept-Encoding: br",
                    "Authorization: Bearer secret",
                    "X-Api-Key: secret",
                    "Cookie: secret=1",
                    "Connection: keep-alive, X-Hop",
                    "X-Hop: here",
                    "TE: trailers",
                    "X-Request-Id: mine-1",
                )
            )
            asked = await stack.engines["a"].next()
            assert asked.head.first == f"POST {target} HTTP/1.1"
            assert asked.body == body
            assert asked.head.all("x-odd") == ["1", "2"]
            assert asked.head.get("accept-encoding") == "br"
            assert asked.head.get("content-length") == str(len(body))
            assert asked.head.get("host") == "localhost"
            assert asked.head.get("x-request-id") == "mine-1"
            names = {name.lower() for name, _ in asked.head.headers}
            assert names <= {
                "host",
                "x-odd",
                "accept-encoding",
                "content-type",
                "content-length",
                "x-request-id",
                "connection",
            }
            await asked.send(OK)
            answer = await client.answer()
            assert answer.head.get("x-request-id") == "mine-1"
            assert stack.count("a", 200) == stack.counted() == 1

    asyncio.run(run())


def test_nothing_is_added_that_the_client_did_not_send(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            await client.send(b"GET /v1/responses/r1?model=a HTTP/1.1\r\nHost: h\r\n\r\n")
            asked = await stack.engines["a"].next()
            names = {name.lower() for name, _ in asked.head.headers}
            assert names <= {"host", "x-request-id", "content-length", "connection"}
            assert len(asked.head.get("x-request-id") or "") == 32
            await asked.send(OK)
            answer = await client.answer()
            assert answer.head.get("x-request-id") == asked.head.get("x-request-id")

    asyncio.run(run())


def test_an_answer_comes_back_unchanged(tmp_path: Path) -> None:
    body = random.Random(1).randbytes(300_000)
    given = [
        ("Date", "Thu, 01 Jan 1970 00:00:00 GMT"),
        ("SERVER", "uvicorn"),
        ("x-Twice", "1"),
        ("x-Twice", "2"),
        ("X-Text", "gr\u00fc\u00dfe"),
        ("Content-Type", "application/Octet-Stream;  q=1"),
    ]
    raw = plain(
        body, *(f"{name}: {value}" for name, value in given), "Connection: X-Hop", "X-Hop: 1", status="418 I am One"
    )

    async def run() -> None:
        async with serving(tmp_path, answering(raw)) as stack:
            answer = await stack.exchange(post("/v1/completions", b'{"model": "a"}'))
            assert (answer.status, answer.reason, answer.body, answer.complete) == (418, "I am One", body, True)
            added = {"x-request-id", "server-timing"}
            passed = [(name, value) for name, value in answer.head.headers if name.lower() not in added]
            assert passed == [*given, ("Content-Length", str(len(body)))]
            assert answer.head.get("server-timing") == "queue;dur=0.0, switch;dur=0.0"

    asyncio.run(run())


def test_a_bare_answer_gets_no_headers_of_a_server(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as stack:
            answer = await stack.exchange(post("/v1/completions", b'{"model": "a"}'))
            names = [name.lower() for name, _ in answer.head.headers]
            assert sorted(names) == ["content-length", "server-timing", "x-request-id"]

    asyncio.run(run())


def test_compressed_bodies_are_nobodys_business_here(tmp_path: Path) -> None:
    asked_with = gzip.compress(b'{"model": "b"}' * 100)
    answered_with = gzip.compress(bytes(100_000))
    raw = plain(answered_with, "Content-Encoding: gzip", "Content-Type: text/plain")
    seen: list[bytes] = []

    async def script(asked: Asked) -> None:
        seen.append(asked.body)
        assert asked.head.get("content-encoding") == "gzip"
        await asked.send(raw)

    async def run() -> None:
        async with serving(tmp_path, script) as stack:
            request = post("/v1/completions", asked_with, "Content-Encoding: gzip", "model-override: a")
            answer = await stack.exchange(request)
            assert seen == [asked_with]
            assert answer.body == answered_with
            assert answer.head.get("content-encoding") == "gzip"
            assert "vary" not in {name.lower() for name, _ in answer.head.headers}

    asyncio.run(run())


def test_large_and_chunked_and_multipart_requests_arrive_byte_for_byte(tmp_path: Path) -> None:
    random_bytes = random.Random(2).randbytes(MAX_BODY - 1000)
    form = (
        b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        + random_bytes
        + b'\r\n--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n--xyz--\r\n'
    )
    text = json.dumps({"model": "a", "prompt": "x" * 2_000_000}).encode()
    seen: list[bytes] = []

    async def script(asked: Asked) -> None:
        seen.append(asked.body)
        await asked.send(OK)

    async def run() -> None:
        async with serving(tmp_path, script) as stack:
            kind = "Content-Type: multipart/form-data; boundary=xyz"
            assert (await stack.exchange(post("/v1/audio/transcriptions", form, kind))).status == 200
            client = await stack.connect()
            await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
            for at in range(0, len(text), 70_001):
                piece = text[at : at + 70_001]
                await client.send(b"%x\r\n%s\r\n" % (len(piece), piece))
            await client.send(b"0\r\n\r\n")
            assert (await client.answer()).status == 200
            assert seen == [form, text]

    asyncio.run(run())


@pytest.mark.parametrize("pipelined", [True, False])
def test_many_requests_on_one_connection(tmp_path: Path, pipelined: bool) -> None:
    """Every answer belongs to its request, and each has an engine connection of its own."""

    async def script(asked: Asked) -> None:
        await asked.send(plain(asked.body))

    async def run() -> None:
        async with serving(tmp_path, script) as stack:
            client = await stack.connect()
            bodies = [b'{"model": "a", "n": %d}' % n for n in range(20)]
            if pipelined:
                await client.send(b"".join(post("/v1/completions", body) for body in bodies))
            for body in bodies:
                if not pipelined:
                    await client.send(post("/v1/completions", body))
                assert (await client.answer()).body == body
            assert stack.engines["a"].connections == 20
            assert stack.count("a", 200) == 20

    asyncio.run(run())


def test_each_piece_is_passed_on_as_it_comes(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            await client.ask(stream=True)
            asked = await stack.engines["a"].next()
            await asked.stream()
            for n in range(5):
                await asked.chunk(b"data: %d\n\n" % n)
                if n == 0:
                    assert (await client.head()).get("transfer-encoding") == "chunked"
                assert await client.chunk() == b"data: %d\n\n" % n
            await asked.send(b"0\r\n\r\n")
            assert await client.chunk() == b""
            assert stack.ended == [e.RequestFinished(1, True)]

    asyncio.run(run())


def test_a_slow_reader_slows_the_engine(tmp_path: Path) -> None:
    size = 64 * 1024 * 1024
    sent = 0

    async def script(asked: Asked) -> None:
        nonlocal sent
        asked.writer.transport.set_write_buffer_limits(0)
        await asked.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while sent < size:
            await asked.send(bytes(65536))
            sent += 65536

    async def run() -> None:
        async with serving(tmp_path, script) as stack:
            assert stack.site is not None
            loop = asyncio.get_running_loop()
            with socket.socket() as slow:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                slow.setblocking(False)
                await loop.sock_connect(slow, ("127.0.0.1", stack.site.port))
                await loop.sock_sendall(slow, post("/v1/completions", b'{"model": "a"}'))
                assert 0 < await settled(lambda: sent) < size / 4
                received = 0
                while received < size:
                    received += len(await soon(loop.sock_recv(slow, 1 << 20)))
            assert sent == size

    asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "raw", "kept"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n", "17"),
        ("HEAD", b"HTTP/1.1 200 OK\r\nX: 1\r\n\r\n", None),
        ("POST", b"HTTP/1.1 204 No Content\r\n\r\n", None),
        ("POST", b"HTTP/1.1 304 Not Modified\r\n\r\n", None),
    ],
)
def test_answers_without_a_body_leave_the_connection_usable(
    tmp_path: Path, method: str, raw: bytes, kept: str | None
) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(raw)) as stack:
            client = await stack.connect()
            for _ in range(2):
                await client.send(f"{method} /v1/x?model=a HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n".encode())
                answer = await client.answer(method)
                assert answer.status == int(raw.split(b" ")[1])
                assert answer.head.get("content-length") == kept
                assert answer.head.get("transfer-encoding") is None
            assert stack.count("a", answer.status) == 2

    asyncio.run(run())


def test_a_client_of_http_1_0_gets_a_body_that_ends_with_the_connection(tmp_path: Path) -> None:
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"

    async def run() -> None:
        async with serving(tmp_path, answering(raw)) as stack:
            answer = await stack.exchange(b"GET /v1/x?model=a HTTP/1.0\r\n\r\n")
            assert answer.head.get("transfer-encoding") is None
            assert (answer.body, answer.complete) == (b"abcde", True)

    asyncio.run(run())


def test_an_answer_that_ends_with_the_engines_connection(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(b"HTTP/1.1 200 OK\r\n\r\nabc")) as stack:
            answer = await stack.exchange(post("/v1/completions", b'{"model": "a"}'))
            assert (answer.body, answer.complete) == (b"abc", True)

    asyncio.run(run())


def test_a_redirect_is_the_clients_to_follow(tmp_path: Path) -> None:
    raw = plain(b"", "Location: http://localhost/sleep", status="307 Temporary Redirect")

    async def run() -> None:
        async with serving(tmp_path, answering(raw)) as stack:
            answer = await stack.exchange(post("/v1/completions", b'{"model": "a"}'))
            assert answer.status == 307
            assert stack.engines["a"].connections == 1

    asyncio.run(run())


def test_the_time_in_the_queue_is_told(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(OK), holds=("a",)) as stack:
            client = await stack.connect()
            await client.ask()
            await until(lambda: not stack.idle(), "the request is queued")
            stack.now = 2.5
            stack.started("a")
            answer = await client.answer()
            assert answer.head.get("server-timing") == "queue;dur=2500.0, switch;dur=2500.0"

    asyncio.run(run())


def test_a_100_continue_is_given(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(OK)) as stack:
            client: Client = await stack.connect()
            whole = post("/v1/completions", b'{"model": "a"}', "Expect: 100-continue")
            for _ in range(2):
                await client.send(whole[:-14])
                assert (await client.head()).first == "HTTP/1.1 100 Continue"
                await client.send(whole[-14:])
                assert (await client.answer()).status == 200

    asyncio.run(run())
