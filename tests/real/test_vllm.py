"""llmuxd over real vLLM engines: what is answered, by which model, and what a switch does to an engine.

Engines that die, clients that leave, and the end of the daemon are in test_vllm_ends.py.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.real.stack import GREEDY, Stack, complete, until

STREAM_TOKENS = 300

# vLLM's paths that clients may use; every other one is the operator's.
FOR_CLIENTS = ("/v1/", "/v2/", "/inference/v1/")
FOR_CLIENTS_EXACTLY = {"/health", "/tokenize", "/detokenize", "/pooling", "/classify", "/score", "/rerank"}


def chat(client: openai.OpenAI, model: str, question: str) -> str | None:
    messages: Any = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=16, **GREEDY)
    assert answer.model == model
    return answer.choices[0].message.content


def test_every_model_is_warm_before_the_port_opens(warm: Stack) -> None:
    at_opening = warm.at_opening["models"]
    for name in ("tiny-a", "tiny-b", "big"):
        assert at_opening[name]["engine"] == "asleep", at_opening[name]
        assert at_opening[name]["asleep_by"] == "offload+keep_running"
        # The inference of the warm-up, which no client has asked for.
        assert warm.engine(name).metric("vllm:generation_tokens_total") >= 1


def test_two_models_answer_in_alternation_as_when_asked_directly(warm: Stack, client: openai.OpenAI) -> None:
    complete(client, "tiny-b")
    switches = warm.metric("llmux_switches_total")
    for number in range(10):
        question = f"Tell me about the number {number}."
        answers = {}
        for model in ("tiny-a", "tiny-b"):
            answers[model] = chat(client, model, question)
            assert warm.status()["active"] == [model]
            body = {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": 16,
                "temperature": 0,
                "ignore_eos": True,
            }
            directly = warm.engine(model).json("POST", "/v1/chat/completions", body)
            assert answers[model] == directly["choices"][0]["message"]["content"]
        assert answers["tiny-a"] != answers["tiny-b"]
    assert warm.metric("llmux_switches_total") == switches + 20


def test_a_stream_is_read_to_its_end_across_a_switch(warm: Stack, client: openai.OpenAI) -> None:
    expected = complete(client, "big", tokens=STREAM_TOKENS)
    stream = client.completions.create(
        model="big",
        prompt="Once upon a time",
        max_tokens=STREAM_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    with ThreadPoolExecutor(1) as pool:
        pieces = []
        usage = finish = None
        for number, chunk in enumerate(stream):
            if number == 10:
                other = pool.submit(complete, client, "tiny-a")
                status = until(lambda: draining(warm), 30, "the switch drains")
                assert status["models"]["big"]["in_flight"] == 1
                assert status["models"]["tiny-a"]["queued"] == 1
            if chunk.choices:
                # The last tokens may be on their way to this client when the engine has made them all.
                assert number < 10 or number > STREAM_TOKENS - 20 or not other.done()
                pieces.append(chunk.choices[0].text)
                finish = chunk.choices[0].finish_reason or finish
            usage = chunk.usage or usage
        assert finish == "length"
        assert usage is not None
        assert usage.completion_tokens == STREAM_TOKENS
        assert "".join(pieces) == expected
        assert other.result()
    assert warm.status()["active"] == ["tiny-a"]


def draining(stack: Stack) -> dict[str, Any] | None:
    """The status, if a switch waits for what is in flight."""
    status = stack.status()
    return status if (status["switch"] or {}).get("phase") == "drain" else None


@pytest.mark.parametrize(
    ("eviction", "level"),
    [
        ("retain+keep_running", None),
        ("offload+keep_running", "weights_offloaded"),
        ("discard+keep_running", "discard_all"),
    ],
)
def test_an_evicted_engine_sleeps_at_its_level_and_wakes_the_same(
    warm: Stack, client: openai.OpenAI, eviction: str, level: str | None
) -> None:
    warm.ctl("eviction", "tiny-b", eviction)
    before = complete(client, "tiny-b")
    pid = warm.model("tiny-b")["pid"]

    complete(client, "tiny-a")

    asleep = warm.model("tiny-b")
    assert (asleep["engine"], asleep["asleep_by"], asleep["pid"]) == ("asleep", eviction, pid)
    engine = warm.engine("tiny-b")
    assert engine.json("GET", "/is_sleeping") == {"is_sleeping": True}
    for state in ("weights_offloaded", "discard_all"):
        assert engine.metric("vllm:engine_sleep_state", sleep_state=state) == float(state == level)

    assert complete(client, "tiny-b") == before
    awake = warm.model("tiny-b")
    assert (awake["engine"], awake["pid"]) == ("awake", pid)
    assert engine.json("GET", "/is_sleeping") == {"is_sleeping": False}


def test_a_model_evicted_by_stop_leaves_nothing_and_starts_again(warm: Stack, client: openai.OpenAI) -> None:
    warm.ctl("eviction", "tiny-b", "offload+stop")
    before = complete(client, "tiny-b")
    tree = warm.tree("tiny-b")
    assert len(tree.processes) >= 3
    folders = warm.folders()
    engine = warm.engine("tiny-b")
    assert engine.socket in folders

    complete(client, "tiny-a")

    stopped = warm.model("tiny-b")
    assert (stopped["engine"], stopped["pid"]) == ("not_started", None)
    assert tree.left() == []
    assert not [path for path in warm.folders() if path.name.startswith("tiny-b")]

    assert complete(client, "tiny-b") == before
    assert warm.model("tiny-b")["pid"] != tree.leader.pid
    assert warm.folders() == folders


def test_the_operator_moves_engines_as_requests_do(warm: Stack, client: openai.OpenAI) -> None:
    complete(client, "tiny-a")
    assert "awake" in warm.ctl("wake", "tiny-b").stderr
    assert warm.status()["active"] == ["tiny-b"]
    assert warm.model("tiny-a")["engine"] == "asleep"

    warm.ctl("sleep", "tiny-b", "--eviction", "discard+keep_running")
    assert warm.status()["active"] == []
    assert warm.model("tiny-b")["asleep_by"] == "discard+keep_running"
    assert complete(client, "tiny-b")

    warm.ctl("pin", "tiny-a")
    with pytest.raises(openai.InternalServerError) as refused:
        complete(client, "tiny-b")
    assert refused.value.status_code == 503
    warm.ctl("unpin")
    assert complete(client, "tiny-b")
    assert "Starting vLLM server" in warm.ctl("logs", "tiny-b", "-n", "2000").stdout


def test_models_are_listed_whatever_their_state(warm: Stack, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-a", "tiny-b", "big", "broken"]
    assert client.models.retrieve("broken").id == "broken"
    with pytest.raises(openai.NotFoundError, match="tiny-a, tiny-b, big, broken"):
        complete(client, "nonesuch")


def test_a_model_that_cannot_start_is_refused_with_the_reason_of_vllm(warm: Stack, client: openai.OpenAI) -> None:
    opening = warm.at_opening["models"]["broken"]
    assert opening["engine"] in ("stopping", "failed"), "the port opens all the same, and may before all of it is gone"
    assert "exited with code 1" in opening["last_error"]
    until(lambda: warm.model("broken")["engine"] == "failed", 20, "all of it is gone")
    with pytest.raises(openai.InternalServerError) as refused:
        complete(client, "broken")
    assert refused.value.status_code == 503
    assert "Retry-After" in refused.value.response.headers
    # From the end of vLLM's log.
    assert "/nonexistent/model" in refused.value.message
    assert "HFValidationError" in refused.value.message


def test_no_path_of_the_operator_is_reached_through_the_port(warm: Stack, client: openai.OpenAI) -> None:
    complete(client, "tiny-a")
    engine = warm.engine("tiny-a")
    paths = set(engine.json("GET", "/openapi.json")["paths"]) | {"/metrics", "/openapi.json", "/docs", "/server_info"}
    operators = {p for p in paths if not p.startswith(FOR_CLIENTS) and p not in FOR_CLIENTS_EXACTLY}
    assert {"/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/pause", "/update_weights"} <= operators
    spellings = [
        "{}", "/{}", "{}/", "/v1/..{}", "/v1/%2e%2e{}", "/v1/models/..{}", "/v1{}", "/%2f{}", "/;{}", "/v1/;/..{}",
        "/v1\\..{}", "http://localhost{}", "/v1/%252e%252e{}", "{}%20", "{}?model=tiny-a",
    ]  # fmt: skip
    body = {"model": "tiny-a", "method": "reload_weights"}
    for path in sorted(operators):
        for spelling in spellings:
            target = spelling.format(path) + ("&" if "?" in spelling else "?") + "level=1"
            for method in ("GET", "POST"):
                status, answer = warm.call(method, target, body, {"model-override": "tiny-a"})
                assert status in (400, 404, 405), (method, target, status, answer)
                if b'"detail"' in answer:
                    # It got as far as vLLM, which has nothing there.
                    assert json.loads(answer) == {"detail": "Not Found"}, (method, target)
    encoded = "/" + "".join(f"%{ord(letter):02x}" for letter in "sleep")
    status, _ = warm.call("POST", encoded, body, {"model-override": "tiny-a"})
    assert status in (400, 404, 405)
    assert engine.json("GET", "/is_sleeping") == {"is_sleeping": False}
    assert warm.status()["active"] == ["tiny-a"]
    assert complete(client, "tiny-a")


def test_what_vllm_answers_passes_unchanged(warm: Stack, client: openai.OpenAI) -> None:
    complete(client, "tiny-a")
    body = {"model": "tiny-a", "prompt": "Hello"}
    status, answer = warm.call("POST", "/tokenize", body)
    assert (status, answer) == warm.engine("tiny-a").call("POST", "/tokenize", body)
    too_long = {"model": "tiny-a", "prompt": "Hello " * 3000, "max_tokens": 1}
    status, answer = warm.call("POST", "/v1/completions", too_long)
    assert (status, answer) == warm.engine("tiny-a").call("POST", "/v1/completions", too_long)
    assert status == 400
