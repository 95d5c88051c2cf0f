"""Requests for several models through one port, over simulated engines as real processes."""

from __future__ import annotations

import http.client
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.stack import Caller, until
from tests.ports import free_port

SLOW_TOKENS = {"env": {"LLMUX_SIM_SCALE": "0.01", "LLMUX_SIM_START_SECS": "1", "LLMUX_SIM_TOKENS_PER_S": "1"}}
"""A token each 10 ms."""


def test_200_requests_to_four_models_are_each_answered_once_by_the_right_one(daemon):
    stack = daemon(
        "a",
        "b",
        "c",
        "d",
        policy={"policy_type": "fifo", "min_active_secs": 0.05},
        b={"eviction": "discard+keep_running"},
        c={"eviction": "retain+stop"},
    ).start()
    dice = random.Random(7)
    wanted = [(i, dice.choice("abcd")) for i in range(200)]

    def ask(item: tuple[int, str]) -> tuple[int, str, str]:
        number, model = item
        answer = stack.ask(model, prompt=f"question {number}", tokens=4)
        assert answer.status == 200, answer.body
        return number, answer.json["model"], answer.text

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, wanted))
    assert [(number, model) for number, model, _ in answers] == wanted
    assert all(text.startswith(model) for _, model, text in answers)
    assert "\ufffd" not in "".join(text for *_, text in answers), "no answer from weights that were not read again"
    assert stack.ledger.overcommit() == 0
    assert stack.status()["queued"] == stack.status()["in_flight"] == 0
    # Asked again, each gives the same answer, whatever sleep there was in between.
    number, model, text = answers[17]
    assert stack.ask(model, prompt=f"question {number}", tokens=4).text == text


@pytest.mark.parametrize(
    "eviction", ["offload+keep_running", "discard+keep_running", "retain+keep_running", "retain+stop"]
)
def test_each_eviction_policy(daemon, eviction):
    small = {
        "env": {"LLMUX_SIM_WEIGHTS_GIB": "4", "LLMUX_SIM_KV_GIB": "1"},
        "extra_args": ["--gpu-memory-utilization", "0.3"],
    }
    stack = daemon(a={"eviction": eviction, **small}, b=small).start()
    first = stack.ask("a", "why", tokens=8)
    assert stack.ask("b").json["model"] == "b"
    model = stack.model("a")
    if eviction.endswith("stop"):
        assert (model["engine"], model["pid"]) == ("not_started", None)
    else:
        assert (model["engine"], model["asleep_by"]) == ("asleep", eviction)
    again = stack.ask("a", "why", tokens=8)
    assert again.text == first.text
    assert stack.status()["active"] == ["a"]


def test_a_stream_is_read_to_its_end_across_a_switch(daemon):
    stack = daemon(a=SLOW_TOKENS, b=SLOW_TOKENS).start()
    stream = stack.stream("a", tokens=50)
    events = stream.events()
    next(events)
    other = Caller(lambda: stack.ask("b"))
    until(lambda: stack.model("b")["queued"] == 1, "b's request waits")
    rest = list(events)
    assert len(rest) == 49 + 2
    assert rest[-1] == "[DONE]"
    assert other.result().json["model"] == "b"
    assert float(other.answer.headers["server-timing"].partition("switch;dur=")[2]) > 0


def test_without_drain_a_stream_pauses_and_goes_on(daemon):
    policy = {"policy_type": "fifo", "drain_before_switch": False, "min_active_secs": 0.3}
    stack = daemon(policy=policy, a=SLOW_TOKENS, b=SLOW_TOKENS).start()
    undisturbed = [e for e in stack.stream("a", tokens=100).events() if e != "[DONE]"]
    stream = stack.stream("a", tokens=100)
    events = stream.events()
    got = [next(events)]
    assert stack.ask("b").json["model"] == "b", "answered before the stream is over"
    got += [e for e in events if e != "[DONE]"]
    assert [e["choices"] for e in got] == [e["choices"] for e in undisturbed]


def test_a_client_that_leaves_the_queue_is_gone_and_the_start_goes_on(daemon):
    stack = daemon("a").start()
    stack.fault("a", "hang_start")
    connection = http.client.HTTPConnection("127.0.0.1", stack.port)
    connection.request("POST", "/v1/completions", json.dumps({"model": "a", "prompt": "x"}))
    until(lambda: stack.model("a")["queued"] == 1, "it waits")
    connection.close()
    until(lambda: stack.model("a")["queued"] == 0, "it is gone")
    assert stack.model("a")["engine"] == "starting"
    stack.fault("a", "")
    until(lambda: stack.model("a")["engine"] == "awake", "the start goes on")


def test_a_client_that_leaves_a_stream_has_its_generation_aborted(daemon):
    stack = daemon(a=SLOW_TOKENS).start()
    stream = stack.stream("a", tokens=100_000)
    next(stream.events())
    assert stack.engine_metric("a", "vllm:num_requests_running") == 1
    stream.close()
    until(lambda: stack.engine_metric("a", "vllm:num_requests_running") == 0, "aborted")
    assert stack.engine_metric("a", "vllm:request_aborted_total") == 1
    assert stack.model("a")["in_flight"] == 0


def test_operators_and_requests_never_make_two_models_awake(daemon):
    stack = daemon("a", "b", "c").start()
    with ThreadPoolExecutor(6) as pool:
        done = [pool.submit(stack.ctl, "wake", name) for name in "abc" * 2]
        asked = [pool.submit(stack.ask, name) for name in "cab" * 4]
        assert [job.result().returncode for job in done] == [0] * 6
        assert Counter(job.result().status for job in asked) == {200: 12}
    assert stack.ledger.overcommit() == 0
    assert len(stack.status()["active"]) == 1


def test_an_idle_model_is_put_to_sleep(daemon):
    stack = daemon(a={"ttl_secs": 0.2}).start()
    stack.ask("a")
    until(lambda: stack.model("a")["engine"] == "asleep", "asleep after its time to live")
    assert stack.ask("a").status == 200


def test_an_engine_may_have_a_port(daemon):
    port = free_port()
    stack = daemon("b", a={"port": port}).start()
    assert stack.ask("a").json["model"] == "a"
    assert stack.model("a")["endpoint"] == f"http://127.0.0.1:{port}"
    assert stack.ask("b").json["model"] == "b"


def test_aliases_and_the_ways_to_name_a_model(daemon):
    stack = daemon("b", a={"aliases": ["org/a:latest"]}).start()
    assert stack.ask("org/a:latest").json["model"] == "a", "as vLLM answers, whichever of its names it is asked by"
    ids = [model["id"] for model in stack.get("/v1/models").json["data"]]
    assert ids == ["b", "a", "org/a:latest"]
    assert stack.get("/v1/models/org/a:latest").json["root"] == "sim/a"
    form = b'--X\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n123\r\n--X\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n--X--\r\n'
    spoken = stack.request(
        "POST", "/v1/audio/transcriptions", form, {"Content-Type": "multipart/form-data; boundary=X"}
    )
    assert (spoken.status, spoken.json["bytes"]) == (200, 3)
    overridden = stack.request("POST", "/v1/completions", {"prompt": "x"}, {"model-override": "b"})
    assert overridden.text.startswith("b")
    assert stack.request("POST", "/tokenize?model=a", {"prompt": "hey"}).json["count"] == 3
    refused = stack.ask("c")
    assert (refused.status, refused.json["error"]["code"]) == (404, "model_not_found")
    assert all(name in refused.json["error"]["message"] for name in ids)
