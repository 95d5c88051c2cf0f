"""What a request asks of its connection and not of a model: to be told to go on, HEAD, OPTIONS, upgrades."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.wire.cases import BODY, SMUGGLED, said
from tests.wire.client import Answer, Client, get, post, request
from tests.wire.engine import Asked, answering, echo, ok, plain
from tests.wire.stack import MAX_BODY, Wire, play, until


def numbered(n: int, *headers: str) -> bytes:
    """A request that is told from others by its body."""
    return post(body(n), *headers)


def body(n: int) -> bytes:
    return b'{"model": "a", "n": %d}' % n


def chunked(n: int) -> bytes:
    """The same in chunks."""
    framed = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body(n)), body(n))
    return request("POST /v1/completions HTTP/1.1", "Host: h", "Transfer-Encoding: chunked", body=framed)


LEAVING = pytest.mark.parametrize(
    "leave", [Client.close, Client.reset, Client.half_close], ids=["close", "reset", "half"]
)


async def whole(client: Client, method: str = "POST") -> Answer:
    answer = await client.answer(method)
    assert answer is not None
    assert answer.complete
    return answer


# Expect


EXPECTING = ["100-continue", "100-Continue", "100-CONTINUE"]


@pytest.mark.parametrize("spelled", EXPECTING)
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_client_that_waits_is_told_to_go_on(spelled: str, framing: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for n in range(2):
            sent = numbered(n) if framing == "length" else chunked(n)
            head, end, rest = sent.partition(b"\r\n\r\n")
            await client.send(head + f"\r\nExpect: {spelled}".encode() + end)
            assert await client.bytes(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
            await client.send(rest)
            assert (await whole(client)).body == body(n)
        assert len(wire.engine.asked) == 2

    play(tmp_path, scenario, echo)


def test_one_that_does_not_wait_is_served_all_the_same(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(numbered(0, "Expect: 100-continue") + numbered(1))
        first = await whole(client)
        assert first.body == body(0)
        assert first.informed in ([], [100])
        assert (await whole(client)).informed == []

    play(tmp_path, scenario, echo)


@pytest.mark.parametrize(
    "sent",
    [
        get("/v1/x?model=a", "Expect: 100-continue"),
        get("/v1/x?model=a", "Expect: 100-continue", "Content-Length: 0"),
        get("/health", "Expect: 100-continue"),
        request("POST /v1/x?model=a HTTP/1.0", "Content-Length: 4", "Expect: 100-continue", "Connection: keep-alive", body=b"body"),
    ],
    ids=["no body", "an empty body", "a request that is answered here", "HTTP/1.0"],
)  # fmt: skip
def test_no_100_where_nothing_is_to_come(sent: bytes, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(sent)
        answer = await whole(client)
        assert (answer.status, answer.informed) == (200, [])

    play(tmp_path, scenario, ok)


@pytest.mark.parametrize(
    ("target", "length", "expected"),
    [
        ("/sleep", 14, "404 unknown_url"),
        ("/v1/..", 14, "400 invalid_url"),
        ("/v1/completions", MAX_BODY + 1, "413 body_too_large"),
        ("/v1/models", 14, "405 method_not_allowed"),
    ],
)
def test_a_refusal_comes_instead_of_100(target: str, length: int, expected: str, tmp_path: Path) -> None:
    """Whether the body follows nobody knows, so the connection is closed."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(get(target, f"Content-Length: {length}", "Expect: 100-continue", method="POST"))
        answer = await whole(client)
        assert answer.informed == []
        assert said(answer) == expected
        await client.send(SMUGGLED)
        assert await client.rest() == b""
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok)


@pytest.mark.parametrize(
    "expectation", ["200-ok", "100-continue, x", "100-continue;q=1", "100", "", "x", "100-continue100-continue"]
)
def test_other_expectations_fail(expectation: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(numbered(0, f"Expect: {expectation}"))
        answer = await whole(client)
        assert said(answer) == "417 expectation_failed"
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok)


def test_an_engine_is_not_told_of_an_expectation(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(numbered(0, "Expect: 100-continue"))
        asked = await wire.engine.next()
        assert asked.all("expect") == []
        await asked.answer(plain(b"", status="200 OK"))
        await whole(client)

    play(tmp_path, scenario)


# HEAD and OPTIONS


@pytest.mark.parametrize("target", ["/health", "/v1/models", "/v1/models/a", "/v1/models/z", "/x", "/v1/../x"])
def test_head_is_answered_as_get_without_the_body(target: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(get(target) + get(target, method="HEAD") + get("/health"))
        full, bare, after = await whole(client, "GET"), await whole(client, "HEAD"), await whole(client, "GET")
        assert (bare.status, bare.body, after.status) == (full.status, b"", 200)
        assert bare.get("content-type") == full.get("content-type")
        # An error names the method.
        assert bare.get("content-length") == full.get("content-length") or full.status >= 400

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nunwelcome",
    ],
)
def test_head_is_answered_by_an_engine_without_a_body(raw: bytes, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for _ in range(2):
            await client.send(get("/v1/x?model=a", method="HEAD") + get("/health"))
            answer = await client.answer("HEAD")
            assert answer is not None
            assert (answer.status, answer.body) == (int(raw.split()[1]), b"")
            assert (await whole(client)).status == 200
        assert wire.engine.asked[0].method == "HEAD"

    play(tmp_path, scenario, answering(raw, keep=True))


def test_a_head_with_a_body_of_its_own(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        sent = post(BODY).replace(b"POST", b"HEAD", 1)
        await client.send(sent + get("/health"))
        assert (await whole(client, "HEAD")).status == 200
        assert (await whole(client)).status == 200
        assert wire.engine.bodies == [BODY]

    play(tmp_path, scenario, answering(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"))


ORIGIN = (
    "Origin: https://app.test",
    "Access-Control-Request-Method: POST",
    "Access-Control-Request-Headers: authorization",
)


@pytest.mark.parametrize("origins", [(), ("https://app.test",), ("https://other.test",), ("*",)])
@pytest.mark.parametrize("target", ["/v1/completions", "/v1/models", "/health", "/upstream/a/v1/completions"])
def test_options_is_answered_here(origins: tuple[str, ...], target: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(get(target, *ORIGIN, method="OPTIONS") + get("/health"))
        answer = await whole(client)
        assert (answer.status, answer.body) == (204, b"")
        assert answer.get("content-length") is None
        assert "POST" in (answer.get("allow") or "")
        allowed = answer.get("access-control-allow-origin")
        if origins and origins[0] != "https://other.test":
            assert allowed in ("*", "https://app.test")
            assert "POST" in (answer.get("access-control-allow-methods") or "")
            assert answer.get("access-control-allow-headers")
        else:
            assert allowed is None
        assert (await whole(client)).status == 200
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok, limits={"cors_origins": origins})


@pytest.mark.parametrize("origins", [(), ("https://app.test",), ("*",)])
def test_what_an_engine_says_about_origins_is_not_passed_on(origins: tuple[str, ...], tmp_path: Path) -> None:
    raw = plain(b"x", "Access-Control-Allow-Origin: https://evil.test", "Access-Control-Allow-Credentials: true")

    async def scenario(wire: Wire) -> None:
        for origin in ("https://app.test", "https://evil.test", "null", None):
            client = await wire.connect()
            await client.send(numbered(0, *([f"Origin: {origin}"] if origin else [])))
            answer = await whole(client)
            said = answer.get("access-control-allow-origin")
            if "*" in origins:
                assert said in ("*", origin)
            else:
                assert said == (origin if origin is not None and origin in origins else None)
            assert answer.get("access-control-allow-credentials") is None

    play(tmp_path, scenario, answering(raw), limits={"cors_origins": origins})


@pytest.mark.parametrize("upgrade", ["h2c", "H2C"])
def test_the_offer_of_http_2_is_not_taken(upgrade: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        lines = [
            "Connection: Upgrade, HTTP2-Settings",
            f"Upgrade: {upgrade}",
            "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
        ]
        await client.send(numbered(0, *lines) + numbered(1))
        assert (await whole(client)).body == body(0)
        assert (await whole(client)).body == body(1)
        assert all(not asked.all("http2-settings") + asked.all("upgrade") for asked in wire.engine.asked)

    play(tmp_path, scenario, echo)


@pytest.mark.parametrize("upgrade", ["websocket", "TLS/1.0", "HTTP/2.0", "h2", "websocket, h2c", "h2c, websocket", "x"])
@pytest.mark.parametrize("target", ["/v1/completions?model=a", "/health", "/v1/models", "/v1/realtime/x?model=a"])
def test_other_upgrades_are_refused_and_what_follows_is_not_read(upgrade: str, target: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        lines = [f"Upgrade: {upgrade}", "Connection: Upgrade", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]
        await client.send(get(target, *lines) + SMUGGLED)
        assert said(await whole(client, "GET")) == "400 upgrade_refused"
        assert await client.rest() == b""
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok)


HANDSHAKE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)


def test_a_websocket_is_a_tunnel_in_both_directions(tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        assert asked.all("upgrade") == ["websocket"]
        await asked.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello")
        while data := await asked.reader.read(100):
            await asked.send(data[::-1])
        asked.writer.close()
        asked.answered.set()

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        # What comes with the handshake belongs to it already.
        await client.send(get("/v1/realtime?model=a", *HANDSHAKE) + b"\x00early")
        assert await client.bytes(12) == b"HTTP/1.1 101"
        got = b""
        while b"hello" not in got or b"ylrae" not in got:
            data = await client.read()
            assert data, got
            got += data
        await client.send(SMUGGLED)
        assert await client.bytes(len(SMUGGLED)) == SMUGGLED[::-1]
        client.close()
        await until(wire.idle, "its request has ended")
        assert wire.engine.targets == ["/v1/realtime?model=a"]

    play(tmp_path, scenario, script)


@pytest.mark.parametrize("without", ["Connection: Upgrade", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="])
def test_half_a_handshake_is_none(without: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        lines = [line for line in HANDSHAKE if line != without]
        await client.send(get("/v1/realtime?model=a", *lines) + SMUGGLED)
        assert said(await whole(client, "GET")) == "400 upgrade_refused"
        assert await client.rest() == b""
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok)


@LEAVING
def test_a_tunnel_ends_with_its_client(leave: Callable[[Client], None], tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client, asked = await tunnel(wire)
        leave(client)
        await asked.gone()
        asked.answered.set()
        await until(lambda: not wire.tickets(), "its request has ended")

    play(tmp_path, scenario)


@pytest.mark.parametrize("die", ["close", "kill"])
def test_a_tunnel_ends_with_its_engine(die: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client, asked = await tunnel(wire)
        await asked.send(b"last words")
        await client.until(b"last words")
        asked.die() if die == "kill" else await asked.answer(b"", keep=False)
        assert await client.rest() == b""
        await until(lambda: not wire.tickets(), "its request has ended")

    play(tmp_path, scenario)


async def tunnel(wire: Wire) -> tuple[Client, Asked]:
    client = await wire.connect()
    await client.send(get("/v1/realtime?model=a", *HANDSHAKE))
    asked = await wire.engine.next()
    await asked.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
    assert b"101" in await client.until(b"\r\n\r\n")
    return client, asked


@pytest.mark.parametrize(
    "raw", [plain(b"no", status="403 Forbidden"), plain(b"", status="426 Upgrade Required"), plain(b"ok")]
)
def test_an_engine_that_does_not_take_a_handshake(raw: bytes, tmp_path: Path) -> None:
    """Its answer is an answer, and no tunnel."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(get("/v1/realtime?model=a", *HANDSHAKE))
        answer = await whole(client, "GET")
        assert answer.status == int(raw[9:12])
        await client.send(get("/v1/realtime?model=a", *HANDSHAKE))
        await client.rest() if answer.get("connection") == "close" else await whole(client, "GET")

    play(tmp_path, scenario, answering(raw, keep=True))


# What a client says of its connection


@pytest.mark.parametrize(
    "named",
    [
        "content-length",
        "content-type",
        "host",
        "transfer-encoding",
        "x-request-id",
        "connection",
        "close, content-length",
        ",",
        "a b",
    ],
)
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_connection_field_takes_nothing_away_that_counts(named: str, framing: str, tmp_path: Path) -> None:
    sent = numbered(0, "x-request-id: mine") if framing == "length" else chunked(0)

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(sent.replace(b"\r\n\r\n", f"\r\nConnection: {named}\r\n\r\n".encode(), 1))
        answer = await whole(client)
        assert answer.status == 200
        assert answer.body == body(0)
        if framing == "length":
            assert wire.engine.asked[0].all("content-type") == ["application/json"]

    play(tmp_path, scenario, echo)


@pytest.mark.parametrize("given", ["mine-1", "a b", "x" * 129, "\xe9", '"', "<script>", "a\tb", ""])
def test_a_request_id_is_the_clients_or_a_new_one(given: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for n in range(2):
            await client.send(numbered(n, f"X-Request-Id: {given}"))
            answer = await whole(client)
            (seen,) = wire.engine.asked[n].all("x-request-id")
            assert answer.get("x-request-id") == seen
            assert (seen == given) == (given == "mine-1")

    play(tmp_path, scenario, echo)
