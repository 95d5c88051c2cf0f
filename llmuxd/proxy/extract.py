"""Which model a request names, and whether it asks for a stream. Pure: the body is looked into and never changed.

Where a body could be read in two ways, the reading is the one that vLLM's own server has (of several fields or keys
of a name, the last), so that the engine which is woken is the engine that is meant.
"""

from __future__ import annotations

import json
import re
from email.message import Message
from email.parser import BytesHeaderParser
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from llmuxd.proxy.errors import Rejected

_PART_HEAD_BYTES = 16 * 1024
_JSON_STARTS_WITHIN_BYTES = 64
_DELIMITER_END = re.compile(rb"(--)|[ \t]*\r\n")


class Wanted(NamedTuple):
    """What a request asks for."""

    model: str
    stream: bool
    """Its JSON body has `"stream": true`."""


def wanted(override: str | None, query: str, content_type: str, encoded: bool, body: bytes) -> Wanted:
    """The model's name: of the override header, of `?model=`, of a form's field, of the JSON body, in this order.

    `encoded` says that the body has a Content-Encoding. Raises Rejected (400) if there is no name to be had.
    """
    named = override or parse_qs(query).get("model", [""])[-1]
    if named:
        return Wanted(named, not encoded and _may_stream(body) and _streams(body))
    if not body:
        raise _no_model()
    if encoded:
        raise Rejected(
            400,
            "unreadable_body",
            "the body is compressed: name the model in a `model-override` header or as `?model=`",
            "model",
        )
    header = Message()
    header["Content-Type"] = content_type
    if header.get_content_type() == "multipart/form-data":
        return Wanted(_of_form(header, body), False)
    return _of_json(body)


def _may_stream(body: bytes) -> bool:
    """Whether it is worth parsing: a body whose model is known may be anything, and large."""
    return body[:_JSON_STARTS_WITHIN_BYTES].lstrip().startswith(b"{") and b'"stream"' in body


def _streams(body: bytes) -> bool:
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return value.get("stream") is True


def _of_json(body: bytes) -> Wanted:
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Rejected(400, "invalid_json", f"the body is not valid JSON: {error}") from error
    model = value.get("model") if isinstance(value, dict) else None
    if model is None or model == "":
        raise _no_model()
    if not isinstance(model, str):
        raise Rejected(400, "invalid_model", "`model` is not a string", "model")
    return Wanted(model, value.get("stream") is True)


def _of_form(header: Message, body: bytes) -> str:
    boundary = header.get_boundary()
    if not boundary or not boundary.isascii():
        raise Rejected(400, "invalid_form", "the multipart body has no boundary")
    model = _form_field(body, boundary.encode(), "model")
    if not model:
        raise _no_model()
    try:
        return model.decode()
    except UnicodeDecodeError as error:
        raise Rejected(400, "invalid_model", "the form's `model` is not UTF-8", "model") from error


def _form_field(body: bytes, boundary: bytes, name: str) -> bytes | None:
    """The last field of that name. Only the heads of the parts are copied: the parts may be large files."""
    found: bytes | None = None
    line = b"\r\n--" + boundary
    at_start = _DELIMITER_END.match(body, len(line) - 2) if body.startswith(line[2:]) else None
    opening = at_start or _delimiter(body, line, 0)
    while opening is not None and not opening[1]:
        # The line break that ends this delimiter may begin the next one, if the part has neither head nor body.
        closing = _delimiter(body, line, opening.end() - 2)
        if closing is None:
            raise Rejected(400, "invalid_form", "the multipart body ends in the middle of a part")
        part_end = closing.start() - len(line)
        head_end = body.find(b"\r\n\r\n", opening.end() - 2, min(part_end, opening.end() + _PART_HEAD_BYTES))
        if head_end < 0:
            raise Rejected(400, "invalid_form", "a part of the multipart body has no head")
        head = BytesHeaderParser().parsebytes(body[opening.end() : head_end])
        if head.get_param("name", header="content-disposition") == name:
            if head.get_filename() is not None:
                raise Rejected(400, "invalid_model", f"the form's `{name}` is a file", name)
            found = body[head_end + 4 : part_end]
        opening = closing
    return found


def _delimiter(body: bytes, line: bytes, at: int) -> re.Match[bytes] | None:
    """What ends the next delimiter from `at` on; group 1 if no part follows it.

    A delimiter is a whole line: what the boundary is only the beginning of does not count.
    """
    while (at := body.find(line, at)) >= 0:
        at += len(line)
        end = _DELIMITER_END.match(body, at)
        if end is not None:
            return end
    return None


def _no_model() -> Rejected:
    return Rejected(
        400,
        "model_required",
        "no model is named: set `model` in the body, `?model=`, or a `model-override` header",
        "model",
    )
