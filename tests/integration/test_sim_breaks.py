"""Answers of the simulated engine that go wrong half-way, as a proxy has to cope with."""

from __future__ import annotations

import http.client
import json
import time

import pytest

from tests.integration.stack import until
from tests.integration.test_sim_apis import HELLO, events_of
from tests.integration.test_sim_engine import sim

__all__ = ["sim"]


def test_a_stream_stalls_until_its_client_leaves(sim):
    engine = sim().ready()
    engine.faults.write_text("stall_stream=2*1")
    connection, events = engine.stream(tokens=9)
    assert len([next(events), next(events)]) == 2
    assert engine.metric("vllm:num_requests_running") == 1
    assert len(engine.say().split()) == 5, "whole answers and later streams do not"
    connection.close()
    until(lambda: engine.metric("vllm:num_requests_running") == 0, "it is gone")


def test_or_until_the_fault_is_taken_away(sim):
    engine = sim().ready()
    engine.faults.write_text("stall_stream=2")
    connection, events = engine.stream(tokens=9)
    assert len([next(events), next(events)]) == 2
    engine.faults.write_text("")
    assert len(list(events)) == 8
    connection.close()


def test_a_body_is_cut_whole_or_streamed(sim):
    engine = sim().ready()
    engine.faults.write_text("cut_body=2*2")
    with pytest.raises(http.client.IncompleteRead) as cut:
        engine.ask()
    assert cut.value.partial.startswith(b'{"id":"cmpl-')
    with pytest.raises(http.client.IncompleteRead) as cut:
        engine.ask(stream=True)
    assert cut.value.partial.count(b"data: ") <= 2
    assert len(engine.say().split()) == 5
    assert engine.call("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": HELLO})],
)
def test_a_stream_tells_that_the_engine_died_and_ends_as_if_nothing_was_wrong(sim, path, body):
    engine = sim().ready()
    engine.faults.write_text("dead_in_stream=2*1")
    _, text = engine.call("POST", path, {**body, "stream": True})
    (*_, (_, error), (_, done)) = events_of(text)
    assert error["error"]["message"].startswith("EngineCore encountered an issue")
    assert (error["error"]["code"], done) == (500, "[DONE]")
    assert engine.process.wait(20) == 0


def test_messages_tell_it_in_an_event_of_their_own(sim):
    engine = sim().ready()
    engine.faults.write_text("dead_in_stream=2*1")
    body = {"model": "m", "messages": HELLO, "max_tokens": 9, "stream": True}
    name, error = events_of(engine.call("POST", "/v1/messages", body)[1])[-1]
    assert (name, error["type"], error["error"]["type"]) == ("error", "error", "internal_error")


def test_responses_break_off_without_a_word(sim):
    engine = sim().ready()
    engine.faults.write_text("dead_in_stream=2*1")
    with pytest.raises(http.client.IncompleteRead):
        engine.call("POST", "/v1/responses", {"input": "x", "stream": True})


def test_a_head_is_slow(sim):
    engine = sim().ready()
    engine.faults.write_text("slow_head=0.3*1")
    began = time.monotonic()
    assert json.dumps(engine.ask())
    assert time.monotonic() - began > 0.3
