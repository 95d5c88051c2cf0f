"""The responses API: its objects and events, and the responses that an engine keeps.

Kept are those of `"store": true` where VLLM_ENABLE_RESPONSES_API_STORE is set; only then may one run in the
background. vLLM cannot delete one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from typing import Any

from llmuxd.sim.answers import Refused, event, new_id
from llmuxd.sim.asked import Asked
from llmuxd.sim.forms import Form, Texts

_ECHOED = (
    "ec_transfer_params",
    "input_messages",
    "instructions",
    "kv_transfer_params",
    "max_tool_calls",
    "metadata",
    "output_messages",
    "previous_response_id",
    "prompt",
    "reasoning",
    "text",
    "top_logprobs",
    "user",
)


class Responses(Form):
    """One answer of the responses API."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self.id = f"resp_{new_id()}"
        self._item_id = f"{'fc' if asked.tool else 'msg'}_{new_id()}"
        self._said: list[str] = []
        self._events = 0
        self._finish = ""
        self.ended: dict[str, Any] = {}
        """The whole response, when its stream has ended."""

    # Whole

    def response(self, status: str, output: list[Any] | None = None, tokens: int | None = None) -> dict[str, Any]:
        """The response object; with usage if the number of tokens is given."""
        body = self.asked.body
        return {
            "id": self.id,
            "created_at": self.asked.created,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **{name: body.get(name) for name in _ECHOED},
            "model": self.asked.model,
            "object": "response",
            "output": output or [],
            "parallel_tool_calls": bool(body.get("parallel_tool_calls", True)),
            "temperature": body.get("temperature", 1.0),
            "tool_choice": body.get("tool_choice", "auto" if body.get("tools") else "none"),
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p", 1.0),
            "presence_penalty": body.get("presence_penalty", 0.0),
            "frequency_penalty": body.get("frequency_penalty", 0.0),
            "background": bool(body.get("background")),
            "max_output_tokens": self.asked.count,
            "service_tier": "auto",
            "status": status,
            "truncation": body.get("truncation", "disabled"),
            "usage": None if tokens is None else self._usage(tokens),
        }

    def _usage(self, tokens: int) -> dict[str, Any]:
        before = self.asked.before
        return {
            "input_tokens": before,
            "input_tokens_details": {
                "cache_write_tokens": 0,
                "cached_tokens": 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": tokens,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": before + tokens,
        }

    def whole(self, texts: Texts, finish: str) -> dict[str, Any]:
        (tokens,) = texts
        status = "incomplete" if finish == "length" else "completed"
        return self.response(status, [self._item("".join(tokens), "completed")], len(tokens))

    def _item(self, text: str | None, status: str) -> dict[str, Any]:
        """The one thing that is put out: a message, or the call of a function. Without text it has just begun."""
        head = {"id": self._item_id, "status": status}
        if tool := self.asked.tool:
            call = {"type": "function_call", "call_id": tool.id, "name": tool.name, "arguments": text or ""}
            return {**head, **call}
        content = [] if text is None else [self._part(text)]
        return {**head, "type": "message", "role": "assistant", "content": content, "phase": None}

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}

    # Streamed

    def _event(self, kind: str, **more: Any) -> bytes:
        self._events += 1
        return event({"type": kind, "sequence_number": self._events - 1, **more}, kind)

    def _of_item(self, kind: str, **more: Any) -> bytes:
        return self._event(kind, output_index=0, item_id=self._item_id, **more)

    def opening(self) -> bytes:
        begun = self.response("in_progress")
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def _token(self, index: int, text: str) -> bytes:
        head = b""
        if not self._said:
            head = self._event("response.output_item.added", output_index=0, item=self._item(None, "in_progress"))
            if not self.asked.tool:
                part = {**self._part(""), "logprobs": []}
                head += self._of_item("response.content_part.added", content_index=0, part=part)
        self._said.append(text)
        if self.asked.tool:
            return head + self._of_item("response.function_call_arguments.delta", delta=text)
        return head + self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=[])

    def close_choice(self, index: int, finish: str) -> bytes:
        self._finish = finish
        if not self._said:
            return b""
        text = "".join(self._said)
        if tool := self.asked.tool:
            said = self._of_item("response.function_call_arguments.done", arguments=text, name=tool.name)
        else:
            said = self._of_item("response.output_text.done", content_index=0, text=text, logprobs=[])
            said += self._of_item("response.content_part.done", content_index=0, part=self._part(text))
        return said + self._event("response.output_item.done", output_index=0, item=self._item(text, "completed"))

    def closing(self) -> bytes:
        self.ended = self.whole([self._said], self._finish)
        return self._event("response.completed", response=self.ended)

    def death(self) -> bytes | None:
        return None


@dataclass
class Kept:
    """One response that is kept."""

    response: dict[str, Any]
    events: list[bytes] = field(default_factory=list)
    """If it streams in the background."""
    streamed: bool = False
    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Store:
    """The responses of one engine, until it ends."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    def get(self, response_id: str) -> Kept:
        """Raises Refused for one that is not kept."""
        if response_id not in self._kept:
            message = f"Response with id '{response_id}' not found."
            raise Refused(message, 404, "invalid_request_error", "response_id")
        return self._kept[response_id]

    def keep(self, response: dict[str, Any]) -> Kept:
        """Keep a response as it is now; one that was cancelled stays so."""
        kept = self._kept.setdefault(response["id"], Kept(response))
        if kept.response["status"] != "cancelled":
            kept.response = response
        return kept

    def run(self, kept: Kept, work: Coroutine[Any, Any, None]) -> None:
        """Let one run in the background."""
        kept.task = asyncio.get_running_loop().create_task(work)

    async def cancel(self, response_id: str) -> dict[str, Any]:
        """As POST .../cancel. Raises Refused."""
        kept = self.get(response_id)
        if kept.response["status"] not in ("queued", "in_progress"):
            message = "Cannot cancel a synchronous response."
            raise Refused(message, 400, "invalid_request_error", "response_id")
        kept.response = {**kept.response, "status": "cancelled"}
        if kept.task is not None:
            kept.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await kept.task
        return kept.response

    async def follow(self, kept: Kept, first: int) -> AsyncGenerator[bytes, None]:
        """The events of one that streams in the background, from a number on, until its last."""
        at = first
        while True:
            kept.changed.clear()
            while at < len(kept.events):
                yield kept.events[at]
                if kept.events[at].startswith(b"event: response.completed\n"):
                    return
                at += 1
            await kept.changed.wait()
