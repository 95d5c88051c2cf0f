"""A model's own address, and what of an engine can be reached there or at all."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmuxd.proxy import routes
from llmuxd.proxy.errors import Rejected
from llmuxd.proxy.routes import Action, Route, is_anthropic, route
from tests.vllm_paths import DEVELOPMENT, METHODS, ONLY_UPSTREAM, SERVED, STREAMED

NAMES = {"a", "a/b", "org/name", "v1", "sleep", "llama-3.1:8b"}


def outcome(method: str, target: str) -> Route | Rejected:
    try:
        return route(method, target, NAMES)
    except Rejected as refused:
        return refused


def rejected(method: str, target: str) -> Rejected:
    refused = outcome(method, target)
    assert isinstance(refused, Rejected)
    return refused


@pytest.mark.parametrize("path", SERVED)
def test_what_vllm_serves_is_forwarded(path: str) -> None:
    found = route(SERVED[path], path, NAMES)
    assert (found.action, found.target) == (Action.FORWARD, path)


@pytest.mark.parametrize("path", [*SERVED, *ONLY_UPSTREAM, "/health", "/v1/models"])
def test_under_a_models_address_its_engine_is_asked(path: str) -> None:
    method = {**SERVED, **ONLY_UPSTREAM}.get(path, "GET")
    for name, query in itertools.product(NAMES, ("", "stream=true&x=%2F")):
        target = f"/upstream/{name}{path}" + (query and "?" + query)
        found = route(method, target, NAMES)
        assert (found.action, found.model, found.path, found.query) == (Action.FORWARD, name, path, query)
        assert route("OPTIONS", target, NAMES).action is Action.OPTIONS


@pytest.mark.parametrize("path", DEVELOPMENT)
def test_development_endpoints_are_not_there_for_any_method(path: str) -> None:
    addresses = ["", *(f"/upstream/{name}" for name in NAMES), "/upstream/a/upstream/a"]
    for address, query, method in itertools.product(addresses, ("", "?model=a"), METHODS):
        refused = rejected(method, address + path + query)
        assert (refused.status, refused.code) == (404, "unknown_url")


WAYS = [
    "{}/", "/.{}", "/..{}", "/v1/..{}", "/v1/%2e%2e{}", "/{}", "/%2e{}", "{}%20", "{};x", "{}?", "{}#x", "\\..{}", "/v1/..%2f..{}",
    "/v1/completions/../..{}", "{}/.", "{}/..", "{}%00", "/v1{}/", "/;{}",
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_nor_by_any_other_way(way: str) -> None:
    for name, path, method in itertools.product(("a", "org/name"), DEVELOPMENT, METHODS):
        refused = rejected(method, f"/upstream/{name}" + way.replace("{}", path))
        assert refused.code in ("unknown_url", "invalid_url")


@pytest.mark.parametrize(
    "target",
    [
        "/upstream/",
        "/upstream/a",
        "/upstream/a/",
        "/upstream/b/v1/completions",
        "/upstream/A/v1/completions",
        "/upstream/org/v1/x",
    ],
)
def test_an_address_of_no_model(target: str) -> None:
    refused = rejected("POST", target)
    assert refused.status == 404
    assert refused.code == ("unknown_url" if target == "/upstream/a/" else "model_not_found")
    with pytest.raises(Rejected):
        route("POST", "/upstream/a/v1/completions")


def test_upstream_is_no_address_by_itself() -> None:
    for target in ("/upstream", "/Upstream/a/v1/completions", "/upstreams/a/v1/completions"):
        assert rejected("POST", target).code == "unknown_url"
    assert route("POST", "/v1/upstream/a", NAMES) == Route(Action.FORWARD, "/v1/upstream/a", "")


def test_of_two_names_the_longer_one_counts() -> None:
    assert route("POST", "/upstream/a/b/v1/completions", NAMES).model == "a/b"
    assert route("POST", "/upstream/a/v1/b", NAMES) == Route(Action.FORWARD, "/v1/b", "", "a")
    assert route("POST", "/upstream/v1/v1/completions", NAMES).model == "v1"
    assert rejected("POST", "/upstream/a/b/c/v1/completions").code == "unknown_url"


def test_a_long_address_is_looked_through_once() -> None:
    class Names(set[str]):
        asked = 0

        def __contains__(self, name: object) -> bool:
            self.asked += len(str(name))
            return super().__contains__(name)

    names = Names({"m" * 512, "m" * 513})
    with pytest.raises(Rejected, match=r"^no model is named x:"):
        route("GET", "/upstream/" + "x/" * 32_000 + "v1", names)
    assert names.asked < 100_000
    assert route("GET", f"/upstream/{'m' * 512}/v1/x", names).model == "m" * 512
    with pytest.raises(Rejected, match=r"^no model is named m{200}:"):
        route("GET", f"/upstream/{'m' * 513}/v1/x", names)


@settings(derandomize=True, database=None, max_examples=300)
@given(
    st.sampled_from(METHODS),
    st.lists(
        st.sampled_from(
            ["/", "a", "b", "org/name", "v1", "/v1/", "sleep", "/sleep", "..", "metrics", "/upstream/", "x", "%2f", "?"]
        ),
        max_size=7,
    ).map("".join),
)
def test_what_is_forwarded_there_is_on_the_list(method: str, rest: str) -> None:
    found = outcome(method, "/upstream/" + rest)
    if isinstance(found, Rejected):
        assert found.status in (400, 404)
        return
    assert found.action is (Action.OPTIONS if method == "OPTIONS" else Action.FORWARD)
    assert "/upstream/" + found.model + found.target == "/upstream/" + rest
    assert found.model in NAMES
    assert found.path not in DEVELOPMENT
    assert found.path in {*SERVED, *ONLY_UPSTREAM, "/health"} or found.path.startswith(
        ("/v1/", "/v2/", "/inference/v1/")
    )


def test_which_paths_answer_by_events() -> None:
    assert routes.STREAMED == STREAMED
    assert {*SERVED, *ONLY_UPSTREAM} >= STREAMED


@pytest.mark.parametrize("path", [*SERVED, *ONLY_UPSTREAM])
def test_whose_api_it_is(path: str) -> None:
    assert is_anthropic(path) == (path.startswith("/v1/messages"))
