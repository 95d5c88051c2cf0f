"""The clients that users have, over real vLLM engines: each API that the tiny models can answer, across switches.

All that these clients do is tried against simulated engines, in tests/clients; here is shown that these are like vLLM.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.real.stack import ANSWER_SECS, Stack, complete, until

TINY = ("tiny-a", "tiny-b")
HELLO: list[Any] = [{"role": "user", "content": "Tell me a story"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "celsius": {"type": "boolean"}},
    "required": ["city", "celsius"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}
"""Strict: a model that knows nothing is held to the schema."""


@pytest.fixture
def claude(warm: Stack) -> Iterator[anthropic.Anthropic]:
    address = f"http://127.0.0.1:{warm.port}"
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0, timeout=ANSWER_SECS) as made:
        yield made


class TestAnthropic:
    def test_a_message_is_the_same_whole_and_streamed_and_its_tokens_are_counted(
        self, claude: anthropic.Anthropic
    ) -> None:
        said = {}
        for model in TINY:
            body: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 12, "extra_body": {"top_k": 1}}
            whole = claude.messages.create(**body)
            assert (whole.type, whole.role, whole.model) == ("message", "assistant", model)
            with claude.messages.stream(**body) as stream:
                text = "".join(stream.text_stream)
                final = stream.get_final_message()
            assert text == final.content[0].text == whole.content[0].text
            assert final.usage.output_tokens == whole.usage.output_tokens
            counted = claude.messages.count_tokens(model=model, messages=HELLO)
            assert counted.input_tokens == whole.usage.input_tokens
            said[model] = text
        assert said["tiny-a"] != said["tiny-b"]

    def test_errors_are_its_own_from_llmuxd_and_from_vllm(self, claude: anthropic.Anthropic) -> None:
        with pytest.raises(anthropic.NotFoundError) as missing:
            claude.messages.create(model="oak", messages=HELLO, max_tokens=5)
        assert missing.value.body["error"]["type"] == "not_found_error"
        with pytest.raises(anthropic.BadRequestError):
            claude.messages.create(model="tiny-a", messages=HELLO, max_tokens=-1)


class TestResponses:
    def test_one_is_found_again_whichever_model_is_awake(self, client: openai.OpenAI) -> None:
        made = {
            model: client.responses.create(model=model, input="Once", max_output_tokens=12, temperature=0)
            for model in TINY
        }
        for model in TINY:
            found = client.responses.retrieve(made[model].id)
            assert (found.model, found.output_text) == (model, made[model].output_text)

    def test_its_events(self, client: openai.OpenAI) -> None:
        body: dict[str, Any] = {"model": "tiny-a", "input": "Once", "max_output_tokens": 12, "temperature": 0}
        with client.responses.stream(**body) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] == "response.completed"
        assert final.output_text == client.responses.create(**body).output_text
        assert client.responses.retrieve(final.id).output_text == final.output_text

    def test_one_in_the_background_is_cancelled(self, client: openai.OpenAI, warm: Stack) -> None:
        made = client.responses.create(
            model="big", input="Once", max_output_tokens=1900, background=True, extra_body={"ignore_eos": True}
        )
        assert made.status == "queued"
        assert client.responses.cancel(made.id).status == "cancelled"
        assert client.responses.retrieve(made.id).status == "cancelled"
        engine = warm.engine("big")
        until(lambda: engine.metric("vllm:num_requests_running") == 0, 20, "nothing runs on for nobody")

    def test_an_unknown_one_is_not_found(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve("resp_0123456789abcdef")


def test_many_async_ones_over_two_models(warm: Stack, client: openai.OpenAI) -> None:
    expected = {model: complete(client, model, tokens=8) for model in TINY}

    async def ask() -> list[tuple[str, Any]]:
        address = f"http://127.0.0.1:{warm.port}/v1"
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=ANSWER_SECS) as made:
            wanted = [TINY[number % 2] for number in range(12)]
            calls = [
                made.completions.create(
                    model=model,
                    prompt="Once upon a time",
                    max_tokens=8,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                )
                for model in wanted
            ]
            return list(zip(wanted, await asyncio.gather(*calls), strict=True))

    answers = asyncio.run(ask())
    assert all(answer.choices[0].text == expected[model] for model, answer in answers)
    assert len({answer.id for _, answer in answers}) == 12


def test_a_chat_stream_tells_its_usage(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny-b", "messages": HELLO, "max_tokens": 10, "temperature": 0}
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_a_tool_that_is_named_is_called(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {
        "model": "tiny-a",
        "messages": HELLO,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 200,
        "temperature": 0,
    }
    (call,) = client.chat.completions.create(**body).choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    with client.chat.completions.stream(**body) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)
