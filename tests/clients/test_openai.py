"""The openai package, as it comes: everything of its API that vLLM serves."""

from __future__ import annotations

import base64
import json

import openai
import pytest

from tests.clients.stack import HELLO, MODELS, TOOLS, Stack, running

SOUND = ("speech.wav", b"RIFF" + bytes(200_000), "audio/wav")


class TestChat:
    def test_whole(self, client, model):
        answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=5)
        assert answer.object == "chat.completion"
        assert answer.choices[0].message.content.split()[0] == model
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 5

    def test_streamed_says_the_same(self, client, model):
        whole = client.chat.completions.create(model=model, messages=HELLO, max_tokens=9)
        chunks = list(
            client.chat.completions.create(
                model=model, messages=HELLO, max_tokens=9, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == 9
        assert len({chunk.id for chunk in chunks}) == 1

    def test_the_stream_helper_collects_it(self, client, model):
        with client.chat.completions.stream(model=model, messages=HELLO) as stream:
            deltas = [event.delta for event in stream if event.type == "content.delta"]
            final = stream.get_final_completion()
        assert "".join(deltas) == final.choices[0].message.content

    def test_ids_are_unique(self, client):
        answers = [client.chat.completions.create(model="cedar", messages=HELLO) for _ in range(3)]
        assert len({answer.id for answer in answers}) == 3

    def test_both_models_answer_in_turns(self, client):
        for model in MODELS * 3:
            answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=2)
            assert answer.choices[0].message.content.split()[0] == model

    def test_a_lora_module_is_asked_by_its_name(self, tmp_path):
        lora = {"aliases": ["pirate"], "extra_args": ["--lora-modules", "pirate=/loras/pirate"]}
        with running(tmp_path / "lora", models={"cedar": lora}) as stack, stack.openai() as client:
            answer = client.chat.completions.create(model="pirate", messages=HELLO, max_tokens=2)
            assert answer.choices[0].message.content.split()[0] == "pirate"
            assert answer.model == "pirate"

    def test_a_large_picture_is_sent(self, client):
        picture = "data:image/png;base64," + base64.b64encode(bytes(9 * 2**20)).decode()
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "what is it?"}]
        answer = client.chat.completions.create(
            model="cedar", messages=[{"role": "user", "content": content}], max_tokens=2
        )
        assert answer.usage.completion_tokens == 2


class TestTools:
    def test_a_tool_is_called_and_told_its_result(self, client, model):
        first = client.chat.completions.create(model=model, messages=HELLO, tools=TOOLS, tool_choice="auto")
        assert first.choices[0].finish_reason == "tool_calls"
        (call,) = first.choices[0].message.tool_calls
        assert call.function.name == "weather"
        assert set(json.loads(call.function.arguments)) == {"city", "days"}
        told = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        messages = [*HELLO, first.choices[0].message.model_dump(exclude_none=True), told]
        second = client.chat.completions.create(model=model, messages=messages, tools=TOOLS)
        assert second.choices[0].message.content.split()[0] == model

    @pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
    def test_its_arguments_are_streamed(self, client, choice):
        with client.chat.completions.stream(model="birch", messages=HELLO, tools=TOOLS, tool_choice=choice) as stream:
            kinds = [event.type for event in stream]
            (call,) = stream.get_final_completion().choices[0].message.tool_calls
        assert kinds.count("tool_calls.function.arguments.delta") > 2
        assert set(json.loads(call.function.arguments)) == {"city", "days"}


class TestOthers:
    def test_completions(self, client, model):
        whole = client.completions.create(model=model, prompt="once", max_tokens=6, n=2)
        texts = ["", ""]
        for chunk in client.completions.create(model=model, prompt="once", max_tokens=6, n=2, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [choice.text for choice in whole.choices]

    def test_models(self, client):
        listed = [each.id for each in client.models.list()]
        assert set(MODELS) <= set(listed)
        assert client.models.retrieve("birch").id == "birch"

    def test_embeddings_are_asked_for_in_base64_and_in_numbers(self, client, model):
        packed = client.embeddings.create(model=model, input=["a", "b"])
        plain = client.embeddings.create(model=model, input=["a", "b"], encoding_format="float")
        for one, other in zip(packed.data, plain.data, strict=True):
            assert one.embedding == pytest.approx(other.embedding)

    def test_sound_becomes_text(self, client, model):
        answer = client.audio.transcriptions.create(model=model, file=SOUND)
        assert answer.text.split()[0] == model
        assert answer.bytes == len(SOUND[1]), "all of it has arrived"
        assert client.audio.translations.create(model=model, file=SOUND).text.split()[0] == model

    def test_and_text_in_a_stream(self, client, model):
        events = list(client.audio.transcriptions.create(model=model, file=SOUND, stream=True))
        text = "".join(event.choices[0]["delta"]["content"] for event in events)
        assert text == client.audio.transcriptions.create(model=model, file=SOUND).text

    def test_what_the_package_has_no_method_for(self, client, model):
        ranked = client.post("/rerank", body={"model": model, "query": "q", "documents": ["a", "b"]}, cast_to=object)
        assert {result["index"] for result in ranked["results"]} == {0, 1}


class TestRaw:
    def test_the_head_says_which_request_it_was_and_how_long_it_waited(self, client, model):
        raw = client.chat.completions.with_raw_response.create(model=model, messages=HELLO, max_tokens=2)
        assert raw.status_code == 200
        assert raw.headers["x-request-id"] == raw.request_id
        assert "queue" in raw.headers["server-timing"]
        assert raw.parse().choices[0].message.content.split()[0] == model

    def test_a_streaming_answer_is_read_as_it_comes(self, client):
        body = {"model": "cedar", "messages": HELLO, "stream": True, "max_tokens": 4}
        with client.chat.completions.with_streaming_response.create(**body) as raw:
            assert raw.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in raw.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"


class TestErrors:
    def test_a_model_that_there_is_not(self, client):
        with pytest.raises(openai.NotFoundError) as error:
            client.chat.completions.create(model="oak", messages=HELLO)
        assert error.value.code == "model_not_found"
        assert "cedar" in error.value.message

    def test_what_an_engine_refuses_comes_as_the_engine_says_it(self, client):
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model="cedar", prompt="")
        assert "prompt" in error.value.message
        assert error.value.request_id

    def test_a_body_without_a_model(self, client):
        with pytest.raises(openai.BadRequestError) as error:
            client.post("/completions", body={"prompt": "x"}, cast_to=object)
        assert error.value.code == "model_required"

    def test_a_path_that_there_is_not(self, client):
        with pytest.raises(openai.NotFoundError) as error:
            client.post("/fine_tuning/jobs", body={"model": "cedar"}, cast_to=object)
        assert error.value.status_code == 404

    @pytest.mark.parametrize("fault", ["die_after_tokens=3*1", "dead_in_stream=3*1"])
    def test_an_engine_that_dies_in_a_stream_is_an_error_and_no_short_answer(self, broken: Stack, fault):
        broken.ask("cedar")
        broken.fault("cedar", "stall_stream=3")
        with broken.openai() as client:
            stream = client.chat.completions.create(model="cedar", messages=HELLO, max_tokens=50, stream=True)
            assert next(stream).choices[0].delta.role == "assistant"
            broken.fault("cedar", fault)
            with pytest.raises(openai.APIError) as error:
                list(stream)
        assert "engine" in str(error.value).lower()
