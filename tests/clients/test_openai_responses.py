"""The openai package's responses: made, streamed, found again by their id, run in the background, cancelled."""

from __future__ import annotations

import json

import openai
import pytest

from tests.clients.stack import SCHEMA, Stack
from tests.integration.stack import until

TOOLS = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}]


def test_made(client, model):
    answer = client.responses.create(model=model, input="hello", max_output_tokens=5)
    assert answer.output_text.split()[0] == model
    assert answer.usage.output_tokens == 5


def test_streamed(client, model):
    with client.responses.stream(model=model, input="hello", max_output_tokens=5) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert final.output_text == client.responses.create(model=model, input="hello", max_output_tokens=5).output_text


def test_a_tool_is_called(client):
    answer = client.responses.create(model="birch", input="hello", tools=TOOLS, tool_choice="required")
    (call,) = answer.output
    assert (call.type, call.name) == ("function_call", "weather")
    assert set(json.loads(call.arguments)) == {"city", "days"}
    told = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    after = client.responses.create(
        model="birch", input=[told], tools=TOOLS, previous_response_id=answer.id, store=False
    )
    assert after.output_text.split()[0] == "birch"


def test_each_is_found_again_by_its_id_whichever_model_is_awake(client):
    made = {name: client.responses.create(model=name, input="hello") for name in ("cedar", "birch")}
    assert len({answer.id for answer in made.values()}) == 2
    for name in ("cedar", "birch", "cedar"):
        found = client.responses.retrieve(made[name].id)
        assert (found.model, found.output_text) == (name, made[name].output_text)


def test_one_that_was_streamed_is_found_again(client):
    with client.responses.stream(model="cedar", input="hello") as stream:
        final = stream.get_final_response()
    client.responses.create(model="birch", input="hello")
    assert client.responses.retrieve(final.id).output_text == final.output_text


def test_one_runs_in_the_background(client):
    made = client.responses.create(model="cedar", input="hello", background=True)
    assert made.status == "queued"
    done = until(lambda: _ended(client, made.id), "it is completed")
    assert done.output_text.split()[0] == "cedar"


def _ended(client: openai.OpenAI, response_id: str):
    found = client.responses.retrieve(response_id)
    return found if found.status == "completed" else None


def test_one_in_the_background_is_followed_from_where_one_was(client):
    events = list(client.responses.create(model="cedar", input="hello", background=True, stream=True))
    again = client.responses.retrieve(events[0].response.id, stream=True, starting_after=3)
    assert [event.sequence_number for event in again] == [event.sequence_number for event in events[4:]]


def test_one_in_the_background_is_cancelled(broken: Stack, client):
    broken.ask("cedar")
    broken.fault("cedar", "hang_generation")
    made = client.responses.create(model="cedar", input="hello", background=True)
    assert client.responses.cancel(made.id).status == "cancelled"
    assert client.responses.retrieve(made.id).status == "cancelled"
    until(lambda: broken.running("cedar") == 0, "the engine does nothing for it")


def test_one_that_is_done_cannot_be_cancelled(client):
    made = client.responses.create(model="cedar", input="hello")
    with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
        client.responses.cancel(made.id)


def test_an_unknown_one_is_not_found(client):
    for call in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
        with pytest.raises(openai.NotFoundError) as error:
            call("resp_0123456789abcdef")
        assert error.value.code == "response_not_found"


def test_vllm_deletes_none_and_says_so_itself(client):
    made = client.responses.create(model="cedar", input="hello")
    with pytest.raises(openai.APIStatusError) as error:
        client.responses.delete(made.id)
    assert error.value.status_code == 405
    assert client.responses.retrieve(made.id).id == made.id


def test_one_that_is_not_stored_is_not_found_by_the_engine(client):
    made = client.responses.create(model="cedar", input="hello", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
