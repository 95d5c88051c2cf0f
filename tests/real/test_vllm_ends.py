"""llmuxd over real vLLM engines: engines that are killed, clients that leave, and the end of the daemon."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.real.stack import GREEDY, Stack, complete, stack, until

TOKENS = 150
"""They last long enough for what a test does meanwhile, and not longer than a shutdown may take."""


def stream(client: openai.OpenAI, model: str, tokens: int) -> Any:
    return client.completions.create(model=model, prompt="Hello", max_tokens=tokens, stream=True, **GREEDY)


def test_the_client_of_a_stream_leaves_and_its_generation_is_aborted(warm: Stack, client: openai.OpenAI) -> None:
    answer = stream(client, "big", 1900)
    for _ in range(5):
        next(answer)
    engine = warm.engine("big")
    assert engine.metric("vllm:num_requests_running") == 1
    assert warm.status()["models"]["big"]["in_flight"] == 1

    answer.close()

    until(lambda: engine.metric("vllm:num_requests_running") == 0, 30, "vLLM has aborted the request")
    made = engine.metric("vllm:generation_tokens_total")
    assert warm.status()["models"]["big"]["in_flight"] == 0
    assert complete(client, "big")
    assert engine.metric("vllm:generation_tokens_total") == made + 16


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "vllm"])
def test_an_engine_killed_in_mid_request_is_replaced(warm: Stack, client: openai.OpenAI, victim: str) -> None:
    expected = complete(client, "big", tokens=TOKENS)
    tree = warm.tree("big")
    engine = warm.engine("big")
    begun = stream(client, "big", 1900)
    for _ in range(5):
        next(begun)
    with ThreadPoolExecutor(1) as pool:
        # Nothing of its answer has been sent when the engine dies: it is asked again, unseen.
        unanswered = pool.submit(complete, client, "big", tokens=TOKENS)
        until(lambda: engine.metric("vllm:num_requests_running") == 2, 30, "both requests are being answered")

        tree.named(victim).kill()

        with pytest.raises(openai.APIError):
            for _ in begun:
                pass
        assert complete(client, "big", tokens=TOKENS) == expected
        assert unanswered.result() == expected
    assert warm.model("big")["pid"] != tree.leader.pid
    assert tree.left() == []
    assert warm.model("big")["failures"] == 0


def test_shutdown_finishes_what_is_in_flight_and_leaves_nothing(warm: Stack, client: openai.OpenAI) -> None:
    trees = [warm.tree(model) for model in ("tiny-a", "tiny-b", "big") if warm.model(model)["pid"]]
    assert trees
    answer = stream(client, "big", TOKENS)
    next(answer)

    warm.terminate()

    until(lambda: warm.status()["state"] == "stopping", 30, "the daemon is stopping")
    with pytest.raises(openai.InternalServerError) as refused:
        complete(client, "big")
    assert refused.value.status_code == 503
    chunks = list(answer)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert warm.wait() == 0
    assert warm.processes() == []
    assert [left for tree in trees for left in tree.left()] == []
    assert warm.folders() == []
    assert not [path for path in warm.runtime_dir.rglob("*") if path.is_socket()]


def test_shutdown_while_an_engine_starts_does_not_wait_for_it(
    tmp_path_factory: pytest.TempPathFactory, vllm: Path, models: dict[str, Path]
) -> None:
    # vLLM does not react to SIGTERM between the start of its EngineCore and its readiness.
    with (
        stack(tmp_path_factory.mktemp("cold"), vllm, {"tiny-a": models["tiny-a"]}) as cold,
        cold.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        cold.wait_for_port()
        waiting = pool.submit(complete, client, "tiny-a")
        until(
            lambda: [p for p in cold.processes() if p.name() == "VLLM::EngineCore"], 120, "EngineCore has been started"
        )
        assert cold.model("tiny-a")["engine"] == "starting"

        cold.terminate()

        with pytest.raises(openai.InternalServerError) as refused:
            waiting.result(10)
        assert refused.value.status_code == 503
        # Less than stop_timeout_secs.
        assert cold.wait(15) == 0
        assert cold.processes() == []
        assert cold.folders() == []
