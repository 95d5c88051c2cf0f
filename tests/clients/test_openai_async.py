"""The openai package's async client: many requests at once, streams side by side, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import openai
import pytest

from tests.clients.stack import HELLO, MODELS, TIMEOUT_SECS, TOOLS, Stack
from tests.integration.stack import until


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_SECS * 2))


def test_many_at_once_over_both_models(stack: Stack):
    async def ask() -> list[tuple[str, Any]]:
        async with stack.async_openai() as client:
            wanted = [MODELS[number % 2] for number in range(40)]
            calls = [
                client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": f"{number}"}], max_tokens=4
                )
                for number, model in enumerate(wanted)
            ]
            return list(zip(wanted, await asyncio.gather(*calls), strict=True))

    answers = run(ask())
    assert all(answer.choices[0].message.content.split()[0] == model for model, answer in answers)
    assert len({answer.id for _, answer in answers}) == 40


def test_streams_side_by_side(stack: Stack):
    async def tell(client: openai.AsyncOpenAI, model: str) -> str:
        stream = await client.chat.completions.create(model=model, messages=HELLO, max_tokens=20, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask() -> list[str]:
        async with stack.async_openai() as client:
            return await asyncio.gather(*(tell(client, MODELS[number % 2]) for number in range(12)))

    texts = run(ask())
    assert len(set(texts)) == 2
    assert all(len(text.split()) == 20 for text in texts)


def test_tools_responses_embeddings_and_sound(stack: Stack):
    async def ask() -> tuple[Any, ...]:
        async with stack.async_openai() as client:
            return (
                await client.chat.completions.create(
                    model="cedar", messages=HELLO, tools=TOOLS, tool_choice="required"
                ),
                await client.responses.create(model="birch", input="hello"),
                await client.embeddings.create(model="cedar", input="hello"),
                await client.audio.transcriptions.create(model="birch", file=("a.wav", bytes(1000))),
                [each.id async for each in client.models.list()],
            )

    called, said, embedded, heard, listed = run(ask())
    assert called.choices[0].message.tool_calls[0].function.name == "weather"
    assert said.output_text.split()[0] == heard.text.split()[0] == "birch"
    assert len(embedded.data[0].embedding) == 8
    assert set(MODELS) <= set(listed)


@pytest.mark.parametrize("streamed", [False, True])
def test_who_cancels_leaves_nothing_in_the_engine(broken: Stack, streamed):
    broken.ask("cedar")
    broken.fault("cedar", "stall_stream=2" if streamed else "hang_generation")

    async def ask() -> None:
        async with broken.async_openai() as client:
            body: dict[str, Any] = {"model": "cedar", "messages": HELLO, "max_tokens": 50}

            async def read() -> None:
                if not streamed:
                    await client.chat.completions.create(**body)
                    return
                async for _ in await client.chat.completions.create(**body, stream=True):
                    continue

            task = asyncio.create_task(read())
            await asyncio.to_thread(until, lambda: broken.running("cedar") == 1, "it is in the engine")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(until, lambda: broken.running("cedar") == 0, "it is gone")

    run(ask())
