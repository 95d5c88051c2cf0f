"""Every API of the simulated engine, in the forms that vLLM's answers and events have on the wire.

What the clients' own packages make of them is in tests/clients.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from typing import Any

import aiohttp
import pytest

from tests.integration.stack import until
from tests.integration.test_sim_engine import SLOW, Sim, sim

__all__ = ["sim"]

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
STORE = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}


def events_of(text: str) -> list[tuple[str, Any]]:
    """Name and content of each server-sent event."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        found.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found


def stream(engine: Sim, path: str, body: dict[str, Any]) -> list[tuple[str, Any]]:
    status, text = engine.call("POST", path, {**body, "stream": True})
    assert status == 200, text
    return events_of(text)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One that serves as it does by default; no test changes it."""
    made = Sim(tmp_path_factory.mktemp("plain"), "m", {}).ready()
    yield made
    made.end()


@pytest.fixture(scope="module")
def storing(tmp_path_factory):
    """One that keeps responses."""
    made = Sim(tmp_path_factory.mktemp("storing"), "s", STORE).ready()
    yield made
    made.end()


class TestCompletions:
    @pytest.mark.parametrize(
        ("path", "body"), [("completions", {"prompt": "x"}), ("chat/completions", {"messages": HELLO})]
    )
    def test_a_stream_tells_its_usage_if_asked(self, engine, path, body):
        body |= {"max_tokens": 4}
        plain = stream(engine, f"/v1/{path}", body)
        assert plain[-1] == ("", "[DONE]")
        assert plain[-2][1]["choices"][0]["finish_reason"] == "length"
        assert "usage" not in plain[-2][1]
        counted = stream(engine, f"/v1/{path}", {**body, "stream_options": {"include_usage": True}})
        assert counted[-2][1]["choices"] == []
        assert counted[-2][1]["usage"]["completion_tokens"] == 4
        whole = engine.call("POST", f"/v1/{path}", body)[1]
        assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + 4

    def test_what_nothing_bounds_ends_by_itself(self, engine):
        answer = engine.call("POST", "/v1/chat/completions", {"messages": HELLO})[1]
        assert answer["choices"][0]["finish_reason"] == "stop"

    def test_ids_are_unique_or_the_clients(self, engine):
        ids = {engine.ask()["id"] for _ in range(3)}
        assert len(ids) == 3
        assert all(found.startswith("cmpl-") for found in ids)
        _, events = engine.stream(tokens=3)
        assert len({event["id"] for event in events}) == 1

    def test_several_prompts_and_choices(self, engine):
        answer = engine.ask(prompt=["a", "b"], n=2)
        texts = [choice["text"] for choice in answer["choices"]]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert len(set(texts)) == 4
        streamed = [""] * 4
        for _, event in stream(engine, "/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 5})[:-1]:
            streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert streamed == texts

    def test_a_batch_of_chats(self, engine):
        answer = engine.call("POST", "/v1/chat/completions/batch", {"messages": [HELLO, HELLO, HELLO]})[1]
        assert len(answer["choices"]) == 3

    @pytest.mark.parametrize(
        ("choice", "finish"),
        [
            ("required", "tool_calls"),
            ("auto", "tool_calls"),
            ({"type": "function", "function": {"name": "weather"}}, "stop"),
        ],
        ids=["required", "auto", "named"],
    )
    def test_a_tool_is_called_whole_and_streamed(self, engine, choice, finish):
        body = {"messages": HELLO, "tools": [WEATHER], "tool_choice": choice}
        answer = engine.call("POST", "/v1/chat/completions", body)[1]["choices"][0]
        (call,) = answer["message"]["tool_calls"]
        assert (call["function"]["name"], answer["finish_reason"]) == ("weather", finish)
        assert set(json.loads(call["function"]["arguments"])) == {"city", "days"}
        deltas = [e["choices"][0]["delta"] for _, e in stream(engine, "/v1/chat/completions", body)[:-1]]
        calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
        assert [c["function"].get("name") for c in calls][:2] == ["weather", None]
        assert "".join(c["function"].get("arguments", "") for c in calls) == call["function"]["arguments"]

    @pytest.mark.parametrize(
        "more", [{"tool_choice": "none"}, {"messages": [*HELLO, {"role": "tool", "content": "20"}]}]
    )
    def test_no_tool_is_called_where_none_is_due(self, engine, more):
        body = {"messages": HELLO, "tools": [WEATHER], **more}
        assert engine.call("POST", "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]

    def test_a_lora_module_cannot_have_a_served_name(self, tmp_path):
        engine = Sim(tmp_path, "m", {}, ("--lora-modules", "m=/r"))
        try:
            assert engine.process.wait(20) == 1
        finally:
            engine.end()
        assert "The lora adapter 'm' conflicts with a served base model" in engine.log.read_text()

    def test_a_lora_module_answers_for_itself_and_an_alias_for_the_model(self, tmp_path):
        engine = Sim(tmp_path, "m", {}, ("--lora-modules", "rank=/r", '{"name": "pirate", "path": "/p"}')).ready()
        try:
            for name in ("rank", "pirate"):
                answer = engine.ask(model=name)
                assert (answer["model"], answer["choices"][0]["text"].split()[0]) == (name, name)
        finally:
            engine.end()


class TestMessages:
    def test_whole(self, engine):
        answer = engine.call("POST", "/v1/messages", {"model": "m", "messages": HELLO, "max_tokens": 4})[1]
        assert (answer["type"], answer["role"], answer["stop_reason"]) == ("message", "assistant", "max_tokens")
        assert answer["content"][0]["text"].startswith("m ")
        assert answer["usage"]["output_tokens"] == 4
        tools = [{"name": "weather", "input_schema": SCHEMA}]
        body = {"model": "m", "messages": HELLO, "max_tokens": 4, "tools": tools, "tool_choice": {"type": "any"}}
        called = engine.call("POST", "/v1/messages", body)[1]
        assert called["stop_reason"] == "tool_use"
        assert set(called["content"][0]["input"]) == {"city", "days"}

    def test_streamed(self, engine):
        events = stream(engine, "/v1/messages", {"model": "m", "messages": HELLO, "max_tokens": 3})
        assert all(name == event["type"] for name, event in events)
        names = [name for name, _ in events]
        assert names[:2] == ["message_start", "content_block_start"]
        assert names[2:-3] == ["content_block_delta"] * 3
        assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert events[-2][1]["usage"]["output_tokens"] == 3

    def test_tokens_are_counted(self, engine):
        status, answer = engine.call("POST", "/v1/messages/count_tokens", {"model": "m", "messages": HELLO})
        assert (status, answer["input_tokens"]) == (200, 4)

    def test_errors_are_anthropics_unless_no_api_was_reached(self, engine):
        body = {"model": "x", "messages": HELLO, "max_tokens": 4}
        assert engine.call("POST", "/v1/messages", body)[1]["error"]["type"] == "NotFoundError"
        assert engine.call("POST", "/v1/messages", body)[1]["type"] == "error"
        status, answer = engine.call("POST", "/v1/messages", {"model": "m", "messages": HELLO})
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, 400, "body.max_tokens")


class TestResponses:
    def test_streamed_as_whole(self, engine):
        whole = engine.call("POST", "/v1/responses", {"input": "x", "max_output_tokens": 4})[1]
        assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        events = stream(engine, "/v1/responses", {"input": "x", "max_output_tokens": 4})
        assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
        assert events[0][0] == "response.created"
        last = events[-1][1]["response"]
        assert last["output"][0]["content"] == whole["output"][0]["content"]
        assert last["id"].startswith("resp_")
        assert last["id"] != whole["id"]

    def test_nothing_is_kept_by_default(self, engine):
        made = engine.call("POST", "/v1/responses", {"input": "x", "store": True})[1]
        status, answer = engine.call("GET", f"/v1/responses/{made['id']}")
        assert (status, answer["error"]["type"], answer["error"]["param"]) == (
            404,
            "invalid_request_error",
            "response_id",
        )
        assert engine.call("POST", "/v1/responses", {"input": "x", "background": True})[0] == 400

    def test_they_are_kept_and_go_on_from_each_other(self, storing):
        made = storing.call("POST", "/v1/responses", {"input": "x"})[1]
        assert storing.call("GET", f"/v1/responses/{made['id']}") == (200, made)
        assert storing.call("POST", "/v1/responses", {"input": "y", "previous_response_id": made["id"]})[0] == 200
        assert storing.call("POST", "/v1/responses", {"input": "y", "previous_response_id": "resp_0"})[0] == 404
        streamed = stream(storing, "/v1/responses", {"input": "x"})[-1][1]["response"]
        assert storing.call("GET", f"/v1/responses/{streamed['id']}")[1] == streamed
        status, answer = storing.call("POST", f"/v1/responses/{made['id']}/cancel")
        assert (status, answer["error"]["message"]) == (400, "Cannot cancel a synchronous response.")
        assert storing.call("DELETE", f"/v1/responses/{made['id']}")[0] == 405, "vLLM deletes none"
        unkept = storing.call("POST", "/v1/responses", {"input": "x", "store": False})[1]
        assert storing.call("GET", f"/v1/responses/{unkept['id']}")[0] == 404

    def test_one_runs_in_the_background_or_is_cancelled(self, storing):
        made = storing.call("POST", "/v1/responses", {"input": "x", "background": True})[1]
        assert made["status"] == "queued"
        path = f"/v1/responses/{made['id']}"
        until(lambda: storing.call("GET", path)[1]["status"] == "completed", "it is done")
        storing.faults.write_text("hang_generation")
        hung = storing.call("POST", "/v1/responses", {"input": "x", "background": True})[1]
        assert storing.call("POST", f"/v1/responses/{hung['id']}/cancel")[1]["status"] == "cancelled"
        storing.faults.unlink()
        assert storing.metric("vllm:num_requests_waiting") == 0
        assert storing.call("GET", f"/v1/responses/{hung['id']}")[1]["status"] == "cancelled"

    def test_a_background_stream_can_be_followed_again(self, storing):
        events = stream(storing, "/v1/responses", {"input": "x", "background": True})
        path = f"/v1/responses/{events[0][1]['response']['id']}?stream=true"
        assert events_of(storing.call("GET", path)[1]) == events
        assert events_of(storing.call("GET", f"{path}&starting_after=5")[1]) == events[6:]


class TestFigures:
    def test_embeddings_in_numbers_and_base64(self, engine):
        plain = engine.call("POST", "/v1/embeddings", {"input": ["a", "b"], "dimensions": 3})[1]
        assert [len(each["embedding"]) for each in plain["data"]] == [3, 3]
        packed = engine.call("POST", "/v1/embeddings", {"input": "a", "dimensions": 3, "encoding_format": "base64"})[1]
        numbers = struct.unpack("<3f", base64.b64decode(packed["data"][0]["embedding"]))
        assert numbers == pytest.approx(plain["data"][0]["embedding"])
        tokens = engine.call("POST", "/v1/embeddings", {"input": [1, 2, 3]})[1]
        assert len(tokens["data"]) == 1
        cohere = engine.call("POST", "/v2/embed", {"texts": ["a", "b"], "embedding_types": ["float"]})[1]
        assert len(cohere["embeddings"]["float"]) == 2

    @pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
    def test_ranks(self, engine, path):
        body = {"query": "q", "documents": ["a", "b", "c"], "top_n": 2}
        first, second = engine.call("POST", path, body)[1]["results"]
        assert first["relevance_score"] > second["relevance_score"]
        assert first["document"]["text"] == "abc"[first["index"]]

    def test_scores_classes_pools(self, engine):
        for path in ("/score", "/v1/score"):
            answer = engine.call("POST", path, {"text_1": "q", "text_2": ["a", "b"]})[1]
            assert [each["object"] for each in answer["data"]] == ["score"] * 2
        assert engine.call("POST", "/score", {"text_1": ["q"] * 3, "text_2": ["a", "b"]})[0] == 400
        (found,) = engine.call("POST", "/classify", {"input": "a"})[1]["data"]
        assert sum(found["probs"]) == pytest.approx(1)
        assert engine.call("POST", "/pooling", {"input": "a"})[1]["data"][0]["object"] == "pooling"
        scored = engine.call("POST", "/generative_scoring", {"query": "q", "items": ["a"], "label_token_ids": [1, 2]})[
            1
        ]
        assert len(scored["data"]) == 1
        decided = engine.call("POST", "/v1/systemone", {"state": "s", "questions": {"q": {"type": "bool"}}})[1]
        assert set(decided["answers"]) == {"q"}

    def test_tokens_there_and_back(self, engine):
        counted = engine.call("POST", "/tokenize", {"prompt": "abc"})[1]
        assert (counted["count"], counted["max_model_len"]) == (3, 4096)
        assert engine.call("POST", "/detokenize", {"tokens": counted["tokens"]})[1] == {"prompt": "abc"}

    def test_tokens_in_and_out_need_their_argument(self, tmp_path, engine):
        assert engine.call("POST", "/inference/v1/generate", {"token_ids": [1]})[0] == 403
        other = Sim(tmp_path, "n", {}, ("--enable-scale-out",)).ready()
        try:
            answer = other.call("POST", "/inference/v1/generate", {"token_ids": [1], "max_tokens": 2})[1]
            assert bytes(answer["choices"][0]["token_ids"]).decode().startswith("n ")
        finally:
            other.end()


class TestSpeech:
    def upload(self, engine: Sim, path: str = "/v1/audio/transcriptions", **fields: str) -> tuple[int, Any]:
        parts = "".join(
            f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
        )
        sound = '--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nabc\r\n--b--\r\n'
        return engine.call("POST", path, parts + sound, "multipart/form-data; boundary=b")

    def test_a_file_becomes_text(self, engine):
        status, answer = self.upload(engine, model="m", response_format="text")
        assert (status, answer["bytes"], answer["usage"]) == (200, 3, {"type": "duration", "seconds": 1})
        assert "usage" not in self.upload(engine, "/v1/audio/translations", model="m")[1]
        assert "duration" in self.upload(engine, response_format="verbose_json")[1]
        assert self.upload(engine, model="x")[0] == 404
        assert self.upload(engine, response_format="srt")[0] == 400

    def test_and_text_in_a_stream(self, engine):
        events = events_of(self.upload(engine, stream="true", stream_include_usage="true")[1])
        assert events[-1][1] == "[DONE]"
        assert events[0][1]["object"] == "transcription.chunk"
        assert events[-2][1]["usage"]["completion_tokens"] == 4

    def test_live_sound_becomes_text(self, engine):
        sound = base64.b64encode(b"\0\1" * 100).decode()

        async def talk() -> list[dict[str, Any]]:
            got = []
            connector = aiohttp.UnixConnector(str(engine.uds))
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.ws_connect("http://engine/v1/realtime?model=m") as socket,
            ):
                for sent in (
                    {"type": "input_audio_buffer.commit"},
                    {"type": "session.update", "model": "x"},
                    {"type": "session.update", "model": "m"},
                    {"type": "input_audio_buffer.commit"},
                    {"type": "input_audio_buffer.append", "audio": sound},
                    {"type": "input_audio_buffer.append", "audio": sound},
                    {"type": "input_audio_buffer.append", "audio": ""},
                    {"type": "input_audio_buffer.commit", "final": True},
                ):
                    await socket.send_json(sent)
                while not got or got[-1]["type"] != "transcription.done":
                    got.append(await socket.receive_json(timeout=20))
            return got

        got = asyncio.run(talk())
        assert got[0]["type"] == "session.created"
        errors = [event["code"] for event in got if event["type"] == "error"]
        assert errors == ["model_not_validated", "model_not_found", "invalid_audio"]
        text = "".join(event["delta"] for event in got if event["type"] == "transcription.delta")
        assert text == got[-1]["text"]
        assert got[-1]["usage"]["completion_tokens"] == 4

    def test_who_hangs_up_leaves_nothing_behind(self, sim):
        engine = sim(**SLOW).ready()
        engine.faults.write_text("hang_generation")

        async def talk() -> None:
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(engine.uds))) as session:
                socket = await session.ws_connect("http://engine/v1/realtime")
                await socket.send_json({"type": "session.update", "model": "m"})
                await socket.send_json({"type": "input_audio_buffer.commit"})
                await socket.send_json({"type": "input_audio_buffer.append", "audio": "AAAA"})
                await asyncio.to_thread(until, lambda: engine.metric("vllm:num_requests_waiting") == 1, "it is there")

        asyncio.run(talk())
        until(lambda: engine.metric("vllm:num_requests_waiting") == 0, "it is gone")
