"""How each API says what was generated: whole, or as events. One form per answer; those of responses are elsewhere.

Pure: texts in, objects and bytes out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from llmuxd.sim import answers
from llmuxd.sim.answers import FINGERPRINT, event
from llmuxd.sim.asked import CHAT, GENERATE, MESSAGES, Asked

Texts = Sequence[Sequence[str]]
"""The tokens of each choice, or the pieces of a tool's arguments."""


class Form(ABC):
    """One answer in the form of one API."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.counts = [0] * len(asked.prompts)

    def opening(self) -> bytes:
        """What a stream says before there is a token."""
        return b""

    def token(self, index: int, text: str) -> bytes:
        """The events of one token of a choice."""
        self.counts[index] += 1
        return self._token(index, text)

    @abstractmethod
    def _token(self, index: int, text: str) -> bytes: ...

    @abstractmethod
    def close_choice(self, index: int, finish: str) -> bytes:
        """The events at the end of a choice."""

    @abstractmethod
    def closing(self) -> bytes:
        """The events at the end of all."""

    @abstractmethod
    def death(self) -> bytes | None:
        """How a stream says that EngineCore has died; None where vLLM breaks off without a word."""

    @abstractmethod
    def whole(self, texts: Texts, finish: str) -> dict[str, Any]:
        """The answer to a request that does not stream."""

    def usage(self) -> dict[str, Any]:
        return answers.usage(self.asked.before, sum(self.counts))


class _OpenAi(Form):
    """What chat completions and completions share."""

    prefix: str
    whole_object: str
    chunk_object: str
    nulls: tuple[str, ...]
    """What else a whole answer has, without a value."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._base = {"id": f"{self.prefix}-{asked.base_id}", "object": self.chunk_object, "created": asked.created}
        self._with_usage = asked.stream_option("include_usage")
        self._always_usage = self._with_usage and asked.stream_option("continuous_usage_stats")

    def _chunk(self, choice: dict[str, Any], last: bool = False, **more: Any) -> bytes:
        chunk = {**self._base, "model": self.asked.model, "choices": [choice], **more}
        if last and not self._with_usage:
            chunk["system_fingerprint"] = FINGERPRINT
        if self._always_usage:
            chunk["usage"] = {key: value for key, value in self.usage().items() if key != "prompt_tokens_details"}
        return event(chunk)

    def closing(self) -> bytes:
        if not self._with_usage:
            return answers.DONE
        counts = {key: value for key, value in self.usage().items() if value is not None}
        last = {**self._base, "model": self.asked.model, "choices": [], "usage": counts}
        return event({**last, "system_fingerprint": FINGERPRINT}) + answers.DONE

    def death(self) -> bytes | None:
        return answers.death()

    def whole(self, texts: Texts, finish: str) -> dict[str, Any]:
        return {
            **self._base,
            "object": self.whole_object,
            "model": self.asked.model,
            "choices": [self._choice(index, "".join(text), finish) for index, text in enumerate(texts)],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": answers.usage(self.asked.before, sum(map(len, texts))),
            **dict.fromkeys(self.nulls),
        }

    @abstractmethod
    def _choice(self, index: int, text: str, finish: str) -> dict[str, Any]: ...


class Completions(_OpenAi):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"
    nulls = ("kv_transfer_params", "ec_transfer_params", "metrics")

    def _token(self, index: int, text: str) -> bytes:
        return self._chunk(self._piece(index, text, None))

    def close_choice(self, index: int, finish: str) -> bytes:
        return self._chunk(self._piece(index, "", finish), last=True)

    @staticmethod
    def _piece(index: int, text: str, finish: str | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": finish,
            "stop_reason": None,
            "prompt_token_ids": None,
            "token_ids": None,
        }

    def _choice(self, index: int, text: str, finish: str) -> dict[str, Any]:
        return {**self._piece(index, text, finish), "prompt_logprobs": None, "routed_experts": None}


class Chat(_OpenAi):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    nulls = (
        "prompt_logprobs",
        "prompt_token_ids",
        "prompt_text",
        "kv_transfer_params",
        "ec_transfer_params",
        "metrics",
    )

    def _token(self, index: int, text: str) -> bytes:
        tool = self.asked.tool
        head = b""
        if self.counts[index] == 1:
            delta = {"role": "assistant", "content": ""}
            first = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            head = self._chunk(first, prompt_token_ids=None, prompt_text=None)
            if tool:
                head += self._call(index, {"id": tool.id, "type": "function", "function": {"name": tool.name}})
        if tool:
            return head + self._call(index, {"function": {"arguments": text}})
        return head + self._chunk(self._piece(index, {"content": text}, None))

    def _call(self, index: int, call: dict[str, Any]) -> bytes:
        return self._chunk(self._piece(index, {"content": None, "tool_calls": [{"index": 0, **call}]}, None))

    @staticmethod
    def _piece(index: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish, "token_ids": None}

    def close_choice(self, index: int, finish: str) -> bytes:
        last = self._piece(index, {} if self.asked.tool else {"content": ""}, self._finish(finish))
        return self._chunk({**last, "stop_reason": None}, last=True)

    def _finish(self, finish: str) -> str:
        called = self.asked.tool is not None and not self.asked.tool.named
        return "tool_calls" if called and finish == "stop" else finish

    def _choice(self, index: int, text: str, finish: str) -> dict[str, Any]:
        nulls = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
        message: dict[str, Any] = {"role": "assistant", "content": text, **nulls}
        if tool := self.asked.tool:
            function = {"name": tool.name, "arguments": text}
            message |= {"content": "", "tool_calls": [{"id": tool.id, "type": "function", "function": function}]}
        choice = {"index": index, "message": message, "logprobs": None, "finish_reason": self._finish(finish)}
        return {**choice, "stop_reason": None, "token_ids": None, "routed_experts": None}


class Messages(Form):
    """Anthropic's API, which vLLM translates from the chat completions."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._finish = ""

    def _head(self) -> dict[str, Any]:
        head = {"id": f"chatcmpl-{self.asked.base_id}", "type": "message", "role": "assistant", "content": []}
        return {**head, "model": self.asked.model, "stop_reason": None, "stop_sequence": None}

    def _start(self) -> bytes:
        counts = {"input_tokens": self.asked.before, "output_tokens": 0}
        return event({"type": "message_start", "message": {**self._head(), "usage": counts}}, "message_start")

    def _token(self, index: int, text: str) -> bytes:
        tool = self.asked.tool
        head = b""
        if self.counts[0] == 1:
            head = self._start()
            block: dict[str, Any] = {"type": "text", "text": ""}
            if tool:
                block = {"type": "tool_use", "id": tool.id, "name": tool.name, "input": {}}
            start = {"type": "content_block_start", "index": 0, "content_block": block}
            head += event(start, "content_block_start")
        delta = {"type": "input_json_delta", "partial_json": text} if tool else {"type": "text_delta", "text": text}
        return head + event({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")

    def close_choice(self, index: int, finish: str) -> bytes:
        self._finish = finish
        if not self.counts[0]:
            return self._start()
        return event({"type": "content_block_stop", "index": 0}, "content_block_stop")

    def closing(self) -> bytes:
        delta = {"stop_reason": self._stop_reason(self._finish), "stop_sequence": None}
        counts = {"input_tokens": self.asked.before, "output_tokens": self.counts[0]}
        said = event({"type": "message_delta", "delta": delta, "usage": counts}, "message_delta")
        return said + event({"type": "message_stop"}, "message_stop")

    def _stop_reason(self, finish: str) -> str | None:
        if finish == "stop":
            return "tool_use" if self.asked.tool else "end_turn"
        return "max_tokens" if finish == "length" else None

    def death(self) -> bytes | None:
        # vLLM takes the error event of the chat completions for a chunk of them, and says what that lacks.
        found = "input_value={'error': {'message': 'En...am': None, 'code': 500}}, input_type=dict"
        where = "For further information visit https://errors.pydantic.dev/2.14/v/missing"
        lacks = [f"{name}\n  Field required [type=missing, {found}]\n    {where}" for name in ("model", "choices")]
        message = "\n".join(["2 validation errors for ChatCompletionStreamResponse", *lacks])
        return event(answers.anthropic_error(message, "internal_error"), "error")

    def whole(self, texts: Texts, finish: str) -> dict[str, Any]:
        (tokens,) = texts
        text = "".join(tokens)
        block: dict[str, Any] = {"type": "text", "text": text}
        if tool := self.asked.tool:
            block = {"type": "tool_use", "id": tool.id, "name": tool.name, "input": tool.input}
        counts = {"input_tokens": self.asked.before, "output_tokens": len(tokens)}
        answer = {**self._head(), "content": [block], "stop_reason": self._stop_reason(finish), "usage": counts}
        # vLLM leaves out what is null here.
        return {key: value for key, value in answer.items() if value is not None}


class Tokens(Completions):
    """vLLM's own token-in-token-out API: the characters of the text serve as tokens."""

    prefix = "generate-tokens"

    def _chunk(self, choice: dict[str, Any], last: bool = False, **more: Any) -> bytes:
        return event({"request_id": self.asked.base_id, "choices": [choice], "usage": None})

    def _token(self, index: int, text: str) -> bytes:
        return self._chunk({"index": index, "token_ids": list(text.encode()), "finish_reason": None})

    def close_choice(self, index: int, finish: str) -> bytes:
        return self._chunk({"index": index, "token_ids": [], "finish_reason": finish})

    def closing(self) -> bytes:
        return answers.DONE

    def whole(self, texts: Texts, finish: str) -> dict[str, Any]:
        choices = [self._choice(index, "".join(text), finish) for index, text in enumerate(texts)]
        counts = answers.usage(self.asked.before, sum(map(len, texts)))
        head = {"request_id": self.asked.base_id, "model": self.asked.model, "created": self.asked.created}
        return {**head, "choices": choices, "usage": counts, "output_mode": "tokens"}

    def _choice(self, index: int, text: str, finish: str) -> dict[str, Any]:
        return {"index": index, "token_ids": list(text.encode()), "logprobs": None, "finish_reason": finish}


def form_of(asked: Asked) -> Form:
    """The form of an answer to it. Not of responses, which have a state: see `responses`."""
    kinds: dict[str, type[Form]] = {CHAT: Chat, MESSAGES: Messages, GENERATE: Tokens}
    if asked.path.startswith(CHAT):
        return Chat(asked)
    return kinds.get(asked.path, Completions)(asked)
