"""Which model a request names, and what is said of one that names none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.proxy_looking import FORM, FORM_END, JSON, code_of, outcome, part, wanted


def test_the_header_wins_over_the_query_over_the_body() -> None:
    body = b'{"model": "body"}'
    assert wanted(body, named="header", query="model=query").model == "header"
    assert wanted(body, query="x=1&model=query").model == "query"
    assert wanted(body, named="", query="model=").model == "body"
    assert wanted(body, query="model=org%2Fname+x").model == "org/name x"
    assert wanted(body, query="model=a&model=b").model == "b"


def test_a_query_has_a_hundred_parameters_at_most() -> None:
    query = "&".join(["a=1"] * 99 + ["model=a"])
    assert wanted(b"", query=query).model == "a"
    assert code_of(b'{"model": "a"}', query="a=1&" + query) == "invalid_url"


def test_with_a_header_or_a_query_the_body_may_be_anything() -> None:
    for body in (b"", b"{", b"\xff\x00", b"--xyz\r\n", b'{"model"' + b" " * 200_000):
        for content_type in (JSON, FORM, "multipart/form-data", ""):
            assert wanted(body, content_type, named="a") == ("a", False)
            assert wanted(body, content_type, query="model=a", encoded=True) == ("a", False)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model": "a"}', "a"),
        (b' {"x": {"model": "no"}, "model" :\n"a/b"} ', "a/b"),
        (b'{"model": "a", "model": "b"}', "b"),
        (b'{"model": "\\u00e9"}', "\u00e9"),
        ('{"model": "\u00e9"}'.encode(), "\u00e9"),
        ('{"model": "a"}'.encode("utf-16"), "a"),
    ],
)
@pytest.mark.parametrize("content_type", [JSON, "", "text/plain", "application/json; charset=utf-8"])
def test_json(body: bytes, model: str, content_type: str) -> None:
    assert wanted(body, content_type).model == model


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "model_required"),
        (b"{}", "model_required"),
        (b"[]", "model_required"),
        (b'"a"', "model_required"),
        (b'{"model": null}', "model_required"),
        (b'{"model": ""}', "model_required"),
        (b'{"model": 1}', "invalid_model"),
        (b'{"model": ["a"]}', "invalid_model"),
        (b"{", "invalid_json"),
        (b'{"model": "a"} x', "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"model=a", "invalid_json"),
    ],
)
def test_json_that_names_none(body: bytes, code: str) -> None:
    assert code_of(body) == code


def test_a_compressed_body_is_not_looked_into() -> None:
    assert code_of(b"\x1f\x8b", encoded=True) == "unreadable_body"


@settings(derandomize=True, database=None, deadline=None)
@given(
    st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.booleans()),
    st.text(min_size=1),
)
def test_any_json_object(others: dict[str, object], model: str) -> None:
    assert wanted(json.dumps({**others, "model": model}).encode()).model == model


@settings(derandomize=True, database=None, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([JSON, FORM, ""]))
def test_any_bytes_are_a_model_or_a_400(body: bytes, content_type: str) -> None:
    for whole in (body, b"--xyz\r\n" + body, part("model", body) + FORM_END):
        found = outcome(whole, content_type)
        assert isinstance(found, str) or found.model


@settings(derandomize=True, database=None, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60), st.binary(max_size=60))
def test_no_type_and_no_query_breaks_it(content_type: str, query: str, body: bytes) -> None:
    for kind in (content_type, "multipart/form-data" + content_type, "multipart/form-data; boundary=" + content_type):
        found = outcome(body, kind, query=query)
        assert isinstance(found, str) or found.model


@pytest.mark.parametrize(
    ("body", "stream"),
    [
        (b'{"model": "a", "stream": true}', True),
        (b' \n{"stream":true,"model":"a"}', True),
        (b'{"model": "a", "stream": false}', False),
        (b'{"model": "a", "stream": 1}', False),
        (b'{"model": "a", "stream": "true"}', False),
        (b'{"model": "a", "x": {"stream": true}}', False),
        (b'{"model": "a", "stream": true, "stream": null}', False),
        (b'{"model": "a", "stream": true, "x": "' + b"x" * 200_000 + b'"}', True),
        (b'{"model": "a"}', False),
    ],
)
def test_whether_a_stream_is_asked_for(body: bytes, stream: bool) -> None:
    assert wanted(body) == ("a", stream)
    assert wanted(body, named="b") == ("b", stream)
    assert wanted(body, query="model=b") == ("b", stream)
    assert wanted(body, named="b", encoded=True) == ("b", False)


@pytest.mark.parametrize(
    "body", [b'{"stream": true', b'{"stream"', b'["stream"]', b"", b'{"stream": ' + b"[" * 100_000]
)
def test_a_body_that_need_not_be_read_asks_for_no_stream(body: bytes) -> None:
    assert wanted(body, named="a") == ("a", False)
