"""What every API of a simulated engine does with a request and an answer, in bytes: bodies, streams, headers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from llmuxd.sim.answers import Invalid, dumps, new_id
from llmuxd.sim.engine import BodyCut, Engine, EngineDead
from llmuxd.sim.responses import Store

MAX_BODY = 2**31


@dataclass
class Context:
    """One engine, and what its API server keeps."""

    engine: Engine
    store: Store = field(default_factory=Store)
    requests: Counter[str] = field(default_factory=Counter)
    """Path -> how often it was asked, of the APIs."""
    development: Counter[str] = field(default_factory=Counter)
    """The same of what changes the engine or shows its inside, whether it is there or not."""
    rpcs: Counter[str] = field(default_factory=Counter)
    """Method -> how often it was called by /collective_rpc, whether it is there or not."""
    credentials: int = 0
    """Requests that bore a key."""


def gone(request: web.BaseRequest) -> Callable[[], bool]:
    """Tells whether the client has left."""

    def has_left() -> bool:
        return request.transport is None or request.transport.is_closing()

    return has_left


def hang_up(request: web.BaseRequest) -> None:
    """Close the connection once what was written is sent."""
    if request.transport is not None:
        request.transport.close()


# Requests


def media_type(request: web.BaseRequest) -> str:
    return request.headers.get("Content-Type", "").partition(";")[0].strip().lower()


async def receive(request: web.BaseRequest) -> None:
    """Read the whole body, for whoever parses it."""
    if request.version >= (1, 1) and request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    if media_type(request).startswith("multipart/"):
        await request.post()
    else:
        await request.read()


async def json_body(request: web.BaseRequest) -> dict[str, Any]:
    """The body of an API that takes JSON. Raises Invalid."""
    if media_type(request) != "application/json":
        raise Invalid("1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed")
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise Invalid(f"1 validation error:\n  {{'type': 'json_invalid', 'msg': '{error}'}}", "body") from error
    if not isinstance(body, dict):
        raise Invalid("1 validation error:\n  {'type': 'model_attributes_type', 'loc': 'body'}", "body")
    return body


# Answers


def headers(context: Context, request: web.BaseRequest) -> dict[str, str]:
    """Those of every answer: uvicorn's, those for browsers, and the id if it is asked for."""
    found = {"Server": "uvicorn", "Vary": "Origin"}
    if "Origin" in request.headers:
        found["Access-Control-Allow-Origin"] = "*"
    if context.engine.options.request_id_headers:
        found["X-Request-Id"] = request.headers.get("X-Request-Id") or new_id() + new_id()
    return found


def reply(content: Any, status: int = 200) -> web.Response:
    """An answer in JSON."""
    return web.Response(body=dumps(content), status=status, content_type="application/json")


async def stream(context: Context, request: web.BaseRequest, events: AsyncGenerator[bytes, None]) -> web.StreamResponse:
    """Answer with server-sent events as they come; where they break off, so does the answer."""
    response = web.StreamResponse(headers=headers(context, request))
    response.content_type, response.charset = "text/event-stream", "utf-8"
    try:
        await response.prepare(request)
        async with contextlib.aclosing(events):
            async for event in events:
                await response.write(event)
        await response.write_eof()
    except ConnectionError:
        pass
    except (EngineDead, BodyCut):
        hang_up(request)
    return response


async def cut(context: Context, request: web.BaseRequest, whole: web.Response) -> web.StreamResponse:
    """Send the head and one half of an answer."""
    body = whole.body
    assert isinstance(body, bytes)
    response = web.StreamResponse(status=whole.status, headers=headers(context, request))
    response.content_type, response.content_length = whole.content_type, len(body)
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    hang_up(request)
    return response


async def harm(context: Context, request: web.BaseRequest) -> bool:
    """Let the faults happen that come before an answer; True if nothing is left to be answered."""
    faults = context.engine.faults
    seconds = faults.value("slow_head", 1.0)
    if faults.happens("slow_head"):
        await asyncio.sleep(seconds)
    if faults.happens("garbage_answer"):
        if request.transport is not None:
            request.transport.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        hang_up(request)
        return True
    return False
