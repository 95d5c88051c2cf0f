"""Keys of large JSON objects, found without decoding the rest: as json.loads finds them, in short steps."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmuxd.proxy import scan
from llmuxd.proxy.scan import find_keys
from tests.unit.proxy_looking import drive, outcome, work_of

KEYS = ("model", "stream")
MiB = 1 << 20
LARGE_BYTES = 128 * 1024
"""What is larger is not decoded."""


def found(body: bytes) -> dict[str, Any]:
    return drive(find_keys(body, KEYS))


@pytest.mark.parametrize(
    ("body", "values"),
    [
        (b"{}", {}),
        (b" \r\n\t{ \t} trailing garbage is the engine's to see", {}),
        (b'{"model":"a"}', {"model": "a"}),
        (b' {\n"stream" : true ,\t"model"\r:\n"a/b" } ', {"model": "a/b", "stream": True}),
        (b'{"model": "a", "model": "b"}', {"model": "b"}),
        (b'{"model": "a", "model": null}', {"model": None}),
        (b'{"\\u006dodel": "a"}', {"model": "a"}),
        (b'{"\\u006D\\u006f\\u0064\\u0065\\u006c": "a"}', {"model": "a"}),
        (b'{"model": "a", "\\u006dodel": "b"}', {"model": "b"}),
        (b'{"mod\\u0065l\\u0000": "a", "Model": "b", "model ": "c", "": "d"}', {}),
        (b'{"x": {"model": "no", "stream": true}, "y": [{"model": "no"}]}', {}),
        (b'{"x": "\\"model\\": \\"no\\"", "model": "a"}', {"model": "a"}),
        (b'{"x": "\\\\", "model": "a", "y": "\\\\\\""}', {"model": "a"}),
        (b'{"x": "}]{[,:", "model": "a"}', {"model": "a"}),
        (b'{"x": ["}", {"]": "["}], "model": "a"}', {"model": "a"}),
        (b'{"x": -1.5e+3, "y": NaN, "model": [1, {"a": "}"}]}', {"model": [1, {"a": "}"}]}),
        (b'{"model": "\\ud83d\\ude00\\n"}', {"model": "\U0001f600\n"}),
        ('{"\u00e9": 1, "model": "\u00e9\U0001f600"}'.encode(), {"model": "\u00e9\U0001f600"}),
    ],
)
def test_keys_and_their_last_values(body: bytes, values: dict[str, Any]) -> None:
    assert found(body) == values
    assert found(bytearray(body)) == values


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b'{"', b'{"model', b'{"model"', b'{"model":', b'{"model": ', b'{"model": "a', b'{"model": "a"',
        b'{"model": "a",', b'{"model": "a", ', b"[]", b'"model"', b"null", b"\xef\xbb\xbf{}", '{"model": "a"}'.encode("utf-16"),
        b'{"model": "a",}', b"{,}", b'{"model"}', b'{"model", "a"}', b'{"model": , "a": 1}', b'{"model": "a" "b"}', b"{model: 1}",
        b'{"model": "\xff"}', b'{"model": "\\x"}', b'{"model": "\n"}', b'{"model": tru}', b'{"model": 01}', b"{1: 2}",
        b'{"\xff": 1}', b'{"\\x": 1}', b'{"a": "\\"}', b'{"a": "\\\\\\"}', b'{"a": [}', b'{"a": [1', b'{"a": ["]}', b'{"a": {"b": "}',
        b'{"model": "m\x00"}', b'{"stream": t\x00r\x00u\x00e\x00}', b'{"a": }', b'{"a": ]}', b"{'model': 1}",
    ],
)  # fmt: skip
def test_no_json_object(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        found(body)


def test_what_is_skipped_is_not_checked() -> None:
    assert found(b'{"a": [}, "b": nonsense, "c": "\x00\xff", "model": "a"} {') == {"model": "a"}


def test_a_value_may_not_be_endless() -> None:
    assert found(b'{"model": "' + b"x" * 16_000 + b'"}')["model"] == "x" * 16_000
    with pytest.raises(ValueError, match="`model` is too long"):
        found(b'{"model": "' + b"x" * 17_000 + b'"}')
    assert found(b'{"model": "' + b"x" * 17_000 + b'", "model": "a"}') == {"model": "a"}
    assert found(b'{"' + b"x" * 17_000 + b'": 1, "model": "a"}') == {"model": "a"}


@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a":', "}")])
def test_what_is_nested_without_end_is_refused_there(opens: str, closes: str) -> None:
    assert found(f'{{"a": {opens * 1000}0{closes * 1000}, "model": "a"}}'.encode()) == {"model": "a"}
    with pytest.raises(ValueError, match="it is nested too deeply at byte") as error:
        found(f'{{"a": {opens * 300_000}'.encode())
    assert int(str(error.value).split()[-1]) < 10_000


def test_what_is_made_of_nothing_but_parts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b"{" + b'"":0,' * 5000 + b'"model":"a"}'
    assert found(body) == {"model": "a"}
    monkeypatch.setattr(scan, "_MAX_PAUSES", 10)
    with pytest.raises(ValueError, match="it has too many parts"):
        found(body)
    large = b'{"a":"' + b"x" * 30 * MiB + b'","model":"a"}'
    assert found(large) == {"model": "a"}, "size alone is nothing"


# What json.loads reads, this reads the same way.

TEXT = st.text(st.sampled_from('modelstrea"\\/{}[],: \n\u00e9\U0001f600\x00'), max_size=12) | st.sampled_from(KEYS)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.lists(st.tuples(TEXT, inner), max_size=4).map(tuple),
    max_leaves=10,
)
"""A tuple of pairs is an object, whose names may come again."""
MEMBERS = st.lists(st.tuples(TEXT, VALUES), max_size=6).map(tuple)

SHORT = {'"': '\\"', "\\": "\\\\", "/": "\\/", "\n": "\\n"}


class Spelling:
    """JSON text as a client may spell it, with any white space and any escapes."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def value(self, value: object) -> str:
        if isinstance(value, str):
            return '"' + "".join(self._letter(letter) for letter in value) + '"'
        if isinstance(value, list):
            return "[" + ",".join(self._spaced(self.value(one)) for one in value) + self._space() + "]"
        if isinstance(value, tuple):
            members = (f"{self.value(key)}{self._space()}:{self._spaced(self.value(one))}" for key, one in value)
            return "{" + ",".join(self._spaced(member) for member in members) + self._space() + "}"
        return json.dumps(value)

    def _letter(self, letter: str) -> str:
        escaped = json.dumps(letter)[1:-1]
        spellings = [escaped, SHORT.get(letter, escaped)]
        if letter >= " " and letter not in '"\\':
            spellings += [letter, letter, letter]
        if ord(letter) < 0x10000:
            spellings.append(f"\\u{ord(letter):04X}")
        return self._random.choice(spellings)

    def _space(self) -> str:
        return self._random.choice(["", "", "", " ", "\n", "\r\n\t "])

    def _spaced(self, text: str) -> str:
        return self._space() + text + self._space()


OBJECTS = st.builds(lambda random, value: Spelling(random).value(value), st.randoms(use_true_random=True), MEMBERS)


def same(one: object, other: object) -> bool:
    # Of NaN, equality says nothing.
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(OBJECTS)
def test_it_agrees_with_json_loads(text: str) -> None:
    value = json.loads(text)
    assert same(found(text.encode()), {key: value[key] for key in KEYS if key in value})


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(OBJECTS, st.data())
def test_whatever_is_done_to_it(text: str, data: st.DataObject) -> None:
    body = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body)))
        body[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"", b'"', b"\\", b"{", b"]", b",", b" ", b"x"])
        )
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    try:
        read = found(bytes(body))
    except ValueError:
        assert not isinstance(value, dict)
    else:
        assert not isinstance(value, dict) or same(read, {key: value[key] for key in KEYS if key in value})


def padded(body: str, at: int, padding: str) -> bytes:
    """The object with a large member more, in front or behind."""
    inner = body.strip()[1:-1]
    comma = "," if inner.strip() else ""
    pad = f'"padding": {padding}'
    return ("{" + (pad + comma + inner if at == 0 else inner + comma + pad) + "}").encode()


PADDING = [
    '"' + "x" * LARGE_BYTES + '"',
    '"' + "\\n" * LARGE_BYTES + '"',
    '"' + '\\"' * LARGE_BYTES + '"',
    '"' + "\\\\" * LARGE_BYTES + '"',
    "[" + "[0, []], " * (LARGE_BYTES // 8) + '"]"]',
    "1" * LARGE_BYTES,
    " " * LARGE_BYTES + "{}",
]


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(OBJECTS, st.sampled_from([0, 1]), st.sampled_from(PADDING))
def test_a_large_body_asks_for_the_same_as_a_small_one(text: str, at: int, padding: str) -> None:
    large = padded(text, at, padding)
    assert len(large) > LARGE_BYTES
    assert outcome(large) == outcome(padded(text, at, "0"))


@pytest.mark.parametrize("padding", PADDING, ids=range(len(PADDING)))
@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ('{"model": "a", "stream": true}', ("a", True)),
        ('{"model": "a", "stream": 1, "model": "b"}', ("b", False)),
        ("{}", "model_required"),
        ('{"model": null}', "model_required"),
        ('{"model": ""}', "model_required"),
        ('{"model": 7}', "invalid_model"),
        ('{"model": "a"', "invalid_json"),
        ('{"model" "a"}', "invalid_json"),
    ],
)
def test_in_a_large_body(body: str, asked: object, padding: str) -> None:
    large = body.replace("{", '{"padding": ' + padding + ("" if body == "{}" else ","), 1).encode()
    assert outcome(large) == asked


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_only_a_small_body_may_be_of_another_encoding_than_utf_8(encoding: str) -> None:
    assert outcome('{"model": "a"}'.encode(encoding)) == ("a", False)
    assert outcome(('{"model": "a", "x": ' + PADDING[0] + "}").encode(encoding)) == "invalid_json"


# Short steps. What takes a millisecond is some 20 MB of a memory search, half a MB of a pattern, a few thousand calls.

END = b',"model":"m"}'
DENSE = 160 * 1024
"""Of what makes a step of every byte or two."""


def fill(piece: bytes, size: int) -> bytes:
    return piece * (size // len(piece))


WORST = {
    "one string": b'{"a":"' + fill(b"x", 16 * MiB) + b'"' + END,
    "a string without an end": b'{"a":"' + fill(b"x", 16 * MiB),
    "a string with line breaks": b'{"a":"' + fill(b"x" * 75 + b"\\n", 16 * MiB) + b'"' + END,
    "a string of line breaks": b'{"a":"' + fill(b"\\n", 8 * MiB) + b'"' + END,
    "a string of backslashes": b'{"a":"' + fill(b"\\\\", DENSE) + b'"' + END,
    "a string of backslashes without an end": b'{"a":"' + fill(b"\\", 8 * MiB),
    "a string of quotes": b'{"a":"' + fill(b'\\"', DENSE) + b'"' + END,
    "opening lists": b'{"a":' + fill(b"[", DENSE),
    "opening objects": b'{"a":' + fill(b"{", DENSE),
    "lists in lists": b'{"a":' + fill(b"[", DENSE) + fill(b"]", DENSE) + END,
    "nested lists": b'{"a":[' + fill(b"[" * 900 + b"]" * 900 + b",", DENSE) + b"0]" + END,
    "empty lists": b'{"a":[' + fill(b"[],", DENSE) + b"0]" + END,
    "empty strings": b'{"a":[' + fill(b'"",', DENSE) + b"0]" + END,
    "numbers": b'{"a":[' + fill(b"0,", MiB) + b"0]" + END,
    "one number": b'{"a":' + fill(b"1", MiB) + END,
    "long numbers": b"{" + fill(b'"":' + b"1" * 60_000 + b",", MiB) + END[1:],
    "tiny keys": b"{" + fill(b'"":0,', DENSE) + END[1:],
    "tiny keys and strings": b"{" + fill(b'"":"",', DENSE) + END[1:],
    "escaped keys": b"{" + fill(b'"' + b"\\u0041" * 41 + b'":0,', DENSE) + END[1:],
    "long keys": b"{" + fill(b'"' + b"k" * 300 + b'":0,', MiB) + END[1:],
    "long models": b"{" + fill(b'"model":"' + b"x" * 60_000 + b'",', 8 * MiB) + END[1:],
    "models that are lists": b"{" + fill(b'"model":[' + b"[]," * 300 + b"0],", DENSE) + END[1:],
    "space before": fill(b" ", MiB) + b"{" + END[1:],
    "space inside": b"{" + fill(b"\r\n", MiB) + END[1:],
    "space behind": b'{"a":1' + fill(b"\t", MiB) + END,
}


@pytest.mark.parametrize("name", WORST)
def test_each_step_is_short_whatever_the_body_is_made_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = WORST[name]
    done = work_of(monkeypatch, body)
    assert len(body) > LARGE_BYTES
    assert max(work.searched for work in done) <= 10 * MiB
    assert max(work.matched for work in done) <= 300_000
    assert max(work.calls for work in done) <= 3_000
    total = sum(work.searched + work.matched for work in done)
    assert total <= 4 * len(body), "it goes over the same bytes again and again"
