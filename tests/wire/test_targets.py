"""No spelling of a target, no method, no header and no upgrade takes a client to a development endpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.vllm_paths import DEVELOPMENT
from tests.wire.cases import BODY, said
from tests.wire.client import Answer, Client, get, post, request
from tests.wire.engine import ok
from tests.wire.stack import Wire, play

Spelling = Callable[[str], str]


def escaped(path: str, at: int = 1, upper: bool = False) -> str:
    """With one letter as %xx."""
    code = f"%{ord(path[at]):02x}"
    return path[:at] + (code.upper() if upper else code) + path[at + 1 :]


SPELLINGS: dict[str, Spelling] = {
    "as it is": lambda path: path,
    "with a slash behind": lambda path: path + "/",
    "with a dot behind": lambda path: path + ".",
    "with two dots behind": lambda path: path + "/x/..",
    "with a space behind, escaped": lambda path: path + "%20",
    "with a NUL behind, escaped": lambda path: path + "%00",
    "with a tab behind, escaped": lambda path: path + "%09",
    "with CRLF behind, escaped": lambda path: path + "%0d%0aX:%20y",
    "with an extension": lambda path: path + ".json",
    "with a query": lambda path: path + "?model=a",
    "with an empty query": lambda path: path + "?",
    "with a path in the query": lambda path: path + "?/v1/completions",
    "with the question mark escaped": lambda path: path + "%3fmodel=a",
    "with a fragment": lambda path: path + "#/v1/completions",
    "in the fragment of another": lambda path: "/v1/completions#/.." + path,
    "with a parameter": lambda path: path + ";x=y",
    "with an empty parameter": lambda path: path + ";",
    "behind a parameter": lambda path: "/v1/..;" + path,
    "behind a segment with a parameter": lambda path: "/v1/..;x" + path,
    "in upper case": str.upper,
    "in title case": lambda path: path[0] + path[1:].capitalize(),
    "behind two slashes": lambda path: "/" + path,
    "behind three slashes": lambda path: "//" + path,
    "behind a host": lambda path: "//localhost" + path,
    "behind a dot": lambda path: "/." + path,
    "behind two dots": lambda path: "/.." + path,
    "behind a tree and two dots": lambda path: "/v1/.." + path,
    "behind a path and two dots": lambda path: "/v1/completions/../.." + path,
    "behind two dots and two slashes": lambda path: "/v1/../" + path,
    "behind escaped dots": lambda path: "/v1/%2e%2e" + path,
    "behind escaped dots in upper case": lambda path: "/v1/%2E%2E" + path,
    "behind one escaped dot": lambda path: "/v1/.%2e" + path,
    "behind dots escaped twice": lambda path: "/v1/%252e%252e" + path,
    "behind overlong dots": lambda path: "/v1/%c0%ae%c0%ae" + path,
    "with its slash escaped": lambda path: "/v1/..%2f" + path[1:],
    "with its slash escaped in upper case": lambda path: "/v1/..%2F" + path[1:],
    "with its slash escaped twice": lambda path: "/v1/..%252f" + path[1:],
    "with all slashes escaped": lambda path: "/" + quote(path, safe=""),
    "behind a backslash": lambda path: "/v1\\..\\" + path[1:],
    "with a backslash for its slash": lambda path: "\\" + path[1:],
    "behind an escaped backslash": lambda path: "/v1/..%5c" + path[1:],
    "with a letter escaped": escaped,
    "with a letter escaped in upper case": lambda path: escaped(path, upper=True),
    "with the last letter escaped": lambda path: escaped(path, -1),
    "with a letter escaped twice": lambda path: escaped(path).replace("%", "%25"),
    "with a letter escaped as UTF-16": lambda path: f"/%u00{ord(path[1]):02x}{path[2:]}",
    "with all letters escaped": lambda path: "/" + "".join(f"%{ord(letter):02x}" for letter in path[1:]),
    "as an absolute URI": lambda path: "http://localhost" + path,
    "as an absolute URI in upper case": lambda path: "HTTP://LOCALHOST" + path,
    "as an absolute URI with a port": lambda path: "http://localhost:80" + path,
    "as an absolute URI with a user": lambda path: "http://a@localhost" + path,
    "as an absolute URI without a host": lambda path: "http://" + path,
    "as an absolute URI with one slash": lambda path: "http:" + path,
    "as an absolute URI with a dotted path": lambda path: "http://h/v1/.." + path,
    "as a URI of a socket": lambda path: "unix:" + path,
    "as a URI of a file": lambda path: "file://" + path,
    "without its slash": lambda path: path[1:],
    "behind an authority": lambda path: "localhost:80" + path,
    "behind an asterisk": lambda path: "*" + path,
    "behind an at sign": lambda path: "@localhost" + path,
    "behind a model's id": lambda path: "/v1/models/.." + path,
    "behind a model's id and escaped dots": lambda path: "/v1/models/%2e%2e" + path,
    "as a model's id": lambda path: "/v1/models" + path,
    "as a model's id, escaped": lambda path: "/v1/models/..%2f.." + quote(path, safe=""),
    "behind a response's id": lambda path: "/v1/responses/resp_1/../../.." + path,
    "as a response's id": lambda path: "/v1/responses/..%2f..%2f" + path[1:],
    "behind /upstream": lambda path: "/upstream" + path,
    "upstream": lambda path: "/upstream/a" + path,
    "upstream with a query": lambda path: "/upstream/a" + path + "?model=a",
    "upstream of an alias": lambda path: "/upstream/org/alias" + path,
    "upstream of an escaped alias": lambda path: "/upstream/org%2Falias" + path,
    "upstream with two slashes": lambda path: "/upstream/a/" + path,
    "upstream with a slash behind": lambda path: "/upstream/a" + path + "/",
    "upstream of nobody": lambda path: "/upstream/" + path,
    "upstream of a dot": lambda path: "/upstream/." + path,
    "upstream of two dots": lambda path: "/upstream/.." + path,
    "upstream and back": lambda path: "/upstream/a/.." + path,
    "upstream behind a tree and two dots": lambda path: "/upstream/a/v1/.." + path,
    "upstream with a parameter": lambda path: "/upstream/a;x" + path,
    "upstream in upper case": lambda path: "/UPSTREAM/a" + path,
    "upstream of a name with its slash escaped": lambda path: "/upstream/a%2f" + path[1:],
    "upstream with a letter escaped": lambda path: "/upstream/a" + escaped(path),
    "upstream with a backslash": lambda path: "/upstream/a\\" + path[1:],
    "upstream of upstream": lambda path: "/upstream/a/upstream/a" + path,
    "upstream behind two slashes": lambda path: "//upstream/a" + path,
}

OTHERS = ("with a dot behind", "with an extension", "in upper case", "in title case", "as a model's id")
"""These name something else to every server."""

REFUSED = ("400 invalid_url", "400 bad_request", "404 unknown_url", "404 model_not_found", "405 method_not_allowed")


def asking(method: str, target: str, *headers: str) -> bytes:
    """A request that would be served if the target were."""
    lines = ["Host: h", "model-override: a", "Content-Length: 14", *headers]
    return request(f"{method} {target} HTTP/1.1", *lines, body=BODY)


async def ask(wire: Wire, client: Client, sent: bytes, method: str = "POST") -> tuple[Answer, Client]:
    """Send it, on another connection if this one has been closed."""
    await client.send(sent)
    answer = await client.answer(method)
    if answer is None:
        client = await wire.connect()
        await client.send(sent)
        answer = await client.answer(method)
    assert answer is not None
    if answer.get("connection") == "close":
        client = await wire.connect()
    return answer, client


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_spelling_of_a_development_endpoint_passes(spelling: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for path in DEVELOPMENT:
            target = SPELLINGS[spelling](path)
            for method in ("POST", "GET"):
                answer, client = await ask(wire, client, asking(method, target))
                # What is none in any reading may pass, if it is in one of the trees that are forwarded.
                passes = spelling in OTHERS and target.startswith(("/v1/", "/inference/v1/"))
                assert said(answer) in (("200", *REFUSED) if passes else REFUSED), target

    play(tmp_path, scenario, ok)


@pytest.mark.parametrize(
    "method",
    ["HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "sleep", "post", "PRI", "PURGE", "WEBSOCKET"],
)
def test_no_method_makes_one_pass(method: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        for path in DEVELOPMENT:
            for target in (path, f"/upstream/a{path}"):
                # A connection each: what HEAD and CONNECT leave on one is another matter.
                client = await wire.connect()
                await client.send(asking(method, target, "Connection: close"))
                answer = await client.rest()
                assert answer.startswith(
                    (b"HTTP/1.1 4", b"HTTP/1.0 4") + ((b"HTTP/1.1 204",) if method == "OPTIONS" else ())
                )
                client.close()
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok)


OVERRIDES = [
    "X-HTTP-Method-Override: DELETE",
    "X-HTTP-Method: PUT",
    "X-Method-Override: PATCH",
    "_method: DELETE",
    "X-Original-URL: {}",
    "X-Rewrite-URL: {}",
    "X-Override-URL: {}",
    "X-Original-URI: {}",
    "X-Forwarded-Path: {}",
    "X-Forwarded-Prefix: {}",
    "X-Forwarded-Uri: {}",
    "X-Script-Name: {}",
    "SCRIPT_NAME: {}",
    "PATH_INFO: {}",
    "Destination: {}",
    "Referer: http://localhost{}",
    "Location: {}",
    "Content-Location: {}",
    "X-Accel-Redirect: {}",
    "X-Sendfile: {}",
    "X-Host: localhost{}",
    "Forwarded: for=127.0.0.1;proto=http;path={}",
    "Base-Url: {}",
    "X-Real-IP: 127.0.0.1",
    "X-Forwarded-For: 127.0.0.1",
    "Host: localhost{}",
    ":path: {}",
    "Request-Uri: {}",
]


@pytest.mark.parametrize("override", OVERRIDES)
def test_no_header_changes_what_is_asked_for(override: str, tmp_path: Path) -> None:
    """The request goes where its first line says, or nowhere."""

    async def scenario(wire: Wire) -> None:
        for path in DEVELOPMENT:
            client = await wire.connect()
            sent = post(BODY, override.format(path))
            if override.startswith("Host"):
                sent = sent.replace(b"Host: h\r\n", b"")
            await client.send(sent)
            answer = await client.answer()
            assert answer is not None
            assert answer.status in (200, 400)
            client.close()
        assert all(asked.method == "POST" for asked in wire.engine.asked)
        assert set(wire.engine.targets) <= {"/v1/completions"}

    play(tmp_path, scenario, ok)


WEBSOCKET = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)
H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA")
UPGRADES = {
    "websocket": WEBSOCKET,
    "WebSocket": ("Connection: upgrade", "Upgrade: WebSocket", *WEBSOCKET[2:]),
    "websocket without its connection": WEBSOCKET[1:],
    "websocket and h2c": ("Connection: Upgrade", "Upgrade: websocket, h2c", *WEBSOCKET[2:]),
    "h2c": H2C,
    "TLS": ("Connection: Upgrade", "Upgrade: TLS/1.0"),
    "HTTP/2.0": ("Connection: Upgrade", "Upgrade: HTTP/2.0"),
    "anything": ("Connection: Upgrade", "Upgrade: x"),
    "nothing": ("Connection: Upgrade", "Upgrade:"),
    "a connection alone": ("Connection: Upgrade",),
}  # fmt: skip


@pytest.mark.parametrize("upgrade", UPGRADES)
def test_no_upgrade_opens_a_tunnel_to_one(upgrade: str, tmp_path: Path) -> None:
    """And what comes behind it on the connection is no tunnel's."""

    async def scenario(wire: Wire) -> None:
        for path in DEVELOPMENT:
            for target in (path, f"{path}?model=a", f"/upstream/a{path}", f"/v1/realtime/..{path}"):
                for method in ("GET", "POST"):
                    client = await wire.connect()
                    lines = ["Host: h", *UPGRADES[upgrade], "model-override: a", "Connection: close"]
                    await client.send(request(f"{method} {target} HTTP/1.1", *lines) + asking("POST", path))
                    got = await client.rest()
                    assert got.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
                    assert b" 101 " not in got
                    client.close()
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("*", ("400 invalid_url", "404 unknown_url")),
        ("localhost:80", "400 invalid_url"),
        ("http://localhost/v1/completions", "400 invalid_url"),
        ("https://localhost/v1/completions", "400 invalid_url"),
        ("v1/completions", "400 invalid_url"),
        ("?model=a", "400 invalid_url"),
        ("//v1/completions", "400 invalid_url"),
        ("/v1//completions", "400 invalid_url"),
        ("/v1/./completions", "400 invalid_url"),
        ("/v1/../v1/completions", "400 invalid_url"),
        ("/v1/completions;x", "400 invalid_url"),
        ("/v1/completion%73", "400 invalid_url"),
        ("/v1\\completions", "400 invalid_url"),
        ("/v1/completions#x", "400 invalid_url"),
        ("/v1/completions?x#y", "400 invalid_url"),
        ("/v1/{completions}", "400 invalid_url"),
        ("/v1/<completions>", "400 invalid_url"),
        ("/v1/completions|x", "400 invalid_url"),
        ("/v1/completions/", "404 unknown_url"),
        ("/V1/completions", "404 unknown_url"),
        ("/", "404 unknown_url"),
        ("/v1", "404 unknown_url"),
        ("/docs", "404 unknown_url"),
        ("/metrics", "404 unknown_url"),
        ("/openapi.json", "404 unknown_url"),
        ("/control/status", "404 unknown_url"),
        ("/upstream", ("404 unknown_url", "404 model_not_found")),
        ("/upstream/", ("404 unknown_url", "404 model_not_found")),
        ("/upstream/a", ("404 unknown_url", "404 model_not_found")),
        ("/upstream/z/v1/completions", "404 model_not_found"),
    ],
)
def test_targets_that_are_not_served(target: str, expected: str | tuple[str, ...], tmp_path: Path) -> None:
    """The connection stays good if there is no body that would have to be read first."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for sent in (get(target, "model-override: a", method="POST"), asking("POST", target)):
            await client.send(sent)
            answer = await client.answer()
            assert answer is not None
            assert said(answer) in ((expected,) if isinstance(expected, str) else expected)
        assert wire.engine.received == 0

    play(tmp_path, scenario, ok)


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        ("/v1/completions", "/v1/completions"),
        ("/v1/completions?a=%2e%2e%2fsleep&b=c/../d", "/v1/completions?a=%2e%2e%2fsleep&b=c/../d"),
        ("/tokenize", "/tokenize"),
        ("/v2/rerank", "/v2/rerank"),
        ("/upstream/a/v1/completions", "/v1/completions"),
        ("/upstream/a/v1/completions?x=y", "/v1/completions?x=y"),
        ("/upstream/a/tokenize", "/tokenize"),
    ],
)
def test_targets_that_are(target: str, reached: str, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post(BODY, target=target))
        answer = await client.answer()
        assert answer is not None
        assert answer.status == 200
        assert wire.engine.targets == [reached]

    play(tmp_path, scenario, ok)
