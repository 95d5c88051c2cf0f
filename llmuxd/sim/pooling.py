"""The APIs that answer with figures: embeddings, scores, ranks, classes, and the tokenizer's.

The figures depend on the model and the input alone. A token is a byte.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from typing import Any

from aiohttp import web

from llmuxd.sim import answers
from llmuxd.sim import asked as ask
from llmuxd.sim.answers import Refused
from llmuxd.sim.wire import Context, gone, json_body, reply

DIMENSIONS = 8
MAX_MODEL_LEN = 4096


async def _prepare(context: Context, request: web.BaseRequest, prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The body, and the head of the answer, once the engine has done its one step."""
    body = await json_body(request)
    ask.check(request.path, body)
    model = ask.model_of(body.get("model"), context.engine.options)
    prompt = ask.prompt_of(request.path, body)
    async for _ in context.engine.generate(prompt, 1, gone(request)):
        continue
    asked = ask.read("", body, request.headers.get("X-Request-Id"), context.engine.options)
    head = {"id": f"{prefix}-{asked.base_id}", "object": "list", "created": asked.created, "model": model}
    return body, {**head, "usage": answers.usage(answers.length_of(prompt), 0)}


def _items(found: Any) -> list[Any]:
    """The inputs, one or several; a list of numbers is one, made of tokens."""
    if isinstance(found, list) and found and not isinstance(found[0], int):
        return found
    return [found]


def _numbers(context: Context, item: Any, count: int) -> list[float]:
    """Numbers below 1 in amount."""
    seed = f"{context.engine.options.model}\0{json.dumps(item, sort_keys=True)}".encode()
    found = b"".join(hashlib.sha256(seed + b"\0%d" % at).digest() for at in range(count // 32 + 1))
    return [(byte - 127.5) / 127.5 for byte in found[:count]]


def _share(context: Context, item: Any) -> float:
    """A number from 0 to 1."""
    return (_numbers(context, item, 1)[0] + 1) / 2


def _encoded(numbers: list[float], form: Any) -> Any:
    if form == "base64":
        return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
    return numbers


async def embed(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /v1/embeddings."""
    body, head = await _prepare(context, request, "embd")
    size = body.get("dimensions") or DIMENSIONS
    vectors = [_numbers(context, item, size) for item in _items(body.get("input", body.get("messages")))]
    form = body.get("encoding_format")
    data = [{"index": i, "object": "embedding", "embedding": _encoded(v, form)} for i, v in enumerate(vectors)]
    return reply({**head, "data": data})


async def embed_v2(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /v2/embed, Cohere's form."""
    body, head = await _prepare(context, request, "embd")
    texts = body.get("texts") or []
    vectors = [_numbers(context, text, DIMENSIONS) for text in texts]
    kinds = body.get("embedding_types") or ["float"]
    found = {kind: [_encoded(vector, kind) for vector in vectors] for kind in kinds if kind in ("float", "base64")}
    units = {"input_tokens": head["usage"]["prompt_tokens"], "image_tokens": 0}
    meta = {"api_version": {"version": "2"}, "billed_units": units}
    said = {"id": head["id"], "embeddings": found, "texts": texts, "meta": meta}
    return reply({**said, "response_type": "embeddings_by_type"})


async def pool(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /pooling."""
    body, head = await _prepare(context, request, "pooling")
    form = body.get("encoding_format")
    items = _items(body.get("input", body.get("messages")))
    vectors = [_encoded(_numbers(context, item, DIMENSIONS), form) for item in items]
    return reply({**head, "data": [{"index": i, "object": "pooling", "data": v} for i, v in enumerate(vectors)]})


async def classify(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /classify."""
    body, head = await _prepare(context, request, "classify")
    shares = [_share(context, item) for item in _items(body.get("input", body.get("messages")))]
    data = [
        {"index": i, "label": f"LABEL_{int(share < 0.5)}", "probs": [share, 1 - share], "num_classes": 2}
        for i, share in enumerate(shares)
    ]
    return reply({**head, "data": data})


async def score(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /score, in all its ways to name the pairs."""
    body, head = await _prepare(context, request, "score")
    firsts = _items(next((body[name] for name in ("text_1", "data_1", "queries") if name in body), ""))
    seconds = _items(next((body[name] for name in ("text_2", "data_2", "documents", "items") if name in body), ""))
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        raise Refused("Input lengths must be either 1:1, 1:N or N:N")
    shares = [_share(context, pair) for pair in zip(firsts, seconds, strict=True)]
    return reply({**head, "data": [{"index": i, "object": "score", "score": share} for i, share in enumerate(shares)]})


async def rerank(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /rerank: the best one first."""
    body, head = await _prepare(context, request, "score")
    results: list[dict[str, Any]] = [
        {
            "index": index,
            "document": {"text": document, "multi_modal": None}
            if isinstance(document, str)
            else {"text": None, "multi_modal": document.get("content")},
            "relevance_score": _share(context, [body["query"], document]),
        }
        for index, document in enumerate(body["documents"])
    ]
    results.sort(key=lambda result: result["relevance_score"], reverse=True)
    best = results[: body.get("top_n") or len(results)]
    counts = {name: head["usage"][name] for name in ("prompt_tokens", "total_tokens")}
    return reply({"id": head["id"], "model": head["model"], "usage": counts, "results": best})


async def score_items(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /generative_scoring."""
    body, head = await _prepare(context, request, "generative-scoring")
    shares = [_share(context, [body["query"], item]) for item in body["items"]]
    return reply({**head, "data": [{"index": i, "object": "score", "score": share} for i, share in enumerate(shares)]})


async def decide(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /v1/systemone."""
    body, head = await _prepare(context, request, "decision")
    found = {name: {"score": _share(context, [body["state"], name])} for name in body["questions"]}
    counts = {"input_tokens": head["usage"]["prompt_tokens"], "output_tokens": len(found)}
    said = {"id": head["id"], "object": "structured_decision", "created": head["created"], "model": head["model"]}
    return reply({**said, "answers": found, "usage": counts, "diagnostics": {}})


async def tokenize(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /tokenize. It needs no engine."""
    body = await json_body(request)
    ask.model_of(body.get("model"), context.engine.options)
    text = body["prompt"] if isinstance(body.get("prompt"), str) else ask.prompt_of(request.path, body)
    tokens = list(text.encode())
    strings = [chr(token) for token in tokens] if body.get("return_token_strs") else None
    return reply(
        {"count": len(tokens), "max_model_len": MAX_MODEL_LEN, "tokens": tokens, "token_strs": strings},
    )


async def detokenize(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /detokenize."""
    body = await json_body(request)
    ask.check(request.path, body)
    ask.model_of(body.get("model"), context.engine.options)
    return reply({"prompt": bytes(body["tokens"]).decode(errors="replace")})
