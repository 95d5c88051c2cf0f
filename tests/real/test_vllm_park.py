"""Parking on a real vLLM: what is in flight stands still while another model has its turn, and goes on after it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.real.stack import GREEDY, Stack, complete, until

TOKENS = 300
MANY_TOKENS = 1900
"""So many do not come to an end before what a test does next, on any machine. A quick model has a whole turn of a second
to do with them, in which to see that the other one sleeps."""
LEVELS = ["offload+keep_running", "discard+keep_running"]
LONGEST_PAUSE_SECS = 30.0
"""Two switches and one short answer take a second or two; a loaded machine is given time."""


@pytest.fixture(scope="module")
def parking(tmp_path_factory: pytest.TempPathFactory, vllm: Path, models: dict[str, Path]) -> Iterator[Stack]:
    """A warm stack that parks, of the slow model and a quick one."""
    chosen = {name: models[name] for name in ("big", "tiny-a")}
    stack = Stack(tmp_path_factory.mktemp("parking"), vllm, chosen, warmup=True, policy={"in_flight": "park"})
    try:
        stack.start()
        stack.wait_for_port()
        yield stack
    finally:
        stack.kill()


@pytest.fixture
def client(parking: Stack) -> Iterator[openai.OpenAI]:
    with parking.client() as made:
        yield made


class Stream:
    """A stream of `big` that is being read: its pieces, and when each came."""

    def __init__(self, client: openai.OpenAI, prompt: str, tokens: int = TOKENS) -> None:
        self.pieces: list[str] = []
        self.times: list[float] = []
        self.finish: str | None = None
        self._ask: Any = {"prompt": prompt, "max_tokens": tokens}
        self._client = client
        self._chunks: Any = None

    def read(self) -> Stream:
        """Ask, and read to the end, or until it is closed from elsewhere."""
        self._chunks = self._client.completions.create(model="big", stream=True, **self._ask, **GREEDY)
        for chunk in self._chunks:
            if chunk.choices:
                self.pieces.append(chunk.choices[0].text)
                self.times.append(time.monotonic())
                self.finish = chunk.choices[0].finish_reason or self.finish
        return self

    def leave(self) -> None:
        """Go away now. To close it would take effect after the next byte, while another thread reads."""
        connected = self._chunks.response.extensions["network_stream"].get_extra_info("socket")
        with suppress(OSError):  # It has come to its end.
            connected.shutdown(socket.SHUT_RDWR)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def longest_pause(self) -> float:
        return max(after - before for before, after in zip(self.times, self.times[1:], strict=False))


def tell(client: openai.OpenAI, prompt: str, tokens: int = TOKENS) -> str:
    """The unparked answer."""
    answer: Any = client.completions.create(model="big", prompt=prompt, max_tokens=tokens, **GREEDY)
    return str(answer.choices[0].text)


def in_flight(stack: Stack) -> int:
    return int(stack.status()["models"]["big"]["in_flight"])


def parked(stack: Stack, requests: int) -> bool:
    big = stack.status()["models"]["big"]
    return bool(big["engine"] == "asleep" and big["in_flight"] == requests)


@pytest.mark.parametrize("eviction", LEVELS)
def test_a_stream_is_parked_for_another_model_and_goes_on(parking: Stack, client: openai.OpenAI, eviction: str) -> None:
    parking.ctl("eviction", "big", eviction)
    prompt = "Once upon a time there was a model"
    expected = tell(client, prompt)
    pid = parking.model("big")["pid"]
    with ThreadPoolExecutor(2) as pool:
        stream = Stream(client, prompt)
        reading = pool.submit(stream.read)
        until(lambda: len(stream.pieces) > 20, 60, "the stream is under way")
        # Sleeping and busy at once: it can only be a parked request.
        answered: list[float] = []
        other = pool.submit(complete, client, "tiny-a", tokens=MANY_TOKENS)
        other.add_done_callback(lambda _: answered.append(time.monotonic()))
        until(lambda: parked(parking, 1), 60, "the stream is parked")
        assert other.result()
        reading.result()
        assert answered[0] < stream.times[-1], "the other model was answered in the middle of the stream"
    assert stream.finish == "length"
    assert stream.text == expected
    assert parking.model("big")["pid"] == pid
    print(f"{eviction}: paused for {stream.longest_pause:.2f} s")
    assert stream.longest_pause < LONGEST_PAUSE_SECS


def test_ten_streams_are_parked_at_once(parking: Stack, client: openai.OpenAI) -> None:
    """Four of them run and six wait inside the engine: both kinds stand still, and go on."""
    parking.ctl("eviction", "big", LEVELS[0])
    prompts = [f"Chapter {number}: " for number in range(10)]
    with ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(lambda prompt: tell(client, prompt, 150), prompts))
    with ThreadPoolExecutor(11) as pool:
        streams = [Stream(client, prompt, 150) for prompt in prompts]
        readings = [pool.submit(stream.read) for stream in streams]
        until(lambda: any(len(stream.pieces) > 5 for stream in streams), 60, "they are under way")
        until(lambda: in_flight(parking) == 10, 60, "all of them are with the engine")
        other = pool.submit(complete, client, "tiny-a", tokens=MANY_TOKENS)
        until(lambda: parked(parking, 10), 60, "all ten are parked")
        assert other.result()
        for reading in readings:
            reading.result()
    assert [stream.text for stream in streams] == expected
    assert {stream.finish for stream in streams} == {"length"}


def test_a_client_leaves_while_it_is_parked(parking: Stack, client: openai.OpenAI) -> None:
    """Its request goes, without a wake; the one beside it goes on."""
    parking.ctl("eviction", "big", LEVELS[0])
    expected = tell(client, "The one who stays")
    with ThreadPoolExecutor(2) as pool:
        stays, leaves = (Stream(client, f"The one who {does}", MANY_TOKENS) for does in ("stays", "leaves"))
        for stream in (stays, leaves):
            pool.submit(_read_until_it_leaves, stream)
        until(lambda: len(stays.pieces) > 10 and len(leaves.pieces) > 10, 60, "both are under way")
        try:
            parking.ctl("pin", "tiny-a")
            assert parked(parking, 2)
            leaves.leave()
            until(lambda: parked(parking, 1), 60, "one is left, and the model still sleeps")
            had = len(stays.pieces)
            parking.ctl("unpin")
            until(lambda: len(stays.pieces) > had and len(stays.text) >= len(expected), 60, "it goes on")
        finally:
            leaves.leave()
            stays.leave()
    assert stays.text.startswith(expected)
    engine = parking.engine("big")
    until(lambda: engine.metric("vllm:num_requests_running") == 0, 20, "nothing runs on for nobody")


def _read_until_it_leaves(stream: Stream) -> None:
    try:
        stream.read()
    except openai.APIConnectionError as error:
        print(f"left: {error!r}")
