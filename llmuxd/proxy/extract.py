"""Which model a request names, and whether it asks for a stream. Pure: the body is looked into and never changed.

Where a body could be read in two ways, the reading is the one that vLLM's own server has (of several fields or keys
of a name, the last), so that the engine which is woken is the engine that is meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Generator
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from llmuxd.proxy.errors import Rejected, no_model
from llmuxd.proxy.scan import find_keys

_JSON_STARTS_WITHIN_BYTES = 64
_DECODED_AT_ONCE_BYTES = 128 * 1024
_MAX_PARAMETERS = 100

_MAX_PARTS = 2000
"""Of a form. vLLM takes 1000 fields and 1000 files."""
_PART_HEAD_BYTES = 4096
_FIELD_BYTES = 4096
_FORM_TYPE_BYTES = 1024
_BOUNDARY_BYTES = 256
_SEARCHED_AT_ONCE_BYTES = 512 * 1024
_TRIED_AT_ONCE = 500
"""How many lines that begin as a delimiter does are looked at without a pause."""

_DELIMITER_END = re.compile(rb"(--)|[ \t]{0,64}\r\n")
_DISPOSITION = re.compile(rb"(?:^|\r\n)content-disposition:([^\r]*)", re.IGNORECASE)
_PARAMETER = re.compile(rb';[ \t]*([^;="]*)(?:=[ \t]*(?:"((?:[^"\\]|\\.)*)"[ \t]*(?=;|\Z)|([^;"]*)))?', re.DOTALL)


class Wanted(NamedTuple):
    """What a request asks for."""

    model: str
    stream: bool
    """It wants server-sent events: `"stream": true` of a JSON body, or a form's field."""


Looking = Generator[None, None, Wanted]
"""To be resumed until it returns: a large body is looked at in steps of a few milliseconds."""


def look(override: str | None, query: str, content_type: str, encoded: bool, body: bytearray) -> Looking:
    """The model's name: of the override header, of `?model=`, of a form's field, of the JSON body, in this order.

    `encoded` says that the body has a Content-Encoding. Raises Rejected (400) if there is no name to be had.
    """
    named = override or (_query_model(query) if query else "")
    is_form = content_type[:10].lower() == "multipart/"
    if named:
        # A body whose model is known may be anything.
        stream = False
        if not encoded and (is_form or body[:_JSON_STARTS_WITHIN_BYTES].lstrip().startswith(b"{")):
            try:
                stream = yield from _asks_for_stream(content_type, body, is_form)
            except Rejected:
                pass
        return Wanted(named, stream)
    if not body:
        raise no_model()
    if encoded:
        raise Rejected(
            400,
            "unreadable_body",
            "the body is compressed: name the model in a `model-override` header or as `?model=`",
            "model",
        )
    if is_form:
        fields = yield from _fields_of(content_type, body, (b"model", b"stream"))
        return Wanted(_name_of(fields.get(b"model")), _is_true(fields.get(b"stream", b"")))
    found = yield from _keys_of(body)
    model = found.get("model")
    if model is None or model == "":
        raise no_model()
    if not isinstance(model, str):
        raise Rejected(400, "invalid_model", "`model` is not a string", "model")
    return Wanted(model, found.get("stream") is True)


def _query_model(query: str) -> str:
    try:
        return parse_qs(query, max_num_fields=_MAX_PARAMETERS).get("model", [""])[-1]
    except ValueError:
        raise Rejected(400, "invalid_url", f"the query has more than {_MAX_PARAMETERS} parameters") from None


def _asks_for_stream(content_type: str, body: bytearray, is_form: bool) -> Generator[None, None, bool]:
    if is_form:
        fields = yield from _fields_of(content_type, body, (b"stream",))
        return _is_true(fields.get(b"stream", b""))
    found = yield from _keys_of(body)
    return found.get("stream") is True


def _is_true(field: bytes) -> bool:
    return field.strip().lower() in (b"true", b"1")


def _keys_of(body: bytearray) -> Generator[None, None, dict[str, Any]]:
    """What the body says of `model` and `stream`; nothing if it is JSON, but no object."""
    try:
        if len(body) > _DECODED_AT_ONCE_BYTES:
            found = yield from find_keys(body, ("model", "stream"))
            return found
        value = _decoded(body)
    except (ValueError, RecursionError) as error:
        raise Rejected(400, "invalid_json", f"the body is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _decoded(body: bytearray) -> Any:
    try:
        return json.loads(body.decode())
    except ValueError:
        # It may be of another encoding that JSON can have, or begin with a mark of it.
        return json.loads(body)


def _name_of(model: bytes | None) -> str:
    if not model:
        raise no_model()
    try:
        return model.decode()
    except UnicodeDecodeError as error:
        raise Rejected(400, "invalid_model", "the form's `model` is not UTF-8", "model") from error


def _fields_of(
    content_type: str, body: bytearray, names: Collection[bytes]
) -> Generator[None, None, dict[bytes, bytes]]:
    """The last field of each name. Only the heads of the parts are copied: the parts may be large files."""
    boundary = b""
    if len(content_type) <= _FORM_TYPE_BYTES:
        boundary = _parameters(content_type.encode()).get(b"boundary", b"")
    if not 0 < len(boundary) <= _BOUNDARY_BYTES or not boundary.isascii():
        raise Rejected(400, "invalid_form", "the multipart body has no valid boundary")
    found: dict[bytes, bytes] = {}
    line, parts = b"\r\n--" + boundary, 0
    opening = _DELIMITER_END.match(body, len(line) - 2) if body.startswith(line[2:]) else None
    if opening is None:
        opening = yield from _delimiter(body, line, 0)
    while opening is not None and not opening[1]:
        parts += 1
        if parts > _MAX_PARTS:
            raise Rejected(400, "invalid_form", f"the multipart body has more than {_MAX_PARTS} parts")
        begin = opening.end()
        # The line break that ends this delimiter may begin the next one, if the part has neither head nor body.
        closing = yield from _delimiter(body, line, begin - 2)
        if closing is None:
            raise Rejected(400, "invalid_form", "the multipart body ends in the middle of a part")
        part_end = closing.start() - len(line)
        head_end = body.find(b"\r\n\r\n", begin - 2, min(part_end, begin + _PART_HEAD_BYTES))
        if head_end < 0:
            raise Rejected(400, "invalid_form", "a part of the multipart body has no head")
        said = _disposition(bytes(body[begin:head_end]))
        name = said.get(b"name", b"")
        if name in names:
            if b"filename" in said:
                raise Rejected(400, "invalid_model", f"the form's `{name.decode()}` is a file", name.decode())
            found[name] = bytes(body[head_end + 4 : min(part_end, head_end + 4 + _FIELD_BYTES)])
        opening = closing
        yield
    return found


def _disposition(head: bytes) -> dict[bytes, bytes]:
    """What the head of a part says of it."""
    fields = _DISPOSITION.findall(head)
    return _parameters(fields[-1]) if fields else {}


def _parameters(value: bytes) -> dict[bytes, bytes]:
    """The parameters of a header field, as far as it has any; of several of a name the last."""
    found: dict[bytes, bytes] = {}
    at = value.find(b";")
    while at >= 0 and (one := _PARAMETER.match(value, at)) is not None:
        name, quoted, plain = one.groups()
        if quoted is not None or plain is not None:
            found[name.rstrip(b" \t").lower()] = plain.rstrip(b" \t") if quoted is None else quoted
        at = one.end()
    return found


def _delimiter(body: bytearray, line: bytes, at: int) -> Generator[None, None, re.Match[bytes] | None]:
    """What ends the next delimiter from `at` on; group 1 if no part follows it.

    A delimiter is a whole line: what the boundary is only the beginning of does not count.
    """
    tried = 0
    while at < len(body):
        stop = at + _SEARCHED_AT_ONCE_BYTES
        found = body.find(line, at, stop + len(line) - 1)
        if found < 0:
            at = stop
            yield
            continue
        at = found + len(line)
        end = _DELIMITER_END.match(body, at)
        if end is not None:
            return end
        tried += 1
        if tried % _TRIED_AT_ONCE == 0:
            yield
    return None
