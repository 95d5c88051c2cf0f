"""The HTTP of a simulated engine: vLLM's paths, its parameters, its errors.

As vLLM does, the development endpoints read their parameters from the query alone, and are there only with
VLLM_SERVER_DEV_MODE=1.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from llmuxd.sim import answers
from llmuxd.sim.engine import Aborted, Engine, EngineDead, NotPossible
from llmuxd.sim.ledger import OutOfMemory

VERSION = "0.32.0"

MODES = ("abort", "wait", "keep")

GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
POOLING = ("/v1/embeddings", "/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank", "/classify")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build(engine: Engine) -> web.Application:
    """The application of one engine."""
    api = _Api(engine)
    app = web.Application(middlewares=[api.guard], client_max_size=2**30)
    table: list[tuple[str, str, Handler]] = [
        ("GET", "/health", api.health),
        ("GET", "/ping", api.health),
        ("GET", "/version", api.version),
        ("GET", "/openapi.json", api.openapi),
        ("GET", "/v1/models", api.models),
        ("GET", "/metrics", api.metrics),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/detokenize", api.detokenize),
        ("POST", "/v1/audio/transcriptions", api.transcribe),
        ("POST", "/v1/audio/translations", api.transcribe),
    ]
    table += [("POST", path, api.generate) for path in GENERATING]
    table += [("POST", path, api.pool) for path in POOLING]
    if engine.options.development:
        table += [
            ("POST", "/sleep", api.sleep),
            ("POST", "/wake_up", api.wake_up),
            ("GET", "/is_sleeping", api.is_sleeping),
            ("POST", "/pause", api.pause),
            ("POST", "/resume", api.resume),
            ("GET", "/is_paused", api.is_paused),
            ("POST", "/collective_rpc", api.collective_rpc),
            ("POST", "/reset_prefix_cache", api.reset_prefix_cache),
            ("POST", "/release_kv_cache_memory", api.release_kv_cache),
        ]
    for method, path, handler in table:
        app.router.add_route(method, path, handler)
    return app


class _Api:
    """One method per path."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._names = engine.options.names

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._engine.dead and request.path != "/health":
            return _dead()
        try:
            return await handler(request)
        except EngineDead:
            return _dead()
        except NotPossible as error:
            return _error(str(error), 500, "InternalServerError")
        except web.HTTPException as error:
            return _error(error.reason, error.status, error.reason)
        except OutOfMemory as error:
            return _error(f"CUDA Error: out of memory ({error})", 500, "InternalServerError")

    # Seeing

    async def health(self, _request: web.Request) -> web.StreamResponse:
        if self._engine.faults.happens("hang_health"):
            await asyncio.Event().wait()
        return web.Response(status=503 if self._engine.dead else 200)

    async def version(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"version": VERSION})

    async def openapi(self, request: web.Request) -> web.StreamResponse:
        paths: dict[str, dict[str, Any]] = {}
        for route in request.app.router.routes():
            if route.resource is not None and route.method != "HEAD":
                paths.setdefault(route.resource.canonical, {})[route.method.lower()] = {}
        return web.json_response({"openapi": "3.1.0", "paths": paths})

    async def models(self, _request: web.Request) -> web.StreamResponse:
        root = self._engine.options.model
        data = [{"id": n, "object": "model", "owned_by": "vllm", "root": root} for n in self._names]
        return web.json_response({"object": "list", "data": data})

    async def metrics(self, _request: web.Request) -> web.StreamResponse:
        engine = self._engine
        running = sum(g.scheduled for g in engine.running)
        state = {None: "awake", 0: "", 1: "weights_offloaded", 2: "discard_all"}[engine.level]
        lines = [
            f"vllm:num_requests_running {running}",
            f"vllm:num_requests_waiting {len(engine.running) - running}",
            f"vllm:kv_cache_usage_perc {min(1.0, running / 100)}",
            f"vllm:iteration_tokens_total_count {engine.tokens_total}",
            f"vllm:request_aborted_total {engine.aborted_total}",
        ]
        lines += [
            f'vllm:engine_sleep_state{{sleep_state="{name}"}} {int(name == state)}'
            for name in ("awake", "weights_offloaded", "discard_all")
        ]
        return web.Response(text="\n".join(lines) + "\n")

    # Serving

    async def _json(self, request: web.Request) -> dict[str, Any] | web.Response:
        """The body, or the answer to a request that cannot be served."""
        try:
            body = await request.json()
        except ValueError as error:
            return _error(f"invalid JSON: {error}", 400)
        if not isinstance(body, dict):
            return _error("the body has to be an object", 400)
        model = body.get("model", self._names[0])
        if model not in self._names:
            return _error(f"The model `{model}` does not exist.", 404, "NotFoundError")
        return body

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await self._json(request)
        if isinstance(body, web.Response):
            return body
        if self._engine.faults.happens("garbage_answer"):
            assert request.transport is not None
            request.transport.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
            request.transport.close()
            return web.Response()
        prompt = answers.prompt_of(request.path, body)
        if body.get("stream"):
            return await self._stream(request, body, prompt)
        tokens: list[str] = []
        finish = "length"
        try:
            async for token in self._tokens(request, body, prompt):
                tokens.append(token)
        except Aborted:
            finish = "abort"
        model = body.get("model", self._names[0])
        return web.json_response(answers.whole(request.path, model, prompt, tokens, finish))

    def _tokens(self, request: web.Request, body: dict[str, Any], prompt: str) -> Any:
        def gone() -> bool:
            return request.transport is None or request.transport.is_closing()

        return self._engine.generate(prompt, answers.tokens_of(body), gone)

    async def _stream(self, request: web.Request, body: dict[str, Any], prompt: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        model = body.get("model", self._names[0])
        count, finish = 0, "length"

        async def send(event: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        await response.prepare(request)
        try:
            async for token in self._tokens(request, body, prompt):
                count += 1
                await send(answers.piece(request.path, model, token, None))
        except Aborted:
            finish = "abort"
        except ConnectionError:
            return response
        except EngineDead:
            assert request.transport is not None
            request.transport.close()
            return response
        await send(answers.piece(request.path, model, None, finish))
        if (body.get("stream_options") or {}).get("include_usage"):
            last = answers.piece(request.path, model, None, None)
            await send({**last, "choices": [], "usage": answers.usage(prompt, count)})
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def pool(self, request: web.Request) -> web.StreamResponse:
        body = await self._json(request)
        if isinstance(body, web.Response):
            return body
        prompt = answers.prompt_of(request.path, body)
        async for _ in self._tokens(request, {"max_tokens": 1}, prompt):
            continue
        return web.json_response(answers.pooled(request.path, body.get("model", self._names[0]), body))

    async def transcribe(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        model = form.get("model", self._names[0])
        if model not in self._names:
            return _error(f"The model {model!r} does not exist.", 404, "NotFoundError")
        upload = form.get("file")
        if not isinstance(upload, web.FileField):
            return _error("no file", 400)
        content = upload.file.read()
        prompt = str(len(content))
        text = "".join([token async for token in self._tokens(request, {"max_tokens": 4}, prompt)])
        return web.json_response({"text": text, "bytes": len(content)})

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        body = await self._json(request)
        if isinstance(body, web.Response):
            return body
        text = body["prompt"] if isinstance(body.get("prompt"), str) else answers.prompt_of(request.path, body)
        tokens = list(text.encode())
        return web.json_response({"count": len(tokens), "max_model_len": 4096, "tokens": tokens})

    async def detokenize(self, request: web.Request) -> web.StreamResponse:
        body = await self._json(request)
        if isinstance(body, web.Response):
            return body
        return web.json_response({"prompt": bytes(body.get("tokens", [])).decode(errors="replace")})

    # Development endpoints

    async def sleep(self, request: web.Request) -> web.StreamResponse:
        engine = self._engine
        text, mode = request.query.get("level", "1"), request.query.get("mode", "abort")
        if mode not in MODES or text not in ("0", "1", "2"):
            return _error(f"level {text!r}, mode {mode!r}: unknown", 400, "Bad Request")
        level = int(text)
        if engine.faults.happens("refuse_sleep"):
            engine.paused = True
            return _error("AssertionError: Memory usage increased after sleeping.", 500, "InternalServerError")
        if engine.faults.happens("die_in_sleep"):
            engine.die()
            raise EngineDead
        if engine.faults.happens("hang_sleep"):
            await asyncio.Event().wait()
        if engine.faults.happens("lie_sleep"):
            return web.json_response({"status": "sleeping"})
        await engine.sleep(level, mode)
        return web.json_response({"status": "sleeping"})

    async def wake_up(self, request: web.Request) -> web.StreamResponse:
        engine = self._engine
        if engine.faults.happens("fail_wake"):
            return _error("RuntimeError: wake up failed", 500, "InternalServerError")
        if engine.faults.happens("oom_wake"):
            return _error("CUDA Error: out of memory", 500, "InternalServerError")
        if engine.faults.happens("die_in_wake"):
            engine.die()
            raise EngineDead
        if engine.faults.happens("hang_wake"):
            await asyncio.Event().wait()
        await engine.wake(set(request.query.getall("tags", [])))
        return web.json_response({"status": "sleeping" if engine.asleep else "awake"})

    async def is_sleeping(self, _request: web.Request) -> web.StreamResponse:
        async with self._engine.busy:
            return web.json_response({"is_sleeping": self._engine.is_sleeping})

    async def pause(self, request: web.Request) -> web.StreamResponse:
        mode = request.query.get("mode", "abort")
        if mode not in MODES:
            return _error(f"mode {mode!r}: unknown", 400, "Bad Request")
        await self._engine.pause(mode)
        return web.json_response({"status": "paused"})

    async def resume(self, _request: web.Request) -> web.StreamResponse:
        self._engine.resume()
        return web.json_response({"status": "resumed"})

    async def is_paused(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"is_paused": self._engine.is_paused})

    async def collective_rpc(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
        except ValueError as error:
            return _error(f"JSON decode error: {error}", 400, "Bad Request")
        if not isinstance(body, dict) or "method" not in body:
            return _error("Missing 'method' in request body", 400, "Bad Request")
        if body["method"] == "reload_weights":
            await self._engine.reload_weights()
        return web.json_response({"results": [None]})

    async def reset_prefix_cache(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"success": not self._engine.running})

    async def release_kv_cache(self, _request: web.Request) -> web.StreamResponse:
        self._engine.release_kv_cache()
        return web.json_response({"status": "kv_cache_released"})


def _dead() -> web.Response:
    return _error(answers.DEAD, 500, "InternalServerError")


def _error(message: str, status: int, kind: str = "BadRequestError") -> web.Response:
    return web.json_response(answers.error(message, status, kind), status=status)
