"""Which engine made a stored response, and whose it is."""

from __future__ import annotations

import json

import pytest

from llmuxd.proxy.responses import MAX_RESPONSES, Responses


def made(id_: str = "resp_1") -> bytes:
    return json.dumps({"id": id_, "object": "response", "output": [{"id": "msg_1"}]}, separators=(",", ":")).encode()


def event(id_: str = "resp_1") -> bytes:
    value = {"response": {"id": id_, "status": "in_progress"}, "sequence_number": 0, "type": "response.created"}
    data = b"event: response.created\ndata: " + json.dumps(value).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.mark.parametrize(
    "answer", [made(), json.dumps({"id": "resp_1"}, indent=2).encode(), event(), event() + event("resp_2"), made()[:20]]
)
def test_it_is_learnt_from_the_beginning_of_an_answer(answer: bytes) -> None:
    responses = Responses()
    responses.learn(answer, "a", "-")
    assert responses.made_by("resp_1", "-") == "a"
    assert responses.made_by("resp_2", "-") is None


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b'{"error": {"message": "no"}}',
        made("msg_1"),
        json.dumps({"id": "msg_1", "text": 'say "id": "resp_1"'}).encode(),
        b'{"id": "resp_1',
        b'{"id": "resp_' + b"1" * 121 + b'"}',
        b'{"id": "resp_1/../2"}',
        b'{"previous_response_id": "resp_1"}',
    ],
)
def test_what_is_no_response(answer: bytes) -> None:
    responses = Responses()
    responses.learn(answer, "a", "-")
    assert responses.made_by("resp_1", "-") is None


def test_it_is_its_keys_alone() -> None:
    responses = Responses()
    responses.learn(made(), "a", "alice")
    assert responses.made_by("resp_1", "alice") == "a"
    assert responses.made_by("resp_1", "bob") is None
    assert responses.made_by("resp_1", "-") is None


def test_nobody_takes_anothers_by_choosing_its_id() -> None:
    responses = Responses()
    responses.learn(made(), "a", "alice")
    responses.learn(made(), "b", "bob")
    assert responses.made_by("resp_1", "alice") == "a"
    assert responses.made_by("resp_1", "bob") is None
    responses.learn(made(), "b", "alice")
    assert responses.made_by("resp_1", "alice") == "b", "one's own id may be made again"


def test_the_oldest_are_forgotten() -> None:
    responses = Responses()
    for number in range(MAX_RESPONSES + 2):
        responses.learn(made(f"resp_{number}"), "a", "-")
    assert [responses.made_by(f"resp_{number}", "-") for number in (0, 1, 2)] == [None, None, "a"]
    assert responses.made_by(f"resp_{MAX_RESPONSES + 1}", "-") == "a"
