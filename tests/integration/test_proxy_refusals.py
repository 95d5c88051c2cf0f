"""What the proxy answers by itself, and what it refuses: in bytes as clients may send them, and never passed on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.integration.proxy_stack import MAX_BODY, Answer, Stack, answering, plain, post, serving, until

OK = plain(b'{"ok": true}', "Content-Type: application/json")
BODY = b'{"model": "a"}'


def get(target: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: h", *headers, "", ""]).encode()


def assert_ours(answer: Answer) -> None:
    assert answer.complete
    assert answer.head.get("x-request-id")
    assert answer.head.get("server-timing") == "queue;dur=0.0, switch;dur=0.0"
    assert answer.head.get("content-type") == "application/json"


async def refused(stack: Stack, request: bytes, method: str = "POST") -> Answer:
    answer = await stack.exchange(request, method)
    assert_ours(answer)
    return answer


# Answered here


def test_the_models(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, models=("a", "b")) as stack:
            answer = await stack.exchange(get("/v1/models"))
            assert_ours(answer)
            listed = json.loads(answer.body)
            assert listed["object"] == "list"
            assert [model["id"] for model in listed["data"]] == ["a", "b", "org/alias"]
            for model in listed["data"]:
                assert set(model) == {"id", "object", "created", "owned_by", "root", "parent"}
                assert (model["object"], model["owned_by"], model["parent"]) == ("model", "llmux", None)
                for spelled in (model["id"], model["id"].replace("/", "%2F")):
                    one = await stack.exchange(get(f"/v1/models/{spelled}"))
                    assert (one.status, json.loads(one.body)) == (200, model)
            missing = await refused(stack, get("/v1/models/c"))
            assert (missing.status, missing.error["code"]) == (404, "model_not_found")
            assert "a, b, org/alias" in missing.error["message"]
            assert stack.switcher.state.models["a"].state.value == "not_started"
            assert (stack.count("-", 200), stack.count("-", 404)) == (7, 1)

    asyncio.run(run())


def test_health(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            well = await stack.exchange(get("/health"))
            assert_ours(well)
            assert (well.status, json.loads(well.body)) == (200, {"status": "ok"})
            stack.refuses_all = "shutting down"
            ill = await stack.exchange(get("/health"))
            assert (ill.status, json.loads(ill.body)) == (503, {"status": "shutting down"})
            head = await stack.exchange(get("/health", method="HEAD"), "HEAD")
            assert (head.status, head.body) == (503, b"")

    asyncio.run(run())


# Development endpoints

TRICKS = [
    "/sleep",
    "//sleep",
    "/v1/../sleep",
    "/v1/..//sleep",
    "/v1/%2e%2e/sleep",
    "/v1/%2E%2E%2Fsleep",
    "/v1/..%2fsleep",
    "/v1/..%5csleep",
    "/v1\\..\\sleep",
    "/v1/x/../../sleep?model=a",
    "/v1/..;/sleep",
    "/%73leep",
    "/v1/%6coad_lora_adapter",
    "/v1/load_lora_adapter",
    "/v1/load_lora_adapter/",
    "/v1/load_lora_adapter?x",
    "/inference/v1/abort_requests",
    "/v1/models/../../sleep",
    "/v1/models/..%2f..%2fsleep",
    "/v1//x",
    "/collective_rpc",
    "http://localhost/sleep",
    "http://localhost/v1/completions",
    "HTTP://x/v1/../sleep",
    "//localhost/sleep",
    "sleep",
    "v1/completions",
    "*",
    "/v1/x#/../sleep",
    "/sleep#/v1/x",
    "/v1/completions%00",
    "/v1/completions%20",
    "/v1/completions;x",
    "/v1/completions?",
]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_no_target_reaches_a_development_endpoint(tmp_path: Path, method: str) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(OK)) as stack:
            for target in TRICKS:
                request = get(target, "model-override: a", "Content-Length: 14", method=method) + BODY
                answer = await refused(stack, request, method)
                assert answer.status in (400, 404), target
                assert answer.error["type"] == "invalid_request_error"
            assert stack.engines["a"].connections == 0
            assert stack.ended == []

    asyncio.run(run())


@pytest.mark.parametrize(
    "line",
    [
        b"CONNECT /v1/completions HTTP/1.1",
        b"CONNECT localhost:80 HTTP/1.1",
        b"TRACE /v1/completions HTTP/1.1",
        b"PRI * HTTP/2.0",
        b"BREW /v1/completions HTTP/1.1",
        b"POST /v1/com pletions HTTP/1.1",
        b"POST /v1/completions\x00 HTTP/1.1",
        b"POST /v1/completions\x01 HTTP/1.1",
        b"POST /v1/\xff HTTP/1.1",
        b"POST /v1/completions HTTP/9.9",
        b"POST /v1/completions",
        b"GET\t/v1/completions\tHTTP/1.1",
        b"/v1/completions",
        b"\x16\x03\x01\x02",
    ],
)
def test_other_first_lines(tmp_path: Path, line: bytes) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(OK)) as stack:
            request = line + b"\r\nHost: h\r\nmodel-override: a\r\nContent-Length: 0\r\n\r\n"
            answer = await refused(stack, request)
            assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
            assert stack.engines["a"].connections == 0

    asyncio.run(run())


@pytest.mark.parametrize("protocol", ["websocket", "h3c", "TLS/1.0"])
@pytest.mark.parametrize("connection", ["Upgrade", "keep-alive"])
def test_an_upgrade_is_refused_and_what_follows_it_is_not_read(tmp_path: Path, protocol: str, connection: str) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(OK)) as stack:
            client = await stack.connect()
            upgrade = get("/v1/realtime?model=a", f"Connection: {connection}", f"Upgrade: {protocol}")
            await client.send(upgrade + post("/v1/completions", BODY))
            answer = await client.answer()
            assert_ours(answer)
            assert (answer.status, answer.error["code"]) == (400, "upgrade_refused")
            assert await client.ended() == b""
            assert stack.engines["a"].connections == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 14\r\nContent-Length: 15",
        b"Content-Length: 14\r\nTransfer-Encoding: chunked",
        b"Content-Length: -1",
        b"Content-Length: 0x0e",
        b"Transfer-Encoding: chunked, identity",
        b"X-Bad : 1\r\nContent-Length: 14",
        b"X\x00: 1\r\nContent-Length: 14",
        b"X: " + b"y" * 10_000 + b"\r\nContent-Length: 14",
        b"Content-Length: 14\r\n folded: 1",
    ],
)
def test_heads_that_could_be_read_in_two_ways(tmp_path: Path, head: bytes) -> None:
    """Whatever is made of one, at most one request comes out of it, and it is framed by its own length."""

    async def script(asked: object) -> None:
        bodies.append(asked.body)  # type: ignore[attr-defined]
        await asked.send(OK)  # type: ignore[attr-defined]

    bodies: list[bytes] = []

    async def run() -> None:
        async with serving(tmp_path, script) as stack:
            client = await stack.connect()
            await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n" + head + b"\r\n\r\n" + BODY)
            client.writer.write_eof()
            await client.ended()
            await until(stack.idle, "it is over")
            assert bodies in ([], [BODY])

    asyncio.run(run())


# What is wrong with a request


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (post("/v1/completions", b"{"), 400, "invalid_json"),
        (post("/v1/completions", b"{}"), 400, "model_required"),
        (post("/v1/completions", b""), 400, "model_required"),
        (post("/v1/completions", b'{"model": 1}'), 400, "invalid_model"),
        (post("/v1/completions", b"\x1f\x8b", "Content-Encoding: gzip"), 400, "unreadable_body"),
        (post("/v1/completions", b"x", "Content-Type: multipart/form-data"), 400, "invalid_form"),
        (post("/v1/completions", b'{"model": "b"}'), 404, "model_not_found"),
        (post("/v1/completions", BODY, "model-override: b"), 404, "model_not_found"),
        (post("/v1/completions?model=b", BODY), 404, "model_not_found"),
        (post("/v1/models", BODY), 405, "method_not_allowed"),
        (post("/health", BODY), 405, "method_not_allowed"),
        (post("/", BODY), 404, "unknown_url"),
        (post("/v1/completions/", BODY), 404, "unknown_url"),
        (get("/metrics"), 404, "unknown_url"),
        (get("/docs"), 404, "unknown_url"),
    ],
)
def test_a_request_at_fault_is_told_so_and_the_connection_stays(
    tmp_path: Path, request_: bytes, status: int, code: str
) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(OK)) as stack:
            client = await stack.connect()
            for _ in range(2):
                await client.send(request_)
                answer = await client.answer()
                assert_ours(answer)
                assert (answer.status, answer.error["code"]) == (status, code)
                assert answer.error["type"] == "invalid_request_error"
            await client.ask()
            assert (await client.answer()).status == 200
            assert (stack.count("-", status), stack.count("a", 200)) == (2, 1)

    asyncio.run(run())


def test_a_body_that_is_not_wanted_is_read_over(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(OK)) as stack:
            client = await stack.connect()
            large = b"x" * (MAX_BODY // 2)
            chunked = b"POST /nothing HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
            await client.send(chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(large), large))
            assert (await client.answer()).status == 404
            await client.send(post("/nothing", large) + post("/v1/completions", BODY))
            assert (await client.answer()).status == 404
            assert (await client.answer()).status == 200

    asyncio.run(run())


@pytest.mark.parametrize("method", ["header", "query"])
def test_a_model_beside_the_body_leaves_the_body_alone(tmp_path: Path, method: str) -> None:
    async def script(asked: object) -> None:
        await asked.send(plain(asked.body))  # type: ignore[attr-defined]

    async def run() -> None:
        async with serving(tmp_path, script) as stack:
            for body in (b"", b"{", b"\x00\xff", b'{"model": 1}'):
                for name in ("a", "org/alias"):
                    if method == "header":
                        request = post("/v1/completions", body, f"Model-Override: {name}")
                    else:
                        request = post(f"/v1/completions?model={name}", body)
                    answer = await stack.exchange(request)
                    assert (answer.status, answer.body) == (200, body)
            assert stack.count("a", 200) == 8

    asyncio.run(run())


def test_a_body_as_large_as_is_allowed(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(OK)) as stack:
            body = BODY + b" " * (MAX_BODY - len(BODY))
            assert (await stack.exchange(post("/v1/completions", body))).status == 200

    asyncio.run(run())


@pytest.mark.parametrize("sends", ["nothing", "all"])
def test_a_body_that_is_announced_too_large(tmp_path: Path, sends: str) -> None:
    """The answer comes before the body, and reaches also a client that writes all before it reads."""

    async def run() -> None:
        async with serving(tmp_path, answering(OK)) as stack:
            client = await stack.connect()
            length = MAX_BODY + 1
            await client.send(f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n".encode())
            if sends == "all":
                await client.send(bytes(length))
            answer = await client.answer()
            assert_ours(answer)
            assert (answer.status, answer.error["code"]) == (413, "body_too_large")
            assert str(MAX_BODY) in answer.error["message"]
            assert answer.head.get("connection") == "close"
            assert stack.engines["a"].connections == 0

    asyncio.run(run())


def test_a_body_that_turns_out_too_large(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(OK)) as stack:
            client = await stack.connect()
            await client.send(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
            await client.send(b"%x\r\n%s\r\n" % (MAX_BODY + 1, bytes(MAX_BODY + 1)))
            answer = await client.answer()
            assert_ours(answer)
            assert (answer.status, answer.error["code"]) == (413, "body_too_large")

    asyncio.run(run())


@pytest.mark.parametrize("target", ["/sleep", "/v1/completions"])
def test_a_client_that_waits_for_100_is_refused_without_it(tmp_path: Path, target: str) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(OK)) as stack:
            client = await stack.connect()
            length = MAX_BODY + 1
            await client.send(get(target, "Expect: 100-continue", f"Content-Length: {length}", method="POST"))
            answer = await client.answer()
            assert answer.status in (404, 413)

    asyncio.run(run())


@pytest.mark.parametrize("chunk", [b"zz\r\n", b"-1\r\n", b"5\r\nabc\r\n\r\nxx", b"3\r\nabcX\r\n"])
def test_a_chunked_body_that_is_none(tmp_path: Path, chunk: bytes) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(OK)) as stack:
            client = await stack.connect()
            await client.send(b"POST /v1/x?model=a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
            answer = await client.answer()
            assert answer.status == 400
            assert answer.error["type"] == "invalid_request_error"
            assert stack.engines["a"].connections == 0
            await client.ended()

    asyncio.run(run())


def test_headers_that_are_not_utf_8_break_nothing(tmp_path: Path) -> None:
    raw = plain(b"x").replace(b"\r\n\r\n", b"\r\nX-Text: gr\xfcn\r\n\r\n", 1)

    async def run() -> None:
        async with serving(tmp_path, answering(raw)) as stack:
            client = await stack.connect()
            await client.send(post("/v1/completions", BODY).replace(b"Host:", b"X-Text: gr\xfcn\r\nHost:"))
            status = (await asyncio.wait_for(client.reader.readline(), 10)).split()[1]
            assert status == b"200"

    asyncio.run(run())


def test_http_2_that_is_offered_is_not_taken_for_a_websocket(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            await client.send(get("/v1/realtime?model=a", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"))
            asked = await stack.engines["a"].next()
            assert asked.head.get("upgrade") is None
            assert asked.head.get("connection") is None
            await asked.send(plain(b"{}"))
            assert (await client.answer("GET")).status == 200

    asyncio.run(run())
