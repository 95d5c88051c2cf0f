"""litellm, as it comes, over OpenAI's API and over Anthropic's."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm
import pytest

from tests.clients.stack import HELLO, MODELS, TIMEOUT_SECS, TOOLS, Stack


def options(stack: Stack, model: str, **more: Any) -> dict[str, Any]:
    base = {"model": f"openai/{model}", "api_base": f"{stack.address}/v1", "api_key": "none"}
    return {**base, "timeout": TIMEOUT_SECS, "max_retries": 0, **more}


def test_completion(stack: Stack, model):
    answer = litellm.completion(**options(stack, model, messages=HELLO, max_tokens=5))
    assert answer.choices[0].message.content.split()[0] == model
    assert answer.usage.completion_tokens == 5


def test_streaming(stack: Stack, model):
    chunks = litellm.completion(**options(stack, model, messages=HELLO, max_tokens=5, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.split()[0] == model
    assert len(text.split()) == 5


def test_embedding(stack: Stack, model):
    answer = litellm.embedding(**options(stack, model, input=["a", "b"]))
    assert [len(each["embedding"]) for each in answer.data] == [8, 8]


def test_tools(stack: Stack):
    body = options(stack, "cedar", messages=HELLO, tools=TOOLS, tool_choice="required")
    assert litellm.completion(**body).choices[0].message.tool_calls[0].function.name == "weather"


def test_acompletion(stack: Stack):
    async def ask() -> list[Any]:
        calls = [litellm.acompletion(**options(stack, model, messages=HELLO, max_tokens=3)) for model in MODELS * 4]
        return await asyncio.gather(*calls)

    answers = asyncio.run(asyncio.wait_for(ask(), TIMEOUT_SECS * 2))
    assert [answer.choices[0].message.content.split()[0] for answer in answers] == list(MODELS * 4)


def test_anthropics_api(stack: Stack, model):
    body = options(stack, model, messages=HELLO, max_tokens=5)
    body |= {"model": f"anthropic/{model}", "api_base": stack.address}
    assert litellm.completion(**body).choices[0].message.content.split()[0] == model


def test_a_model_that_there_is_not(stack: Stack):
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**options(stack, "oak", messages=HELLO))
