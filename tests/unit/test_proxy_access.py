"""What is noted of a request, and the lines of the access log."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmuxd.proxy import access
from llmuxd.proxy.access import FLUSH_SECS, AccessLog, Call, log_each, usage
from tests.unit.clock import Clock, on_clock


def event(value: object, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(value).encode() + b"\n\n"


def chunked(*events: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in events) + b"0\r\n\r\n"


CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "logprobs": None}],
    "usage": {"prompt_tokens": 12, "total_tokens": 19, "completion_tokens": 7, "prompt_tokens_details": None},
    "prompt_logprobs": None,
    "kv_transfer_params": None,
}
QUOTED = 'say "usage": {"prompt_tokens": 1, "completion_tokens": 2} and {"usage": {"input_tokens": 3}}'
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "output": [
        {"type": "message", "content": [{"type": "output_text", "text": QUOTED, "logprobs": [{"token": "usage"}]}]}
    ],
    "tools": [{"type": "function", "parameters": {"properties": {"usage": {"type": "object"}}}}],
    "usage": {
        "input_tokens": 30,
        "input_tokens_details": {"cached_tokens": 16},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 4},
        "total_tokens": 35,
    },
    "user": None,
}


class TestUsage:
    @pytest.mark.parametrize(
        ("tail", "prompt", "completion"),
        [
            (json.dumps(CHAT).encode(), "12", "7"),
            (json.dumps(CHAT, indent=2).encode(), "12", "7"),
            (json.dumps({**CHAT, "prompt_logprobs": [None, {"9": {"logprob": -1.5, "decoded_token": "usage"}}]}).encode(), "12", "7"),
            (json.dumps({**CHAT, "choices": [{"message": {"content": QUOTED}}]}).encode(), "12", "7"),
            (chunked(event({"choices": [{"delta": {"content": QUOTED}}]}), event({"choices": [], "usage": CHAT["usage"]}), b"data: [DONE]\n\n"), "12", "7"),
            (chunked(event({"choices": [], "usage": CHAT["usage"]}), event({"choices": [], "usage": None}), b"data: [DONE]\n\n"), "12", "7"),
            (json.dumps(RESPONSE).encode(), "30", "5"),
            (chunked(event({"type": "response.completed", "response": RESPONSE, "sequence_number": 9}, "response.completed")), "30", "5"),
            (
                chunked(
                    event({"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 0}}}, "message_start"),
                    event({"type": "content_block_delta", "delta": {"type": "text_delta", "text": QUOTED}}, "content_block_delta"),
                    event({"type": "message_delta", "delta": {}, "usage": {"input_tokens": 9, "output_tokens": 4}}, "message_delta"),
                    event({"type": "message_stop"}, "message_stop"),
                ),
                "9",
                "4",
            ),
            (b'{"type":"message","content":[],"usage":{"input_tokens":9,"output_tokens":4},"kv_transfer_params":null}', "9", "4"),
            (b'{"data":[{"embedding":[0.1]}],"usage":{"prompt_tokens":3,"total_tokens":3,"completion_tokens":0}}', "3", "0"),
            (b'{"usage":{"total_tokens":3},"results":[{"document":{"text":"a"}}]}', "-", "-"),
            (b'{"text":"a","usage":{"type":"duration","seconds":4}}', "-", "-"),
            (b'{"usage":{"prompt_tokens":3}}', "3", "-"),
            (b'{"usage":null}', "-", "-"),
            (b'{"content":"usage"}', "-", "-"),
            (json.dumps({"choices": [{"message": {"content": QUOTED}}]}).encode(), "-", "-"),
            (b'{"input_tokens": 5}', "-", "-"),
            (b"", "-", "-"),
            (b'"usage"', "-", "-"),
            (b'"usage":{', "-", "-"),
            (b'"usage":{"prompt_tokens":' + b"1" * 100 + b"}", "-", "-"),
            (b'"usage":{"input_tokens":7,"output_tokens":1', "7", "-"),
        ],
    )  # fmt: skip
    def test_of_the_end_of_an_answer(self, tail: bytes, prompt: str, completion: str) -> None:
        assert usage(tail) == (prompt, completion)

    @settings(derandomize=True, database=None, deadline=None, max_examples=100)
    @given(st.text(st.sampled_from('"\\:{}usage prompt_tokens0123456789,\n')), st.text())
    def test_no_text_is_taken_for_it(self, text: str, more: str) -> None:
        for said in (
            text + QUOTED + more,
            QUOTED + text,
            json.dumps(QUOTED) + text,
            json.dumps({"usage": {"prompt_tokens": 1}}) + text,
        ):
            body = {"choices": [{"message": {"content": said, "usage": said}}]}
            assert usage(json.dumps(body).encode()) == ("-", "-")
            assert usage(
                json.dumps({**body, "usage": {"prompt_tokens": 5, "completion_tokens": 6}, "x": said}).encode()
            ) == ("5", "6")


def call(**fields: object) -> Call:
    made = Call("id-1", "POST", "/v1/chat/completions")
    for name, value in fields.items():
        setattr(made, name, value)
    return made


FIELD = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^ ]+)(?: |\Z)')


def fields_of(line: str) -> dict[str, str]:
    found = FIELD.findall(line)
    assert "".join(f"{name}={value} " for name, value in found) == line + " ", "nothing else stands in it"
    return dict(found)


class TestLines:
    def test_every_field_is_there_in_its_order(self) -> None:
        made = call(
            key_name="alice",
            model="llama",
            status=200,
            queue_secs=1.23456,
            switch_secs=0.5,
            first_byte=2.0,
            total=3.00049,
            bytes_in=10,
        )
        made.sent(json.dumps(CHAT).encode())
        assert made.line() == (
            "id=id-1 key=alice model=llama method=POST path=/v1/chat/completions status=200 queue=1.235 switch=0.500 "
            f"first_byte=2.000 total=3.000 in=10 out={len(json.dumps(CHAT))} prompt_tokens=12 completion_tokens=7"
        )

    def test_what_there_is_not_is_a_dash(self) -> None:
        assert Call("id").line() == (
            "id=id key=- model=- method=- path=- status=499 queue=0.000 switch=0.000 first_byte=- total=0.000 in=0 out=0 "
            "prompt_tokens=- completion_tokens=-"
        )

    @pytest.mark.parametrize(
        "name", ["a", "org/name-1.2:3", "a b", 'a"b', 'a " b', "a\\ b", "a=b", "\u00e9 \u00e9", " ", "-"]
    )
    def test_a_name_is_one_word(self, name: str) -> None:
        fields = fields_of(call(model=name, key_name=name).line())
        assert len(fields) == 14
        for value in (fields["model"], fields["key"]):
            assert (json.loads(value) if value.startswith('"') else value) == name

    @settings(derandomize=True, database=None, deadline=None)
    @given(st.text(min_size=1).filter(str.isprintable))
    def test_any_name_that_a_model_may_have(self, name: str) -> None:
        value = fields_of(call(model=name).line())["model"]
        assert (json.loads(value) if value.startswith('"') else value) == name

    def test_the_journal_has_each_of_them_under_a_name(self) -> None:
        made = call(key_name="alice", model="a b", status=200, queue_secs=1.0, first_byte=2.0, bytes_in=10)
        made.sent(json.dumps(CHAT).encode())
        fields = made.journal_fields()
        assert fields == {
            "REQUEST_ID": "id-1", "KEY_NAME": "alice", "MODEL": "a b", "METHOD": "POST", "URL_PATH": "/v1/chat/completions", "STATUS": "200",
            "QUEUE_SECS": "1.000", "SWITCH_SECS": "0.000", "FIRST_BYTE_SECS": "2.000", "TOTAL_SECS": "0.000", "BYTES_IN": "10",
            "BYTES_OUT": str(len(json.dumps(CHAT))), "PROMPT_TOKENS": "12", "COMPLETION_TOKENS": "7",
        }  # fmt: skip
        assert all(re.fullmatch(r"[A-Z][A-Z_]*", name) for name in fields), "what the journal takes"

    def test_the_journal_has_only_what_says_something(self) -> None:
        fields = Call("id").journal_fields()
        assert set(fields) == {
            "REQUEST_ID",
            "STATUS",
            "QUEUE_SECS",
            "SWITCH_SECS",
            "TOTAL_SECS",
            "BYTES_IN",
            "BYTES_OUT",
        }


class TestCalls:
    def test_durations_count_from_the_head(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 100.0
        monkeypatch.setattr(access, "time", SimpleNamespace(monotonic=lambda: now))
        made = Call("id", "POST", "/v1/x")
        now = 101.5
        made.waits()
        now = 102.25
        made.begins()
        now = 104.0
        made.end()
        assert (made.queue_secs, made.first_byte, made.total) == (1.5, 2.25, 4.0)

    def test_every_answer_has_its_id_and_its_timing(self) -> None:
        made = call(queue_secs=0.5, switch_secs=1.0)
        assert made.fields() == b"x-request-id: id-1\r\nServer-Timing: queue;dur=500.0, switch;dur=1000.0\r\n"
        made.added = b"Vary: Origin\r\n"
        assert made.fields().endswith(b"\r\nVary: Origin\r\n")

    @pytest.mark.parametrize("size", [1, 7, 100, 5000])
    def test_usage_is_found_however_the_answer_came(self, size: int) -> None:
        # Of streams, the last events come by themselves or together; what is not kept is the text before.
        ending = chunked(event({"choices": [], "usage": CHAT["usage"]}), b"data: [DONE]\n\n")
        made = call()
        text = event({"choices": [{"delta": {"content": "x" * size}}]})
        for _ in range(50):
            made.sent(text)
        made.sent(ending[:-5])
        made.sent(ending[-5:])
        assert "prompt_tokens=12 completion_tokens=7" in made.line()
        assert made.bytes_out == 50 * len(text) + len(ending)

    def test_what_is_kept_of_an_answer_is_little(self) -> None:
        made = call()
        for _ in range(100):
            made.sent(b"x" * 60_000)
        assert sum(map(len, made._kept)) <= 4 * 4096
        made.sent(json.dumps({**CHAT, "prompt_logprobs": ["x" * 60_000]}).encode())
        assert made.line().endswith("prompt_tokens=- completion_tokens=-"), "it is too far from the end"


class Written:
    """A log that notes what it is given."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, calls: Sequence[Call]) -> None:
        self.batches.append([call.id for call in calls])


class TestLog:
    def test_it_is_written_a_moment_later_at_once_and_in_order(self) -> None:
        async def run(clock: Clock) -> None:
            written = Written()
            log = AccessLog(clock, written)
            for number in range(3):
                log.add(Call(str(number)))
                await clock.move(FLUSH_SECS / 10)
            assert written.batches == []
            await clock.move(FLUSH_SECS)
            assert written.batches == [["0", "1", "2"]]
            assert clock.timers == 0
            await clock.move(100)
            assert len(written.batches) == 1, "nothing to write"
            log.add(Call("3"))
            await clock.move(FLUSH_SECS)
            assert written.batches[1:] == [["3"]]

        on_clock(run)

    def test_many_do_not_wait(self) -> None:
        async def run(clock: Clock) -> None:
            written = Written()
            log = AccessLog(clock, written)
            for number in range(1100):
                log.add(Call(str(number)))
            assert [len(batch) for batch in written.batches] == [500, 500]
            assert clock.timers == 1
            await clock.move(FLUSH_SECS)
            assert [one for batch in written.batches for one in batch] == [str(number) for number in range(1100)]

        on_clock(run)

    def test_what_there_is_can_be_written_now(self) -> None:
        async def run(clock: Clock) -> None:
            written = Written()
            log = AccessLog(clock, written)
            log.flush()
            log.add(Call("a"))
            log.flush()
            log.flush()
            await clock.move(100)
            assert (written.batches, clock.timers) == ([["a"]], 0)

        on_clock(run)

    def test_a_program_with_pythons_logging_gets_a_line_each(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "llmuxd.access"):
            log_each([call(model="%s %d"), Call("id-2")])
        assert [record.getMessage().split()[0] for record in caplog.records] == ["id=id-1", "id=id-2"]
        assert {record.name for record in caplog.records} == {"llmuxd.access"}
        assert 'model="%s %d"' in caplog.text
