"""Two real vLLM engines outlive llmuxd: a kill -9 and a handover, and the next daemon goes on with both."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.real.stack import GREEDY, Stack, complete, until

COLD_START_SECS = 10.0
"""A tiny model takes 25 s and more to start: an answer that comes sooner came from an engine that was there."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, vllm: Path, models: dict[str, Path]) -> Iterator[Stack]:
    chosen = {name: models[name] for name in ("tiny-a", "tiny-b")}
    made = Stack(tmp_path_factory.mktemp("restart"), vllm, chosen, warmup=True)
    try:
        made.start()
        made.wait_for_port()
        yield made
    finally:
        made.kill()


def identities(stack: Stack) -> dict[str, list[tuple[int, float]]]:
    """Model -> every process of its engine and when it started."""
    return {
        name: sorted((process.pid, process.create_time()) for process in stack.tree(name).processes)
        for name in ("tiny-a", "tiny-b")
    }


def states(stack: Stack) -> dict[str, str]:
    return {name: model["engine"] for name, model in stack.status()["models"].items()}


def is_cut(chunks: Any) -> bool:
    """Whether a stream breaks off before its last token."""
    try:
        return all(chunk.choices[0].finish_reason is None for chunk in chunks)
    except Exception as error:
        # Which one depends on the version of the client.
        print(f"cut: {error!r}")
        return True


def start_again(stack: Stack) -> float:
    """Start the next daemon; the seconds until it serves."""
    began = time.monotonic()
    stack.start()
    stack.wait_for_port()
    return time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR2], ids=lambda number: number.name)
def test_both_engines_are_adopted_and_answer_as_before(stack: Stack, number: signal.Signals) -> None:
    with stack.client() as client:
        expected = {name: complete(client, name) for name in ("tiny-a", "tiny-b")}
    assert states(stack) == {"tiny-a": "asleep", "tiny-b": "awake"}
    before = identities(stack)
    stack.send(number)
    stack.wait()
    assert all(psutil.pid_exists(pid) for processes in before.values() for pid, _ in processes)
    seconds = start_again(stack)
    print(f"{number.name}: serving again after {seconds:.2f} s")
    assert seconds < COLD_START_SECS, "the warm-up is not done again"
    assert states(stack) == {"tiny-a": "asleep", "tiny-b": "awake"}
    began = time.monotonic()
    with stack.client() as client:
        assert {name: complete(client, name) for name in ("tiny-a", "tiny-b")} == expected
    assert time.monotonic() - began < COLD_START_SECS
    assert identities(stack) == before


def test_a_stream_is_finished_before_the_handover(stack: Stack) -> None:
    before = identities(stack)
    with stack.client() as client:
        chunks = client.completions.create(model="tiny-b", prompt="Once", max_tokens=200, stream=True, **GREEDY)
        next(chunks)
        stack.send(signal.SIGUSR2)
        reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "length"
    assert stack.wait() == 75
    start_again(stack)
    assert identities(stack) == before


def test_a_stream_that_is_cut_by_a_kill_does_not_run_on(stack: Stack) -> None:
    with stack.client() as client:
        chunks = client.completions.create(model="tiny-b", prompt="Once", max_tokens=1900, stream=True, **GREEDY)
        next(chunks)
        stack.send(signal.SIGKILL)
        assert is_cut(chunks)
        stack.wait()
    start_again(stack)
    engine = stack.engine("tiny-b")
    until(lambda: engine.metric("vllm:num_requests_running") == 0, 20, "nothing runs on for nobody")
    with stack.client() as client:
        assert complete(client, "tiny-b")


def test_adopted_engines_are_stopped_with_everything_that_they_had(stack: Stack) -> None:
    trees = [stack.tree(name) for name in ("tiny-a", "tiny-b")]
    stack.terminate()
    assert stack.wait() == 0
    assert [left for tree in trees for left in tree.left()] == []
    assert stack.folders() == []
