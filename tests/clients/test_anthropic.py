"""The anthropic package, as it comes, sync and async: messages, streams, tools, counting, and its own errors."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import anthropic
import pytest

from tests.clients.stack import HELLO, MODELS, SCHEMA, TIMEOUT_SECS, Stack
from tests.integration.stack import until

TOOLS: list[Any] = [{"name": "weather", "description": "d", "input_schema": SCHEMA}]


def test_whole(claude, model):
    answer = claude.messages.create(model=model, messages=HELLO, max_tokens=5)
    assert answer.content[0].text.split()[0] == model
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 5)


def test_the_stream_helper(claude, model):
    with claude.messages.stream(model=model, messages=HELLO, max_tokens=9) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text
    assert text == claude.messages.create(model=model, messages=HELLO, max_tokens=9).content[0].text


def test_raw_events(claude, model):
    kinds = [e.type for e in claude.messages.create(model=model, messages=HELLO, max_tokens=3, stream=True)]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("content_block_delta") == 3


def test_tools(claude, model):
    first = claude.messages.create(model=model, messages=HELLO, max_tokens=50, tools=TOOLS, tool_choice={"type": "any"})
    (call,) = first.content
    assert (first.stop_reason, call.name, set(call.input)) == ("tool_use", "weather", {"city", "days"})
    told = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    messages = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": [told]}]
    second = claude.messages.create(model=model, messages=messages, max_tokens=5, tools=TOOLS)
    assert second.content[0].text.split()[0] == model
    with claude.messages.stream(
        model=model, messages=HELLO, max_tokens=50, tools=TOOLS, tool_choice={"type": "tool", "name": "weather"}
    ) as stream:
        assert stream.get_final_message().content[0].input == call.input


def test_tokens_are_counted(claude, model):
    assert claude.messages.count_tokens(model=model, messages=HELLO).input_tokens == 4


def test_the_head_says_which_request_it_was(claude, model):
    raw = claude.messages.with_raw_response.create(model=model, messages=HELLO, max_tokens=2)
    assert raw.headers["x-request-id"]
    assert raw.parse().content[0].text.split()[0] == model


def test_async(stack: Stack):
    async def tell(client: anthropic.AsyncAnthropic, model: str) -> str:
        async with client.messages.stream(model=model, messages=HELLO, max_tokens=9) as stream:
            return "".join([text async for text in stream.text_stream])

    async def ask() -> tuple[list[Any], list[str]]:
        async with stack.async_anthropic() as client:
            whole = [client.messages.create(model=model, messages=HELLO, max_tokens=9) for model in MODELS * 4]
            answers = await asyncio.gather(*whole)
            return answers, await asyncio.gather(*(tell(client, model) for model in MODELS * 4))

    answers, streamed = asyncio.run(asyncio.wait_for(ask(), TIMEOUT_SECS * 2))
    assert [answer.content[0].text for answer in answers] == streamed
    assert [text.split()[0] for text in streamed] == list(MODELS * 4)


class TestErrors:
    def test_a_model_that_there_is_not(self, claude):
        with pytest.raises(anthropic.NotFoundError) as error:
            claude.messages.create(model="oak", messages=HELLO, max_tokens=5)
        assert error.value.body["type"] == "error"
        assert error.value.body["error"]["type"] == "not_found_error"
        assert "cedar" in error.value.body["error"]["message"]
        with pytest.raises(anthropic.NotFoundError):
            claude.messages.count_tokens(model="oak", messages=HELLO)

    def test_what_an_engine_refuses(self, claude):
        with pytest.raises(anthropic.BadRequestError) as error:
            claude.post("/v1/messages", body={"model": "cedar", "messages": []}, cast_to=object)
        assert "max_tokens" in str(error.value)

    def test_a_pinned_model(self, broken: Stack, claude):
        broken.pin("birch")
        with pytest.raises(anthropic.APIStatusError) as error:
            claude.messages.create(model="cedar", messages=HELLO, max_tokens=5)
        assert error.value.status_code == 503
        assert error.value.body["type"] == "error"
        assert int(error.value.response.headers["retry-after"]) > 0

    def test_a_timeout(self, broken: Stack):
        broken.ask("cedar")
        broken.fault("cedar", "hang_generation")
        with broken.anthropic(timeout=0.3) as client, pytest.raises(anthropic.APITimeoutError):
            client.messages.create(model="cedar", messages=HELLO, max_tokens=5)
        until(lambda: broken.running("cedar") == 0, "it is gone")

    @pytest.mark.parametrize("fault", ["die_after_tokens=3*1", "dead_in_stream=3*1"])
    def test_an_engine_that_dies_in_a_stream_is_raised(self, broken: Stack, claude, fault):
        broken.ask("cedar")
        broken.fault("cedar", "stall_stream=3")
        with claude.messages.stream(model="cedar", messages=HELLO, max_tokens=50) as stream:
            texts = stream.text_stream
            assert next(texts) == "cedar"
            broken.fault("cedar", fault)
            with pytest.raises(anthropic.APIError) as error:
                list(texts)
        assert error.value.body["type"] == "error"

    def test_so_is_one_that_is_killed(self, broken: Stack, claude):
        broken.ask("cedar")
        broken.fault("cedar", "stall_stream=3")
        with claude.messages.stream(model="cedar", messages=HELLO, max_tokens=50) as stream:
            texts = stream.text_stream
            assert next(texts) == "cedar"
            os.kill(broken.model("cedar")["pid"], signal.SIGKILL)
            with pytest.raises(anthropic.APIError) as error:
                list(texts)
        assert error.value.body["type"] == "error"
