"""Engines that die, refuse, hang and lie, under a real daemon."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.stack import Caller, until

SLOW_TOKENS = {"env": {"LLMUX_SIM_SCALE": "0.01", "LLMUX_SIM_START_SECS": "1", "LLMUX_SIM_TOKENS_PER_S": "1"}}


def gone(*pids: int) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_an_engine_that_dies_at_start_is_reported_at_once_with_its_last_words(daemon):
    stack = daemon("a", "b").start()
    stack.fault("a", "die_at_start*2")
    began = time.monotonic()
    answer = stack.ask("a")
    assert time.monotonic() - began < 5
    assert answer.status == 503
    error = answer.json["error"]
    assert error["code"] == "model_unavailable"
    assert "Engine core initialization failed" in error["message"]
    assert int(answer.headers["retry-after"]) >= 1
    model = stack.model("a")
    assert "Engine core initialization failed" in model["last_error"]
    again = stack.ask("a")
    assert again.status == 503
    assert stack.ask("b").status == 200, "the others are served meanwhile"
    # It fails once more, and then it starts.
    until(lambda: stack.ask("a").status == 200, "started in the end")
    assert stack.model("a")["failures"] == 0


def test_a_command_that_does_not_exist(daemon):
    stack = daemon("a", top={"vllm_command": "/nowhere/vllm"}).start()
    answer = stack.ask("a")
    assert answer.status == 503
    assert "/nowhere/vllm" in answer.json["error"]["message"]


@pytest.mark.parametrize("victim", ["api server", "EngineCore"])
def test_killed_in_mid_request_the_request_is_served_all_the_same(daemon, victim):
    stack = daemon(a=SLOW_TOKENS).start()
    stack.ask("a")
    server, core = stack.engine_pids("a")
    waiting = Caller(lambda: stack.ask("a", tokens=100))
    until(lambda: stack.engine_metric("a", "vllm:num_requests_running") == 1, "it is in the engine")
    os.kill(server if victim == "api server" else core, signal.SIGKILL)
    answer = waiting.result()
    assert answer.status == 200, answer.body
    assert len(answer.text.split()) == 100
    assert gone(server, core)
    assert stack.model("a")["failures"] == 0


@pytest.mark.parametrize("victim", ["api server", "EngineCore"])
def test_a_death_is_noticed_without_being_asked_for(daemon, victim):
    stack = daemon("a", "b").start()
    stack.ask("a")
    stack.ask("b")
    server, core = stack.engine_pids("a")
    assert stack.model("a")["engine"] == "asleep"
    os.kill(server if victim == "api server" else core, signal.SIGKILL)
    until(lambda: stack.model("a")["engine"] == "not_started", "noticed")
    model = stack.model("a")
    assert model["pid"] is None
    assert model["last_error"]
    assert gone(server, core)
    assert not Path(model["endpoint"].removeprefix("unix:")).exists()
    assert server not in stack.ledger.held()
    assert stack.ask("a").status == 200


def test_a_stream_that_breaks_does_not_look_finished(daemon):
    stack = daemon(a=SLOW_TOKENS).start()
    body = b'{"model": "a", "prompt": "x", "max_tokens": 1000, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", stack.port), timeout=20) as client:
        client.sendall(head + body)
        got = client.recv(65536)
        os.kill(stack.engine_pids("a")[1], signal.SIGKILL)
        while piece := client.recv(65536):
            got += piece
    assert b'"engine_died"' in got, "an event tells what happened"
    assert b"[DONE]" not in got
    assert not got.endswith(b"0\r\n\r\n"), "the body's end is missing"
    until(lambda: stack.ask("a").status == 200, "served again")


def test_an_engine_that_dies_on_every_request_is_told_to_the_client(daemon):
    stack = daemon(a=SLOW_TOKENS).start()
    stack.fault("a", "die_after_tokens=1")
    answer = stack.ask("a", tokens=5)
    assert answer.status in (502, 503)
    assert answer.json["error"]["code"] in ("engine_died", "model_unavailable")
    stack.fault("a", "")
    until(lambda: stack.ask("a").status == 200, "served once it lives")


@pytest.mark.parametrize("fault", ["refuse_sleep*1", "lie_sleep*1", "die_in_sleep*1", "hang_sleep*1"])
def test_a_sleep_that_fails_becomes_a_stop(daemon, fault):
    stack = daemon("a", "b", top={"sleep_timeout_secs": 1}).start()
    stack.ask("a")
    pids = stack.engine_pids("a")
    stack.fault("a", fault)
    assert stack.ask("b").status == 200
    model = stack.model("a")
    assert (model["engine"], model["pid"]) == ("not_started", None)
    assert gone(*pids)
    assert stack.ask("a").status == 200
    assert stack.ledger.overcommit() == 0


@pytest.mark.parametrize("fault", ["fail_wake*1", "die_in_wake*1", "hang_wake*1"])
def test_an_engine_that_does_not_wake_is_started_anew_for_those_who_wait(daemon, fault):
    stack = daemon("a", "b", top={"wake_timeout_secs": 1}).start()
    stack.ask("a")
    stack.ask("b")
    pids = stack.engine_pids("a")
    stack.fault("a", fault)
    assert stack.ask("a").status == 200
    assert gone(*pids)
    assert "a: waking -> stopping" in stack.log.read_text()
    assert stack.ask("b").status == 200
    assert stack.ask("a").status == 200
    assert stack.ledger.overcommit() == 0


def test_one_that_neither_wakes_nor_starts_answers_who_waits_and_the_next_is_served(daemon):
    stack = daemon("a", "b").start()
    stack.ask("a")
    stack.ask("b")
    stack.fault("a", "fail_wake*1, die_at_start*1")
    answer = stack.ask("a")
    assert answer.status == 503
    assert answer.json["error"]["code"] == "model_unavailable"
    assert stack.ask("b").status == 200
    until(lambda: stack.ask("a").status == 200, "served after its backoff")
    assert stack.ledger.overcommit() == 0


def test_an_engine_that_keeps_its_memory_while_it_sleeps_is_found_out(daemon):
    stack = daemon("a", "b").start()
    stack.ask("a")
    stack.fault("a", "leak_sleep*1")
    assert stack.ask("b").status == 200, "a was stopped, and b started a second time"
    assert stack.model("a")["pid"] is None
    assert stack.ledger.overcommit() == 0


def test_a_start_has_a_bound(daemon):
    stack = daemon(a={"start_timeout_secs": 3}).start()
    stack.fault("a", "hang_start*1")
    answer = stack.ask("a")
    assert answer.status == 503
    assert "3 s" in answer.json["error"]["message"]
    assert stack.ledger.held() == {}
    until(lambda: stack.ask("a").status == 200, "served after its backoff")


def test_a_request_waits_no_longer_than_its_timeout_and_the_start_goes_on(daemon):
    stack = daemon(policy={"request_timeout_secs": 0.3}, a={"env": {"LLMUX_SIM_SCALE": "0.05"}}).start()
    answer = stack.ask("a")
    assert (answer.status, answer.json["error"]["code"]) == (504, "queue_timeout")
    assert stack.model("a")["engine"] == "starting"
    until(lambda: stack.model("a")["engine"] == "awake", "it starts all the same")


def test_a_full_queue(daemon):
    stack = daemon(a={"env": {"LLMUX_SIM_SCALE": "0.05"}, "max_queue": 1}).start()
    first = Caller(lambda: stack.ask("a"))
    until(lambda: stack.model("a")["queued"] == 1, "one waits")
    answer = stack.ask("a")
    assert (answer.status, answer.json["error"]["code"]) == (429, "queue_full")
    assert "retry-after" in answer.headers
    assert first.result().status == 200


def test_answers_that_are_no_http(daemon):
    stack = daemon("a").start()
    stack.ask("a")
    stack.fault("a", "garbage_answer*1")
    assert stack.ask("a").status == 200, "asked again"
    stack.fault("a", "garbage_answer")
    assert stack.ask("a").status == 502
    stack.fault("a", "")
    until(lambda: stack.ask("a").status == 200, "served again")
