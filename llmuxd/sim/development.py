"""What changes an engine, or shows its inside: the endpoints that no client may ever reach.

Those of VLLM_SERVER_DEV_MODE=1 read their parameters from the query alone, but for a few with a JSON body. Some of
the others come with arguments of the server, or are always there. Every call to a path of these is counted, by any
method and whether it is there or not, so that a test can prove that there was none.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from llmuxd.sim.answers import Invalid, Refused
from llmuxd.sim.engine import EngineDead
from llmuxd.sim.generating import refuse_scale_out
from llmuxd.sim.options import Options
from llmuxd.sim.wire import Context, reply

Handler = Callable[[Context, web.BaseRequest], Awaitable[web.StreamResponse]]

MODES = ("abort", "wait", "keep")

COMMUNICATORS_SINCE = (0, 32)
COMMUNICATORS: Mapping[str, bool] = {"checkpoint_prepare": False, "checkpoint_restore": True}
"""Method -> whether the ranks are held together after it."""
PATCHED_COMMUNICATORS: Mapping[str, bool] = {"suspend_nccl": False, "resume_nccl": True}
"""The same of a vLLM before, with llmux's patch."""

log = logging.getLogger("vllm")


def _mode(request: web.BaseRequest) -> str:
    mode = request.query.get("mode", "abort")
    if mode not in MODES:
        raise Invalid(f"mode {mode!r}: unknown", "query.mode")
    return mode


async def _object(request: web.BaseRequest, needed: str) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except ValueError as error:
        raise Refused(f"JSON decode error: {error}", 400, "Bad Request") from error
    if not isinstance(body, dict) or needed not in body:
        raise Refused(f"Missing {needed!r} in request body", 400, "Bad Request")
    return body


async def sleep(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    engine, mode = context.engine, _mode(request)
    text = request.query.get("level", "1")
    if text not in ("0", "1", "2"):
        raise Invalid(f"level {text!r}: unknown", "query.level")
    if engine.faults.happens("refuse_sleep"):
        engine.paused = True
        raise Refused("AssertionError: Memory usage increased after sleeping.", 500, "InternalServerError")
    if engine.faults.happens("die_in_sleep"):
        engine.die()
        raise EngineDead
    if engine.faults.happens("hang_sleep"):
        await asyncio.Event().wait()
    if not engine.faults.happens("lie_sleep"):
        await engine.sleep(int(text), mode)
    return reply({"status": "sleeping", "level": int(text)})


async def wake_up(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    engine = context.engine
    if engine.faults.happens("fail_wake"):
        raise Refused("RuntimeError: wake up failed", 500, "InternalServerError")
    if engine.faults.happens("oom_wake"):
        raise Refused("CUDA Error: out of memory", 500, "InternalServerError")
    if engine.faults.happens("die_in_wake"):
        engine.die()
        raise EngineDead
    if engine.faults.happens("hang_wake"):
        await asyncio.Event().wait()
    tags = request.query.getall("tags", [])
    await engine.wake(set(tags))
    return reply({"status": "sleeping" if engine.asleep else "awake", "tags": tags or None})


async def is_sleeping(context: Context, _request: web.BaseRequest) -> web.StreamResponse:
    async with context.engine.busy:
        return reply({"is_sleeping": context.engine.is_sleeping})


async def pause(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    await context.engine.pause(_mode(request))
    return reply({"status": "paused"})


async def resume(context: Context, _request: web.BaseRequest) -> web.StreamResponse:
    context.engine.resume()
    return reply({"status": "resumed"})


async def is_paused(context: Context, _request: web.BaseRequest) -> web.StreamResponse:
    return reply({"is_paused": context.engine.is_paused})


async def collective_rpc(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    engine, method = context.engine, str((await _object(request, "method"))["method"])
    log.info("collective_rpc %s", method)
    context.rpcs[method] += 1
    has = COMMUNICATORS if engine.options.version >= COMMUNICATORS_SINCE else PATCHED_COMMUNICATORS
    if method == "reload_weights":
        await engine.reload_weights()
    elif method in has:
        engine.tied = has[method]
    else:
        why = f"NotImplementedError: Method {method!r} is not implemented."
        raise Refused(f"Call to collective_rpc method failed: {why}", 500, "InternalServerError")
    return reply({"results": [None] * engine.options.ranks})


async def reset_prefix_cache(context: Context, _request: web.BaseRequest) -> web.StreamResponse:
    return reply({"success": not context.engine.running})


async def release_kv_cache(context: Context, _request: web.BaseRequest) -> web.StreamResponse:
    context.engine.release_kv_cache()
    return reply({"status": "kv_cache_released"})


async def abort_requests(context: Context, _request: web.BaseRequest) -> web.StreamResponse:
    """All of them: the simulated engine does not know its requests by their ids."""
    running = list(context.engine.running)
    for generation in running:
        generation.aborted = True
    return reply({"status": "aborted", "aborted": len(running)})


async def abort_by_id(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    refuse_scale_out(context)
    await _object(request, "request_ids")
    await abort_requests(context, request)
    return web.Response()


async def server_info(context: Context, _request: web.BaseRequest) -> web.StreamResponse:
    return reply({"vllm_config": repr(context.engine.options), "vllm_env": {}, "system_env": {}})


async def load_lora(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    body = await _object(request, "lora_name")
    return web.Response(text=f"Success: LoRA adapter '{body['lora_name']}' added successfully.")


async def empty(_context: Context, _request: web.BaseRequest) -> web.StreamResponse:
    return web.Response()


def _says(**content: Any) -> Handler:
    """Answers always the same."""

    async def handler(_context: Context, _request: web.BaseRequest) -> web.StreamResponse:
        return reply(content)

    return handler


IN_MODE: Mapping[tuple[str, str], Handler] = {
    ("POST", "/sleep"): sleep,
    ("POST", "/wake_up"): wake_up,
    ("GET", "/is_sleeping"): is_sleeping,
    ("POST", "/release_kv_cache_memory"): release_kv_cache,
    ("POST", "/pause"): pause,
    ("POST", "/resume"): resume,
    ("GET", "/is_paused"): is_paused,
    ("POST", "/abort_requests"): abort_requests,
    ("POST", "/collective_rpc"): collective_rpc,
    ("POST", "/reset_prefix_cache"): reset_prefix_cache,
    ("POST", "/reset_mm_cache"): empty,
    ("POST", "/reset_encoder_cache"): empty,
    ("GET", "/server_info"): server_info,
    ("POST", "/init_weight_transfer_engine"): _says(message="Weight transfer initialized"),
    ("POST", "/shutdown_weight_transfer_engine"): _says(message="Weight transfer shut down"),
    ("POST", "/start_weight_update"): _says(message="Weight update started"),
    ("POST", "/start_draft_weight_update"): _says(message="Draft weight update started"),
    ("POST", "/update_weights"): _says(message="Weights updated"),
    ("POST", "/finish_weight_update"): _says(message="Weight update finished"),
    ("POST", "/update_weight_version"): _says(success=True, new_version="1"),
    ("GET", "/weight_info"): _says(weight_version="0"),
    ("POST", "/weight_checker"): _says(checksums={}),
    ("GET", "/get_world_size"): _says(world_size=1),
}

ALWAYS: Mapping[tuple[str, str], Handler] = {
    ("POST", "/scale_elastic_ep"): _says(message="Scaled to 1 data parallel engines"),
    ("POST", "/is_scaling_elastic_ep"): _says(is_scaling_elastic_ep=False),
    ("POST", "/inference/v1/abort_requests"): abort_by_id,
}

LORA: Mapping[tuple[str, str], Handler] = {
    ("POST", "/v1/load_lora_adapter"): load_lora,
    ("POST", "/v1/unload_lora_adapter"): load_lora,
}

NEVER = ("/start_profile", "/stop_profile", "/fault_tolerance/apply", "/fault_tolerance/status")
"""vLLM has them with arguments that nothing is simulated of."""

PATHS = frozenset(path for _, path in (*IN_MODE, *ALWAYS, *LORA)).union(NEVER)


def handlers(options: Options) -> dict[tuple[str, str], Handler]:
    """Those that an engine with these options has."""
    found = dict(ALWAYS)
    if options.development:
        found |= IN_MODE
    if options.lora_updating:
        found |= LORA
    return found
