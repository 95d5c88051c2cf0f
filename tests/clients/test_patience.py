"""Clients that wait, give up, and come again: timeouts, retries, Retry-After, streams that wait for their model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.clients.stack import HELLO, Stack, running
from tests.integration.stack import until

CHAT = "/v1/chat/completions"


def test_who_times_out_leaves_nothing_in_the_engine(broken: Stack):
    broken.ask("cedar")
    broken.fault("cedar", "hang_generation")
    with broken.openai(timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="cedar", messages=HELLO)
    until(lambda: broken.running("cedar") == 0, "it is gone")


def test_a_timeout_in_a_stream(broken: Stack):
    broken.ask("cedar")
    broken.fault("cedar", "stall_stream=2")
    with broken.openai(timeout=3) as client:
        stream = client.chat.completions.create(model="cedar", messages=HELLO, stream=True)
        # What a stalled stream raises is httpx's own.
        with pytest.raises(Exception, match=r"(?i)timed out|timeout"):
            list(stream)
    until(lambda: broken.running("cedar") == 0, "it is gone")


def test_a_slow_answer_is_waited_for(broken: Stack):
    broken.ask("cedar")
    broken.fault("cedar", "slow_head=1*1")
    with broken.openai(timeout=10) as client:
        assert client.chat.completions.create(model="cedar", messages=HELLO)


def test_an_engine_that_dies_before_its_first_byte_is_never_seen(broken: Stack):
    broken.ask("cedar")
    broken.fault("cedar", "garbage_answer*1")
    with broken.openai() as client:
        answer = client.chat.completions.create(model="cedar", messages=HELLO)
    assert answer.choices[0].message.content.split()[0] == "cedar"


class Retrying:
    """A client that is refused once: what refused it is mended as soon as it was told so."""

    def __init__(self, stack: Stack, mend: Callable[[], None]) -> None:
        self._stack = stack
        self._mend = mend
        self.heard: list[tuple[int, float]] = []
        """Status of each answer, and when it came."""
        self.told = 0

    def _hear(self, response: Any) -> None:
        self.heard.append((response.status_code, time.monotonic()))
        if response.status_code != 200:
            self.told = int(response.headers["retry-after"])
            self._mend()

    def ask(self, model: str) -> str:
        hooks = {"response": [self._hear]}
        with self._stack.openai(max_retries=1, http_client=openai.DefaultHttpxClient(event_hooks=hooks)) as client:
            answer = client.chat.completions.create(model=model, messages=HELLO)
        return str(answer.choices[0].message.content)

    @property
    def waited(self) -> float:
        return self.heard[1][1] - self.heard[0][1]


def test_a_pinned_model_refuses_the_other_and_the_client_comes_when_it_is_told_to(broken: Stack):
    broken.pin("birch")
    with broken.openai() as client, pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="cedar", messages=HELLO)
    assert (error.value.status_code, error.value.code) == (503, "model_not_pinned")
    retrying = Retrying(broken, broken.unpin)
    assert retrying.ask("cedar").split()[0] == "cedar"
    assert [status for status, _ in retrying.heard] == [503, 200]
    assert 1 <= retrying.told <= 60, "longer than that no client waits"
    assert retrying.waited >= retrying.told


def test_a_full_queue_refuses_and_the_client_comes_when_it_is_told_to(tmp_path):
    with running(tmp_path / "full", models={"cedar": {"max_in_flight": 1, "max_queue": 1}}) as stack:
        stack.ask("cedar")
        stack.fault("cedar", "hang_generation")
        waiters = [threading.Thread(target=stack.ask, args=("cedar",)) for _ in range(2)]
        for thread in waiters:
            thread.start()
        until(lambda: (stack.status()["in_flight"], stack.status()["queued"]) == (1, 1), "the queue is full")
        with stack.openai() as client, pytest.raises(openai.RateLimitError) as error:
            client.chat.completions.create(model="cedar", messages=HELLO)
        assert error.value.code == "queue_full"
        retrying = Retrying(stack, lambda: stack.fault("cedar", ""))
        assert retrying.ask("cedar").split()[0] == "cedar"
        assert [status for status, _ in retrying.heard] == [429, 200]
        assert retrying.waited >= retrying.told >= 1
        for thread in waiters:
            thread.join()


def test_no_more_is_asked_of_an_engine_than_a_client_asks(stack: Stack):
    stack.ask("cedar")
    before = stack.asked("cedar", CHAT)
    with stack.openai(max_retries=5) as client:
        for _ in range(3):
            client.chat.completions.create(model="cedar", messages=HELLO)
    assert stack.asked("cedar", CHAT) == before + 3


def test_a_stream_that_waits_for_its_model_is_kept_alive(tmp_path):
    """Its client's timeout is shorter than the start of the engine."""
    slow = {"env": {"LLMUX_SIM_SCALE": "1", "LLMUX_SIM_START_SECS": "9", "LLMUX_SIM_LOAD_GIB_S": "100"}}
    with running(tmp_path / "slow", {"heartbeat_secs": 0.3}, {"birch": slow}) as stack, stack.openai() as client:
        stream = client.chat.completions.create(model="birch", messages=HELLO, max_tokens=3, stream=True, timeout=6)
        assert [chunk.choices[0].delta.content for chunk in stream][1] == "birch"


def test_x_llmux_wait_of_0_does_not_wait(broken: Stack):
    broken.ask("cedar")
    with broken.openai(default_headers={"x-llmux-wait": "0"}) as client:
        with pytest.raises(openai.APIStatusError) as error:
            client.chat.completions.create(model="birch", messages=HELLO)
        assert error.value.status_code in (429, 503, 504)
        assert client.chat.completions.create(model="cedar", messages=HELLO)
