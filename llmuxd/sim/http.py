"""The API server of a simulated engine: which path is answered by what, as vLLM has them; its errors, its metrics.

Paths are found as uvicorn and Starlette find them, with all that these forgive: escapes are decoded, of an absolute
URI only the path counts. So what a proxy lets through in a disguise arrives here, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from llmuxd.sim import answers, development, generating, pooling, speech, wire
from llmuxd.sim import asked as ask
from llmuxd.sim.answers import Invalid, Refused, new_id
from llmuxd.sim.development import Handler
from llmuxd.sim.engine import Engine, EngineDead, NotPossible
from llmuxd.sim.ledger import OutOfMemory
from llmuxd.sim.wire import Context, reply

ANTHROPIC = (ask.MESSAGES, "/v1/messages/count_tokens")

SERVING: Mapping[str, Handler] = {
    ask.CHAT: generating.generate,
    ask.BATCH: generating.generate,
    ask.COMPLETIONS: generating.generate,
    ask.MESSAGES: generating.generate,
    ask.RESPONSES: generating.create_response,
    ask.GENERATE: generating.generate_tokens,
    "/v1/messages/count_tokens": generating.count_tokens,
    "/invocations": generating.invoke,
    "/v1/embeddings": pooling.embed,
    "/v2/embed": pooling.embed_v2,
    "/pooling": pooling.pool,
    "/classify": pooling.classify,
    "/score": pooling.score,
    "/v1/score": pooling.score,
    "/rerank": pooling.rerank,
    "/v1/rerank": pooling.rerank,
    "/v2/rerank": pooling.rerank,
    "/generative_scoring": pooling.score_items,
    "/v1/systemone": pooling.decide,
    "/tokenize": pooling.tokenize,
    "/detokenize": pooling.detokenize,
    "/v1/audio/transcriptions": speech.transcribe,
    "/v1/audio/translations": speech.transcribe,
    "/v1/chat/completions/render": generating.disabled,
    "/v1/completions/render": generating.disabled,
}
"""What is asked with POST."""

RESPONSE = "/v1/responses/{response_id}"
CANCEL = RESPONSE + "/cancel"
REALTIME = "/v1/realtime"

METHODS = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"


def build(engine: Engine) -> web.Server:
    """The server of one engine."""
    server = _Server(Context(engine))
    loop = asyncio.get_running_loop()

    def request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=wire.MAX_BODY)

    return web.Server(server.serve, request_factory=request, access_log_format='%a - "%r" %s')


class _Server:
    """Finds who answers a request, and answers what they refuse."""

    def __init__(self, context: Context) -> None:
        self._context = context
        table: dict[tuple[str, str], Handler] = {
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("POST", "/ping"): self._health,
            ("GET", "/version"): self._version,
            ("GET", "/openapi.json"): self._openapi,
            ("GET", "/v1/models"): self._models,
            ("GET", "/load"): self._load,
            ("GET", "/kv_event_sources"): self._nothing,
            ("GET", "/metrics"): self._metrics,
            ("GET", RESPONSE): generating.show_response,
            ("POST", CANCEL): generating.cancel_response,
            **{("POST", path): handler for path, handler in SERVING.items()},
            **development.handlers(context.engine.options),
        }
        self._table: dict[str, dict[str, Handler]] = {}
        for (method, path), handler in table.items():
            self._table.setdefault(path, {})[method] = handler

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        context = self._context
        if "Authorization" in request.headers or "X-Api-Key" in request.headers:
            context.credentials += 1
        path = self._path(request.path)
        try:
            response = await self._answer(request, path)
        except Refused as error:
            response = _refusal(path, error)
        except EngineDead:
            response = _refusal(path, Refused(answers.DEAD, 500, "InternalServerError"))
        except NotPossible as error:
            response = _refusal(path, Refused(str(error), 500, "InternalServerError"))
        except OutOfMemory as error:
            message = f"CUDA Error: out of memory ({error})"
            response = _refusal(path, Refused(message, 500, "InternalServerError"))
        if response.prepared or not isinstance(response, web.Response):
            return response
        if response.body and path in SERVING and context.engine.faults.happens("cut_body"):
            return await wire.cut(context, request, response)
        response.headers.update(wire.headers(context, request))
        return response

    @staticmethod
    def _path(path: str) -> str:
        """The path as the table names it."""
        if path.startswith("/v1/responses/"):
            parts = path.split("/")[3:]
            if len(parts) == 1 and parts[0]:
                return RESPONSE
            if len(parts) == 2 and parts[0] and parts[1] == "cancel":
                return CANCEL
        # The metrics are mounted, with all that begins like them.
        return "/metrics" if path.startswith("/metrics") else path

    async def _answer(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        context, method = self._context, request.method
        if path in development.PATHS:
            context.development[path] += 1
        if method == "OPTIONS" and {"Origin", "Access-Control-Request-Method"} <= set(request.headers):
            return _preflight(request)
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._upgrade(request, path)
        methods = self._table.get(path)
        if methods is None:
            return self._missing(request, path)
        handler = methods.get(method)
        if handler is None:
            refused = reply({"detail": "Method Not Allowed"}, 405)
            refused.headers["Allow"] = ", ".join(methods)
            return refused
        if context.engine.dead and path not in ("/health", "/ping", "/metrics"):
            raise EngineDead
        if path in SERVING or path in (RESPONSE, CANCEL):
            context.requests[path] += 1
            await wire.receive(request)
            if await wire.harm(context, request):
                return web.Response()
        return await handler(context, request)

    async def _upgrade(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        if path != REALTIME or request.method != "GET":
            refused = web.Response(status=403)
            refused.force_close()
            return refused
        self._context.requests[path] += 1
        return await speech.realtime(self._context, request)

    def _missing(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        bare = path.rstrip("/")
        if bare and bare != path and bare in self._table:
            query = f"?{request.query_string}" if request.query_string else ""
            place = f"http://{request.headers.get('Host', '')}{bare}{query}"
            return web.Response(status=307, headers={"Location": place})
        return reply({"detail": "Not Found"}, 404)

    # Seeing

    async def _health(self, context: Context, _request: web.BaseRequest) -> web.StreamResponse:
        if context.engine.faults.happens("hang_health"):
            await asyncio.Event().wait()
        return web.Response(status=503 if context.engine.dead else 200)

    async def _version(self, context: Context, _request: web.BaseRequest) -> web.StreamResponse:
        return reply({"version": ".".join(map(str, context.engine.options.version))})

    async def _nothing(self, _context: Context, _request: web.BaseRequest) -> web.StreamResponse:
        return reply({})

    async def _openapi(self, _context: Context, _request: web.BaseRequest) -> web.StreamResponse:
        paths: dict[str, Any] = {
            path: {method.lower(): {} for method in methods} for path, methods in self._table.items()
        }
        return reply({"openapi": "3.1.0", "paths": paths})

    async def _load(self, context: Context, _request: web.BaseRequest) -> web.StreamResponse:
        return reply({"server_load": len(context.engine.running) if context.engine.options.load_tracking else 0})

    async def _models(self, context: Context, _request: web.BaseRequest) -> web.StreamResponse:
        options = context.engine.options
        cards = [_card(name, options.model, None) for name in options.names]
        cards += [_card(name, path, options.names[0]) for name, path in options.loras.items()]
        return reply({"object": "list", "data": cards})

    async def _metrics(self, context: Context, _request: web.BaseRequest) -> web.StreamResponse:
        engine = context.engine
        running = sum(g.scheduled for g in engine.running)
        state = {None: "awake", 0: "", 1: "weights_offloaded", 2: "discard_all"}[engine.level]
        lines = [
            f"vllm:num_requests_running {running}",
            f"vllm:num_requests_waiting {len(engine.running) - running}",
            f"vllm:kv_cache_usage_perc {min(1.0, running / 100)}",
            f"vllm:iteration_tokens_total_count {engine.tokens_total}",
            f"vllm:request_aborted_total {engine.aborted_total}",
            f"llmux_sim_credentials_total {context.credentials}",
        ]
        lines += [
            f'vllm:engine_sleep_state{{sleep_state="{name}"}} {int(name == state)}'
            for name in ("awake", "weights_offloaded", "discard_all")
        ]
        for metric, counts, paths in (
            ("llmux_sim_requests_total", context.requests, (*SERVING, RESPONSE, CANCEL, REALTIME)),
            ("llmux_sim_development_calls_total", context.development, sorted(development.PATHS)),
        ):
            lines += [f'{metric}{{path="{path}"}} {counts[path]}' for path in paths]
        lines += [f'llmux_sim_rpc_total{{method="{name}"}} {count}' for name, count in sorted(context.rpcs.items())]
        return web.Response(text="\n".join(lines) + "\n")


def _card(name: str, root: str, parent: str | None) -> dict[str, Any]:
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "vllm", "root": root}
    permission = {
        "id": f"modelperm-{new_id()}",
        "object": "model_permission",
        "created": card["created"],
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    length = pooling.MAX_MODEL_LEN if parent is None else None
    return {**card, "parent": parent, "max_model_len": length, "permission": [permission]}


def _preflight(request: web.BaseRequest) -> web.Response:
    """What vLLM answers to a browser that asks beforehand: everything is allowed."""
    allowed = {"Access-Control-Allow-Methods": METHODS, "Access-Control-Max-Age": "600"}
    if wanted := request.headers.get("Access-Control-Request-Headers"):
        allowed["Access-Control-Allow-Headers"] = wanted
    return web.Response(text="OK", headers=allowed)


def _refusal(path: str, error: Refused) -> web.Response:
    """An error in the form of its API; what is refused before any API has OpenAI's."""
    if path in ANTHROPIC and not isinstance(error, Invalid):
        return reply(answers.anthropic_error(str(error), error.kind), error.status)
    return reply(answers.error(str(error), error.status, error.kind, error.param), error.status)
