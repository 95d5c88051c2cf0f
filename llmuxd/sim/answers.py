"""What the simulated API answers: prompts read from requests, answers in the form of each API. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

DEFAULT_TOKENS = 16

DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def error(message: str, status: int, kind: str = "BadRequestError") -> dict[str, Any]:
    """vLLM's error object."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def prompt_of(path: str, body: dict[str, Any]) -> str:
    """All that an answer depends on."""
    for key in ("messages", "prompt", "input", "query", "text_1"):
        if key in body:
            return json.dumps(body[key], sort_keys=True)
    return path


def tokens_of(body: dict[str, Any]) -> int:
    """How many tokens are asked for."""
    for key in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        if isinstance(body.get(key), int):
            return int(body[key])
    return DEFAULT_TOKENS


def usage(prompt: str, count: int) -> dict[str, int]:
    before = len(prompt.split())
    return {"prompt_tokens": before, "completion_tokens": count, "total_tokens": before + count}


def whole(path: str, model: str, prompt: str, tokens: Sequence[str], finish: str) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    text = "".join(tokens)
    counts = usage(prompt, len(tokens))
    base = {"id": "sim-1", "created": 1700000000, "model": model}
    if path == "/v1/chat/completions":
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return {**base, "object": "chat.completion", "choices": [choice], "usage": counts}
    if path == "/v1/messages":
        return {
            "id": "sim-1",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [{"type": "text", "text": text}],
            "stop_reason": "max_tokens" if finish == "length" else finish,
            "stop_sequence": None,
            "usage": {"input_tokens": counts["prompt_tokens"], "output_tokens": counts["completion_tokens"]},
        }
    if path == "/v1/responses":
        content = [{"type": "output_text", "text": text, "annotations": []}]
        item = {"id": "m-1", "type": "message", "role": "assistant", "status": "completed", "content": content}
        return {"id": "sim-1", "object": "response", "model": model, "status": "completed", "output": [item]}
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
    return {**base, "object": "text_completion", "choices": [choice], "usage": counts}


def piece(path: str, model: str, token: str | None, finish: str | None) -> dict[str, Any]:
    """One event of a stream of completions; `token` is None in the last one."""
    base = {"id": "sim-1", "created": 1700000000, "model": model}
    if path == "/v1/chat/completions":
        delta = {} if token is None else {"role": "assistant", "content": token}
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {**base, "object": "chat.completion.chunk", "choices": [choice]}
    choice = {"index": 0, "text": token or "", "finish_reason": finish}
    return {**base, "object": "text_completion", "choices": [choice]}


def pooled(path: str, model: str, body: dict[str, Any]) -> dict[str, Any]:
    """Embeddings, scores, classes: figures that depend on the input's length alone."""
    found = body.get("input", body.get("documents", body.get("text_2", "")))
    items = found if isinstance(found, list) else [found]
    sizes = [len(json.dumps(item)) / 100 for item in items]
    answer: dict[str, Any] = {"id": "sim-1", "object": "list", "model": model, "usage": usage("", 0)}
    if path.endswith("rerank"):
        answer["results"] = [{"index": i, "relevance_score": size} for i, size in enumerate(sizes)]
    elif path.endswith("score"):
        answer["data"] = [{"index": i, "object": "score", "score": size} for i, size in enumerate(sizes)]
    elif path.endswith("classify"):
        answer["data"] = [{"index": i, "label": "sim", "probs": [size]} for i, size in enumerate(sizes)]
    else:
        answer["data"] = [
            {"index": i, "object": "embedding", "embedding": [size, 0.0, 1.0]} for i, size in enumerate(sizes)
        ]
    return answer
