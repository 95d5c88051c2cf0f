"""Which model a form names, and whether it asks for a stream: as vLLM's server reads it, in short steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.proxy_looking import FORM, FORM_END, code_of, outcome, part, wanted, work_of

MiB = 1 << 20


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (part("model", b"a") + FORM_END, "a"),
        (part("file", b"x", '; filename="f"') + part("model", b"a") + FORM_END, "a"),
        (part("model", b"a") + part("model", b"b") + FORM_END, "b"),
        (part("model", b"a") + part("file", b"\r\n--xyzzy\r\n\r\n--xy\r\nno", '; filename="f"') + FORM_END, "a"),
        (part("file", b'\r\n--xyzname="model"\r\n\r\nno', '; filename="f"') + part("model", b"a") + FORM_END, "a"),
        (b"preamble\r\n" + part("model", b"a") + FORM_END + b"epilogue", "a"),
        (b"\r\n" + part("model", b"a") + FORM_END[:-2], "a"),
        (b"--xyz \t\r\nContent-Disposition: form-data; name=model\r\n\r\na\r\n" + FORM_END, "a"),
        (
            b'--xyz\r\ncontent-type: text/plain\r\nCONTENT-DISPOSITION: form-data; name="model"\r\n\r\na\r\n'
            + FORM_END,
            "a",
        ),
        (b"--xyz\r\n\r\n\r\n" + part("model", b"a") + FORM_END, "a"),
        (part("model", "\u00e9".encode()) + FORM_END, "\u00e9"),
        (part("model", b"a\r\nb") + FORM_END, "a\r\nb"),
    ],
)
def test_form(body: bytes, model: str) -> None:
    assert wanted(body, FORM).model == model


@pytest.mark.parametrize("content_type", ['multipart/form-data; boundary="xyz"', "Multipart/Form-Data;BOUNDARY=xyz"])
def test_form_boundaries(content_type: str) -> None:
    assert wanted(part("model", b"a") + FORM_END, content_type).model == "a"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"no delimiter", "model_required"),
        (FORM_END, "model_required"),
        (part("file", b"x") + FORM_END, "model_required"),
        (part("model", b"") + FORM_END, "model_required"),
        (part("model", b"a"), "invalid_form"),
        (part("model", b"a") + b"--xyzzy", "invalid_form"),
        (b"--xyz\r\nno head\r\n" + FORM_END, "invalid_form"),
        (b"--xyz\r\nX: " + b"y" * 20_000 + b"\r\n\r\n\r\n" + FORM_END, "invalid_form"),
        (part("model", b"a", '; filename="f"') + FORM_END, "invalid_model"),
        (part("model", b"\xff") + FORM_END, "invalid_model"),
    ],
)
def test_forms_that_name_none(body: bytes, code: str) -> None:
    assert code_of(body, FORM) == code


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=\u00e9"]
)
def test_forms_without_a_boundary(content_type: str) -> None:
    assert code_of(part("model", b"a") + FORM_END, content_type) == "invalid_form"


def test_a_boundary_may_be_as_long_as_vllm_takes_it() -> None:
    for length, good in ((256, True), (257, False), (5000, False)):
        body = (part("model", b"a") + FORM_END).replace(b"xyz", b"b" * length)
        assert outcome(body, "multipart/form-data; boundary=" + "b" * length) == (
            ("a", False) if good else "invalid_form"
        )


@pytest.mark.parametrize(
    ("said", "model"),
    [
        (b'form-data; name="model"', "a"),
        (b"form-data;name=model", "a"),
        (b"form-data ;\tNAME =\tmodel \t", "a"),
        (b'form-data; name="x"; name="model"', "a"),
        (b'form-data; x="a;name=\\"no\\";b"; name="model"', "a"),
        (b'; name="model"', "a"),
        (b'form-data; name="model"; x="', "a"),
        (b"form-data; name*=utf-8''model", None),
        (b'form-data; name="model"; name="x"', None),
        (b'form-data; name="model', None),
        (b'form-data; name="model"x', None),
        (b'form-data; x="; name="model"', None),
        (b"form-data; xname=model", None),
        (b'form-data; name=" model"', None),
        (b"form-data; name", None),
        (b"form-data", None),
        (b"", None),
    ],
)
def test_what_the_head_of_a_part_says(said: bytes, model: str | None) -> None:
    body = b"--xyz\r\nContent-Disposition: " + said + b"\r\n\r\na\r\n" + FORM_END
    assert outcome(body, FORM) == ((model, False) if model else "model_required")


def test_of_several_dispositions_the_last_counts() -> None:
    twice = b"--xyz\r\nContent-Disposition: x; name=%b\r\nContent-Disposition: x; name=%b\r\n\r\na\r\n" + FORM_END
    assert wanted(twice % (b"x", b"model"), FORM).model == "a"
    assert code_of(twice % (b"model", b"x"), FORM) == "model_required"
    other = b"--xyz\r\nX-Content-Disposition: x; name=model\r\n\r\na\r\n" + FORM_END
    assert code_of(other, FORM) == "model_required"


@pytest.mark.parametrize(
    ("value", "stream"),
    [(b"true", True), (b"True", True), (b" 1\r\n", True), (b"false", False), (b"", False), (b"2", False)],
)
def test_whether_a_form_asks_for_a_stream(value: bytes, stream: bool) -> None:
    body = part("file", b"x" * 1000, '; filename="f"') + part("stream", value) + part("model", b"a") + FORM_END
    assert wanted(body, FORM) == ("a", stream)
    assert wanted(body, FORM, named="b") == ("b", stream)
    assert wanted(body, FORM, query="model=b") == ("b", stream)
    assert wanted(part("stream", b"false") + body, FORM) == ("a", stream), "the last one counts"


def test_a_form_has_as_many_parts_as_vllm_takes() -> None:
    fields = part("x", b"") * 1999 + part("model", b"a")
    assert wanted(fields + FORM_END, FORM).model == "a"
    assert code_of(part("x", b"") + fields + FORM_END, FORM) == "invalid_form"


def test_the_name_of_a_model_is_not_endless() -> None:
    assert len(wanted(part("model", b"x" * 10_000) + FORM_END, FORM).model) == 4096


PARTS = st.lists(
    st.tuples(st.sampled_from(["model", "stream", "file"]), st.binary(max_size=30), st.booleans()),
    min_size=1,
    max_size=6,
)


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(PARTS, st.sampled_from([b"", b"x" * 2 * MiB, b"\r\n--xy", b"\r\n" * 1000]))
def test_any_form(parts: list[tuple[str, bytes, bool]], file: bytes) -> None:
    body = part("file", file, '; filename="f"')
    model, stream = b"", False
    for name, value, is_file in parts:
        value = value.replace(b"xyz", b"")
        body += part(name, value, '; filename="f"' if is_file and name == "file" else "")
        if name == "model":
            model = value
        elif name == "stream":
            stream = value.strip().lower() in (b"true", b"1")
    found = outcome(body + FORM_END, FORM)
    if not model:
        assert found == "model_required"
    else:
        try:
            assert found == (model.decode(), stream)
        except UnicodeDecodeError:
            assert found == "invalid_model"


# Short steps: what takes a millisecond is said in test_proxy_scan.


def fill(piece: bytes, size: int) -> bytes:
    return piece * (size // len(piece))


WORST = {
    "a file": part("file", fill(bytes(range(256)), 8 * MiB), '; filename="f"'),
    "line breaks": part("file", fill(b"\r\n", 2 * MiB)),
    "nearly delimiters": part("file", fill(b"\r\n--xy", 2 * MiB)),
    "what begins as delimiters do": part("file", fill(b"\r\n--xyzz", MiB)),
    "a delimiter that goes on": part("file", b"\r\n--xyz" + fill(b" ", 2 * MiB)),
    "delimiters that go on": part("file", fill(b"\r\n--xyz" + b" " * 65, 2 * MiB)),
    "parts": fill(part("x", b""), MiB),
    "heads without an end": fill(b"--xyz\r\n" + b"X: y\r\n" * 2000, MiB),
    "heads of lines": fill(b"--xyz\r\n" + b"a:\r\n" * 1000 + b"\r\n\r\n", MiB),
    "heads of parameters": fill(b"--xyz\r\nContent-Disposition: form-data" + b";a" * 2000 + b"\r\n\r\n\r\n", MiB),
    "heads of quotes": fill(b'--xyz\r\nContent-Disposition: form-data;a="' + b";" * 4000 + b"\r\n\r\n\r\n", MiB),
}


@pytest.mark.parametrize("name", WORST)
def test_each_step_is_short_whatever_the_form_is_made_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = WORST[name] + part("model", b"a") + FORM_END
    done = work_of(monkeypatch, body, FORM)
    assert max(work.searched for work in done) <= MiB
    assert max(work.matched for work in done) <= 100_000
    assert max(work.calls for work in done) <= 3_000
    total = sum(work.searched for work in done)
    assert total <= 2 * len(body), "it goes over the same bytes again and again"


@pytest.mark.parametrize("piece", [";a", ";a=b", ';"', ';a="', ";", '"', "; ", "=", ';a="\\"', ";*0=a"])
def test_no_head_of_another_part_hides_the_model(piece: str) -> None:
    head = "; name=no" + piece * (3900 // len(piece))
    assert outcome(part("x", b"", head) + part("model", b"a") + FORM_END, FORM) == ("a", False)
