"""How the APIs say what a model has generated, whole and in events, read strictly enough to miss nothing. Pure.

A simulated engine names its model first and then says a word for each further token, and it gives the client's
request id back in the id of its answer: so one that is somebody else's, or has lost something, is found.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
GENERATING = (COMPLETIONS, CHAT, MESSAGES, RESPONSES)


@dataclass
class Told:
    """What a stream has told up to its end."""

    text: str = ""
    begun: bool = False
    """There was an event of the engine's."""
    ids: frozenset[str] = frozenset()
    ended: bool = False
    """Its last event says that it is complete."""
    error: dict[str, Any] | None = None
    """Of an error event, which is the last one."""
    wrong: str = ""
    """What no stream may tell, whatever has happened."""


def events_of(body: bytes) -> tuple[list[bytes], bytes]:
    """The data of each complete event, without comments; and what follows the last one."""
    *blocks, partial = body.split(b"\n\n")
    found = []
    for block in blocks:
        data = [line[6:] for line in block.split(b"\n") if line.startswith(b"data: ")]
        if data:
            found.append(b"\n".join(data))
    return found, partial


def read_stream(path: str, body: bytes) -> Told:
    """Read what has come of a stream."""
    events, partial = events_of(body)
    told = Told()
    finished, broken = False, b""
    for data in events:
        if told.ended or told.error is not None:
            told.wrong = f"an event after the last one: {data[:100]!r}"
        elif data == b"[DONE]":
            told.ended = finished and path in (COMPLETIONS, CHAT)
            told.wrong = "" if told.ended else "[DONE] before it is done"
        else:
            value = _json(data)
            told.error = error_in(path, value)
            told.begun = told.begun or told.error is None
            # One that is cut off in its middle is followed by the event that says why.
            if broken and told.error is None:
                break
            broken = data if value is None else b""
            if value is not None and told.error is None:
                finished = _take(path, value, told) or finished
        if told.wrong:
            return told
    if broken:
        told.wrong = f"an event that is no JSON: {broken[:100]!r}"
    elif partial.strip() and told.ended:
        told.wrong = f"something after the last event: {partial[:100]!r}"
    return told


def _json(data: bytes) -> Any:
    """None if it is none."""
    try:
        return json.loads(data)
    except ValueError:
        return None


def _take(path: str, event: dict[str, Any], told: Told) -> bool:
    """One event; True if it says how the generation ended."""
    if path == MESSAGES:
        kind = event["type"]
        if kind == "message_start":
            told.ids |= {event["message"]["id"]}
        elif kind == "content_block_delta":
            told.text += event["delta"]["text"]
        told.ended = kind == "message_stop"
        return bool(kind == "message_delta" and event["delta"]["stop_reason"] == "max_tokens")
    if path == RESPONSES:
        if event["type"] == "response.output_text.delta":
            told.text += event["delta"]
        response = event.get("response", {})
        if response:
            told.ids |= {response["metadata"]["id"]}
        told.ended = event["type"] == "response.completed" and response["status"] == "incomplete"
        return told.ended
    told.ids |= {event["id"]}
    choice = (event["choices"] or [{}])[0]
    told.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return bool(choice.get("finish_reason") == "length")


def check_stream(path: str, id: str, name: str, tokens: int, told: Told) -> str:
    """What is wrong with a stream that is complete."""
    return _wrong_id(path, id, told.ids) or _wrong_text(told.text, name, tokens)


def check_whole(path: str, id: str, name: str, tokens: int, body: bytes) -> str:
    """What is wrong with an answer in one piece."""
    value = json.loads(body)
    if path == MESSAGES:
        text, finish, used = value["content"][0]["text"], value["stop_reason"], value["usage"]["output_tokens"]
    elif path == RESPONSES:
        text, finish = value["output"][0]["content"][0]["text"], value["status"]
        used = value["usage"]["output_tokens"]
    else:
        choice = value["choices"][0]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        finish, used = choice["finish_reason"], value["usage"]["completion_tokens"]
    if finish not in ("length", "max_tokens", "incomplete"):
        return f"it ended by {finish}"
    if value["model"] != name or used != tokens:
        return f"{used} tokens of {value['model']}, not {tokens} of {name}"
    found = value["metadata"]["id"] if path == RESPONSES else value["id"]
    return _wrong_id(path, id, frozenset({found})) or _wrong_text(text, name, tokens)


def _wrong_id(path: str, id: str, found: frozenset[str]) -> str:
    prefix = {COMPLETIONS: "cmpl-", RESPONSES: ""}.get(path, "chatcmpl-")
    return "" if found == {prefix + id} else f"the answer to {sorted(found)}"


def _wrong_text(text: str, name: str, tokens: int) -> str:
    words = text.split()
    if words[:1] != [name] or len(words) != tokens:
        return f"{len(words)} words that begin with {text[:40]!r}, not {tokens} of {name}"
    return ""


def error_of(path: str, body: bytes) -> dict[str, Any] | None:
    """The error object of a body; None if it has none in the form of its API."""
    return error_in(path, _json(body))


def error_in(path: str, value: Any) -> dict[str, Any] | None:
    """The error object of an answer or of an event; None if it is something else."""
    error = value.get("error") if isinstance(value, dict) else None
    known = isinstance(error, dict) and {"message", "type", "param", "code"} <= error.keys()
    if path.startswith(MESSAGES):
        known = known and value.get("type") == "error"
    return error if known else None
