"""A request to generate, read from its body: what is asked, of which name, how many tokens, by which tool. Pure."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmuxd.sim.answers import Invalid, Refused, length_of, new_id
from llmuxd.sim.options import Options

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
BATCH = "/v1/chat/completions/batch"
GENERATE = "/inference/v1/generate"

DEFAULT_TOKENS = 16
_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")

ARGUMENT_CHARS = 8
"""A tool's arguments come in pieces of so many characters, each one a token."""

_NEEDED: Mapping[str, tuple[str, ...]] = {
    CHAT: ("messages",),
    BATCH: ("messages",),
    RESPONSES: ("input",),
    MESSAGES: ("model", "messages", "max_tokens"),
    "/v1/messages/count_tokens": ("model", "messages"),
    "/rerank": ("query", "documents"),
    "/v1/rerank": ("query", "documents"),
    "/v2/rerank": ("query", "documents"),
    "/detokenize": ("tokens",),
    "/generative_scoring": ("query", "items", "label_token_ids"),
    "/v1/systemone": ("state", "questions"),
}


@dataclass(frozen=True)
class ToolCall:
    """The function that the answer calls."""

    name: str
    arguments: str
    named: bool
    """The client has named this function, rather than let the model choose."""
    id: str = field(default_factory=lambda: f"chatcmpl-tool-{new_id()}")

    @property
    def input(self) -> Any:
        """The arguments, not as text."""
        return json.loads(self.arguments)


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    body: dict[str, Any]
    model: str
    """As the answer names it: a LoRA module by its own name, all else by the first served one."""
    base_id: str
    """What the ids of the answer are made of: the client's X-Request-Id if there is one."""
    prompts: tuple[str, ...]
    """One for each choice."""
    count: int
    """Tokens of each choice."""
    finish: str
    tool: ToolCall | None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    def stream_option(self, name: str) -> bool:
        return bool((self.body.get("stream_options") or {}).get(name))

    @property
    def before(self) -> int:
        """Tokens of all prompts, each counted once for all its choices."""
        return sum(length_of(prompt) for prompt in self.prompts if "\0" not in prompt)

    def pieces(self) -> list[str]:
        """Of the tool's arguments."""
        assert self.tool is not None
        text = self.tool.arguments
        return [text[at : at + ARGUMENT_CHARS] for at in range(0, len(text), ARGUMENT_CHARS)]


def model_of(name: Any, options: Options) -> str:
    """The name that an answer bears. Raises Refused for a model that is not served."""
    if not name or name in options.names:
        return options.names[0]
    if name in options.loras:
        return str(name)
    raise Refused(f"The model `{name}` does not exist.", 404, "NotFoundError", "model")


def check(path: str, body: Mapping[str, Any]) -> None:
    """Raises Invalid for a body without what this API needs."""
    for name in _NEEDED.get(path, ()):
        if name not in body:
            problem = {"type": "missing", "loc": f"body.{name}", "msg": "Field required"}
            raise Invalid(f"1 validation error:\n  {problem}", f"body.{name}")
    if path == COMPLETIONS and not body.get("prompt") and not body.get("prompt_embeds"):
        raise Invalid("1 validation error: either prompt or prompt_embeds must be given and not be empty.", "prompt")


def read(path: str, body: dict[str, Any], header_id: str | None, options: Options) -> Asked:
    """Read a request of that path. Raises Refused."""
    check(path, body)
    model = model_of(body.get("model"), options)
    limit = next((body[key] for key in _LIMITS if isinstance(body.get(key), int)), None)
    tool = _tool_of(path, body)
    # Where nothing bounds it, the model ends by itself.
    return Asked(
        path=path,
        body=body,
        model=model,
        base_id=header_id or new_id(),
        prompts=tuple(_prompts(path, body)),
        count=DEFAULT_TOKENS if limit is None else limit,
        finish="stop" if limit is None or tool else "length",
        tool=tool,
    )


def prompt_of(path: str, body: Mapping[str, Any]) -> str:
    """All that an answer depends on."""
    for key in ("messages", "prompt", "input", "query", "text_1", "token_ids", "state"):
        if key in body:
            return json.dumps(body[key], sort_keys=True)
    return path


def _prompts(path: str, body: Mapping[str, Any]) -> Iterator[str]:
    given = body.get("prompt") if path == COMPLETIONS else body["messages"] if path == BATCH else None
    several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    prompts = [json.dumps(each, sort_keys=True) for each in given] if several and given else [prompt_of(path, body)]
    choices = body.get("n")
    for prompt in prompts:
        yield prompt
        for index in range(1, choices if isinstance(choices, int) else 1):
            yield f"{prompt}\0{index}"


def _tool_of(path: str, body: Mapping[str, Any]) -> ToolCall | None:
    """The call that a model would plausibly make: none if it is not to, or has just been told a tool's result.

    Where vLLM needs --enable-auto-tool-choice and --tool-call-parser for it, this engine has them always.
    """
    tools = [tool for tool in map(_function, body.get("tools") or []) if tool]
    choice = body.get("tool_choice") or "auto"
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind == "none" or (kind == "required" and not tools):
        return None
    if isinstance(choice, dict) and kind in ("function", "tool"):
        wanted = choice.get("name") or (choice.get("function") or {}).get("name")
        tools = [tool for tool in tools if tool["name"] == wanted]
        if not tools:
            raise Invalid("1 validation error: the tool of 'tool_choice' is not in 'tools'", "tool_choice")
        return _call(tools[0], named=True)
    if not tools or (kind == "auto" and _has_result(path, body)):
        return None
    return _call(tools[0], named=False)


def _function(tool: Any) -> dict[str, Any] | None:
    """Name and schema, of a tool in whichever API's form."""
    if not isinstance(tool, dict):
        return None
    inner = tool.get("function") if isinstance(tool.get("function"), dict) else tool
    assert isinstance(inner, dict)
    if not isinstance(inner.get("name"), str):
        return None
    return {"name": inner["name"], "schema": inner.get("parameters") or inner.get("input_schema") or {}}


def _call(tool: dict[str, Any], named: bool) -> ToolCall:
    return ToolCall(tool["name"], json.dumps(example({"type": "object", **tool["schema"]})), named)


def _has_result(path: str, body: Mapping[str, Any]) -> bool:
    """Whether the last thing said is what a tool has answered."""
    said = body.get("input") if path == RESPONSES else body.get("messages")
    last = said[-1] if isinstance(said, list) and said else None
    if not isinstance(last, dict):
        return False
    content = last.get("content")
    blocks = content if isinstance(content, list) else []
    told = any(isinstance(block, dict) and block.get("type") == "tool_result" for block in blocks)
    return told or last.get("role") == "tool" or last.get("type") == "function_call_output"


def example(schema: Mapping[str, Any]) -> Any:
    """A value that a JSON schema allows."""
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "object":
        return {name: example(inner) for name, inner in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [example(schema["items"])] if isinstance(schema.get("items"), dict) else []
    return {"integer": 1, "number": 1.5, "boolean": True, "null": None}.get(str(kind), "amber")
