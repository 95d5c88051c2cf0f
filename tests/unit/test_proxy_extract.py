"""Which model a request names, and what is said of one that names none."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmuxd.proxy.errors import Rejected
from llmuxd.proxy.extract import wanted

JSON = "application/json"
FORM = "multipart/form-data; boundary=xyz"


def of_body(body: bytes, content_type: str = JSON) -> str:
    return wanted(None, "", content_type, False, body).model


def code_of(body: bytes, content_type: str = JSON, encoded: bool = False) -> str:
    with pytest.raises(Rejected) as rejected:
        wanted(None, "", content_type, encoded, body)
    assert rejected.value.status == 400
    return rejected.value.code


def part(name: str, value: bytes, extra: str = "") -> bytes:
    return f'--xyz\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + value + b"\r\n"


END = b"--xyz--\r\n"


def test_the_header_wins_over_the_query_over_the_body() -> None:
    body = b'{"model": "body"}'
    assert wanted("header", "model=query", JSON, False, body).model == "header"
    assert wanted(None, "x=1&model=query", JSON, False, body).model == "query"
    assert wanted("", "model=", JSON, False, body).model == "body"
    assert wanted(None, "model=org%2Fname+x", JSON, False, body).model == "org/name x"
    assert wanted(None, "model=a&model=b", JSON, False, body).model == "b"


def test_with_a_header_or_a_query_the_body_may_be_anything() -> None:
    for body in (b"", b"{", b"\xff\x00"):
        assert wanted("a", "", JSON, False, body).model == "a"
        assert wanted(None, "model=a", FORM, True, body).model == "a"


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
    assert of_body(body, content_type) == model


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


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (part("model", b"a") + END, "a"),
        (part("file", b"x", '; filename="f"') + part("model", b"a") + END, "a"),
        (part("model", b"a") + part("model", b"b") + END, "b"),
        (part("model", b"a") + part("file", b"\r\n--xyzzy\r\n\r\n--xy\r\nno", '; filename="f"') + END, "a"),
        (part("file", b'\r\n--xyzname="model"\r\n\r\nno', '; filename="f"') + part("model", b"a") + END, "a"),
        (b"preamble\r\n" + part("model", b"a") + END + b"epilogue", "a"),
        (b"\r\n" + part("model", b"a") + END[:-2], "a"),
        (b"--xyz \t\r\nContent-Disposition: form-data; name=model\r\n\r\na\r\n" + END, "a"),
        (b'--xyz\r\ncontent-type: text/plain\r\nCONTENT-DISPOSITION: form-data; name="model"\r\n\r\na\r\n' + END, "a"),
        (b"--xyz\r\n\r\n\r\n" + part("model", b"a") + END, "a"),
        (part("model", "\u00e9".encode()) + END, "\u00e9"),
        (part("model", b"a\r\nb") + END, "a\r\nb"),
    ],
)
def test_form(body: bytes, model: str) -> None:
    assert of_body(body, FORM) == model


@pytest.mark.parametrize("content_type", ['multipart/form-data; boundary="xyz"', "Multipart/Form-Data;BOUNDARY=xyz"])
def test_form_boundaries(content_type: str) -> None:
    assert of_body(part("model", b"a") + END, content_type) == "a"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"no delimiter", "model_required"),
        (END, "model_required"),
        (part("file", b"x") + END, "model_required"),
        (part("model", b"") + END, "model_required"),
        (part("model", b"a"), "invalid_form"),
        (part("model", b"a") + b"--xyzzy", "invalid_form"),
        (b"--xyz\r\nno head\r\n" + END, "invalid_form"),
        (b"--xyz\r\nX: " + b"y" * 20_000 + b"\r\n\r\n\r\n" + END, "invalid_form"),
        (part("model", b"a", '; filename="f"') + END, "invalid_model"),
        (part("model", b"\xff") + END, "invalid_model"),
    ],
)
def test_forms_that_name_none(body: bytes, code: str) -> None:
    assert code_of(body, FORM) == code


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=\u00e9"]
)
def test_forms_without_a_boundary(content_type: str) -> None:
    assert code_of(part("model", b"a") + END, content_type) == "invalid_form"


def test_a_large_upload_does_not_hold_up_the_loop() -> None:
    body = part("file", bytes(range(256)) * (48 << 12), '; filename="f"') + part("model", b"a") + END
    took = []
    for _ in range(3):
        began = time.process_time()
        assert of_body(body, FORM) == "a"
        took.append(time.process_time() - began)
    assert min(took) < 0.25, "it looks at every byte of 48 MiB by itself"


@settings(derandomize=True, database=None, deadline=None)
@given(
    st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.booleans()),
    st.text(min_size=1),
)
def test_any_json_object(others: dict[str, object], model: str) -> None:
    assert of_body(json.dumps({**others, "model": model}).encode()) == model


def outcome(body: bytes, content_type: str) -> str | Rejected:
    try:
        return of_body(body, content_type)
    except Rejected as rejected:
        return rejected


@settings(derandomize=True, database=None, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([JSON, FORM, ""]))
def test_any_bytes_are_a_model_or_a_400(body: bytes, content_type: str) -> None:
    for whole in (body, b"--xyz\r\n" + body, part("model", body) + END):
        found = outcome(whole, content_type)
        assert found if isinstance(found, str) else found.status == 400


@pytest.mark.parametrize(
    ("body", "stream"),
    [
        (b'{"model": "a", "stream": true}', True),
        (b' \n{"stream":true,"model":"a"}', True),
        (b'{"model": "a", "stream": false}', False),
        (b'{"model": "a", "stream": 1}', False),
        (b'{"model": "a", "x": {"stream": true}}', False),
        (b'{"model": "a", "stream": true, "stream": null}', False),
        (b'{"model": "a"}', False),
    ],
)
def test_whether_a_stream_is_asked_for(body: bytes, stream: bool) -> None:
    assert wanted(None, "", JSON, False, body) == ("a", stream)
    assert wanted("b", "", JSON, False, body) == ("b", stream)
    assert wanted(None, "model=b", JSON, False, body) == ("b", stream)
    assert wanted("b", "", JSON, True, body) == ("b", False)


@pytest.mark.parametrize(
    "body", [b'{"stream": true', b'{"stream"', b'["stream"]', b"", b'{"stream": ' + b"[" * 100_000]
)
def test_a_body_that_need_not_be_read_asks_for_no_stream(body: bytes) -> None:
    assert wanted("a", "", JSON, False, body) == ("a", False)
