"""What the proxy forwards, what it answers itself, and what no spelling of a target gets through it."""

from __future__ import annotations

import itertools
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from llmuxd.proxy.errors import Rejected
from llmuxd.proxy.routes import Action, Route, route
from tests.vllm_paths import DEVELOPMENT, METHODS, ONLY_UPSTREAM

FORWARDED = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/realtime?model=a",
    "/v1/responses/resp_1-a.b~c/cancel",
    "/v1/audio/transcriptions",
    "/v1/x?model=a&b=%2F..%2f&c=[]",
    "/v1/x?a=?",
    "/v1/a:b@c,d=e+f$g!h'i(j)*k&l",
    "/v1/.../x",
    "/tokenize",
    "/detokenize",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
    "/v2/rerank",
    "/v2/embed",
    "/inference/v1/generate",
]

SPELLINGS = [
    "{}",
    "{}/",
    "{}?model=a",
    "/{}",
    "//host{}",
    "/v1{}/../..{}",
    "/v1/..{}",
    "/v1/./..{}",
    "/v1/%2e%2e{}",
    "/v1/%2E.{}",
    "/v1/..%2f..{}",
    "/v1/..%5c..{}",
    "/v1\\..{}",
    "/v1/x/..;/..{}",
    "/v1;x/..{}",
    "/%76%31/..{}",
    "/./{}",
    "http://127.0.0.1{}",
    "http://127.0.0.1:3000/v1/..{}",
    "{}#/v1/x",
    "/v1/x#{}",
    "{}%00",
    "{}%20",
    "{}\t",
    " {}",
    "{};x=1",
    "/v1/x\r\n{}",
    "/v1/\u0130/..{}",
    "/v1/\udcff/..{}",
]


@pytest.mark.parametrize("target", FORWARDED)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_forwarded(method: str, target: str) -> None:
    found = route(method, target)
    path, _, query = target.partition("?")
    assert (found.action, found.path, found.query) == (Action.FORWARD, path, query)
    assert (found.target, found.model) == (target, "")
    assert route(method, target) == found, "asked again"


@pytest.mark.parametrize("target", FORWARDED)
def test_what_is_forwarded_is_sent_as_it_is_spelled(target: str) -> None:
    assert URL("http://localhost" + target, encoded=True).raw_path_qs == target


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_never_forwarded(spelling: str) -> None:
    for path, method in itertools.product([*DEVELOPMENT, *ONLY_UPSTREAM], METHODS):
        with pytest.raises(Rejected) as rejected:
            route(method, spelling.replace("{}", path))
        assert rejected.value.status in (400, 404)


def test_no_letter_of_a_development_endpoint_may_be_escaped() -> None:
    name = "load_lora_adapter"
    for at, case in itertools.product(range(len(name)), ("{:02x}", "{:02X}")):
        escaped = name[:at] + "%" + case.format(ord(name[at])) + name[at + 1 :]
        assert unquote(escaped) == name
        with pytest.raises(Rejected):
            route("POST", f"/v1/{escaped}")


def readings(path: str) -> set[str]:
    """How servers may understand a path: decoded once or more, slashes merged, dot segments resolved."""
    found = {path}
    for _ in range(3):
        path = unquote(path).replace("\\", "/")
        segments: list[str] = []
        for segment in path.split("/"):
            if segment == "..":
                segments = segments[:-1]
            elif segment not in ("", "."):
                segments.append(segment.partition(";")[0])
        found |= {path, "/" + "/".join(segments)}
    return found


PIECES = [
    "/", "//", "/v1", "/v2", "/inference/v1", ".", "..", "%2e", "%2E%2e", "%2f", "%252f", "\\", "%5c", ";", "?", "#", "@",
    ":", "sleep", "wake_up", "tokenize", "load_lora_adapter", "abort_requests", "\x00", "\t", " ", "x", "%", "%%", "é", "*",
    "http:",
]  # fmt: skip


def outcome(target: str) -> Route | Rejected:
    try:
        return route("POST", target)
    except Rejected as rejected:
        return rejected


@settings(derandomize=True, database=None, max_examples=500)
@given(
    st.sampled_from(["", "/v1/", "/v2/x", "/inference/v1/", "/tokenize"]),
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(max_size=20),
)
def test_what_is_forwarded_has_one_reading_and_is_on_the_list(begin: str, rest: str) -> None:
    target = begin + rest
    found = outcome(target)
    if isinstance(found, Rejected):
        assert found.status in (400, 404, 405)
        return
    assert found.action is Action.FORWARD
    path = target.partition("?")[0]
    assert readings(path) == {path}
    assert path not in DEVELOPMENT
    assert path in FORWARDED or path.startswith(("/v1/", "/v2/", "/inference/v1/"))
    assert URL("http://localhost" + target, encoded=True).raw_path_qs == target


@pytest.mark.parametrize("target", [*FORWARDED, "/v1/models", "/v1/models/a", "/health"])
def test_what_may_be_done_is_told_here(target: str) -> None:
    assert route("OPTIONS", target).action is Action.OPTIONS


@pytest.mark.parametrize(
    ("path", "response"),
    [
        ("/v1/responses/resp_1-a", "resp_1-a"),
        ("/v1/responses/resp_1/cancel", "resp_1"),
        ("/v1/responses/resp_1/input_items", "resp_1"),
        ("/v1/responses/" + "x" * 128, "x" * 128),
        ("/v1/responses/renderer", "renderer"),
        ("/v1/responses", ""),
        ("/v1/responses/render", ""),
        ("/v1/responses/" + "x" * 129, ""),
        ("/v1/responses/resp_1.a", ""),
        ("/v1/responses/resp_1/a/b", ""),
        ("/v1/completions/resp_1", ""),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_which_stored_response_it_is_about(method: str, path: str, response: str) -> None:
    found = route(method, path)
    assert (found.action, found.response) == (Action.FORWARD, response)
    assert route(method, "/upstream/a" + path, {"a"}).response == response


@pytest.mark.parametrize(
    "target", ["/", "/v1", "/v1/", "/v1/completions/", "/V1/completions", "/tokenize/x", "/docs", "/v3/x"]
)
def test_not_here(target: str) -> None:
    with pytest.raises(Rejected) as rejected:
        route("POST", target)
    assert (rejected.value.status, rejected.value.code) == (404, "unknown_url")


@pytest.mark.parametrize("target", ["", "*", "v1/x", "/v1//x", "/v1/x?", "/v1/x?a b", "/v1/x?a#b", "/v1/é", "/v1/%61"])
def test_malformed(target: str) -> None:
    with pytest.raises(Rejected) as rejected:
        route("POST", target)
    assert (rejected.value.status, rejected.value.code) == (400, "invalid_url")
    assert str(rejected.value).isascii()


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "BREW", "get", ""])
def test_methods_that_are_not_served(method: str) -> None:
    with pytest.raises(Rejected) as rejected:
        route(method, "/v1/completions")
    assert rejected.value.status == 400


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_answered_here(method: str) -> None:
    assert route(method, "/health").action is Action.HEALTH
    assert route(method, "/v1/models").action is Action.LIST_MODELS
    for model in ("a", "org/name", "a b", "é", "..", "../../sleep", "a%2Fb"):
        found = route(method, "/v1/models/" + quote(model, safe=""))
        assert (found.action, found.model) == (Action.SHOW_MODEL, model)
    assert route(method, "/v1/models/org/name").model == "org/name"


@pytest.mark.parametrize("target", ["/health", "/v1/models"])
def test_answered_here_is_only_read(target: str) -> None:
    with pytest.raises(Rejected) as rejected:
        route("POST", target)
    assert rejected.value.status == 405
