"""The handlers of the control API, in one table.

Short calls answer with a JSON object. Long ones run as tasks of the daemon, which a client that goes away does not
stop; they answer with one object at the end, or with a line of NDJSON per step if the client accepts that.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from aiohttp import web

from llmuxd.control.api import Control, ControlFailed, NotAllowed, Progress, UnknownModel
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.protocol import NDJSON, VERSION_HEADER
from llmuxd.version import __version__

log = logging.getLogger("llmuxd.control")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LOG_LINES = 50
LOG_CHUNK_BYTES = 65536
LOG_POLL_SECS = 0.2
LOCAL_HOSTS = ("", "localhost", "llmuxd", "127.0.0.1")
"""What a Host header may say on a Unix socket; a page in a browser says where it thinks that it is."""


class BadRequest(Exception):
    """The body is not what the call takes; the text says what it takes."""


def build_control(control: Control) -> web.Application:
    """The application of the control socket."""
    calls = _Calls(control)
    table: tuple[tuple[str, str, Handler], ...] = (
        ("GET", "/control/status", calls.status),
        ("POST", "/control/mode", calls.mode),
        ("POST", "/control/pin", calls.pin),
        ("POST", "/control/unpin", calls.unpin),
        ("POST", "/control/switch", calls.switch),
        ("GET", "/control/eviction", calls.evictions),
        ("POST", "/control/eviction", calls.set_eviction),
        ("POST", "/control/sleep", calls.sleep),
        ("POST", "/control/wake", calls.wake),
        ("POST", "/control/stop", calls.stop),
        ("POST", "/control/warmup", calls.warmup),
        ("GET", "/control/events", calls.events),
        ("GET", "/control/logs", calls.logs),
        ("GET", "/control/config", calls.config),
    )
    app = web.Application(middlewares=[_guard])
    for method, path, handler in table:
        app.router.add_route(method, path, handler)
    app.on_response_prepare.append(_add_version)
    return app


async def _add_version(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers[VERSION_HEADER] = __version__


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Keep browsers out, and turn what goes wrong into a status and a sentence."""
    host = request.headers.get("Host", "").partition(":")[0]
    if "Origin" in request.headers or host not in LOCAL_HOSTS:
        return _error(403, "the control socket is not for browsers")
    try:
        return await handler(request)
    except web.HTTPException as refusal:
        if refusal.status == 405:
            return _error(405, f"{request.path} takes {', '.join(sorted(refusal.headers['Allow'].split(',')))}")
        return _error(refusal.status, f"no such call: {request.method} {request.path}")
    except Exception as error:
        status = _status_of(error)
        if status is None:
            log.exception("%s %s", request.method, request.path)
            return _error(500, f"internal error: {error!r}")
        return _error(status, str(error))


def _status_of(error: BaseException) -> int | None:
    """The status of a failure that is not the daemon's own fault; else None."""
    statuses: Mapping[type[BaseException], int] = {
        UnknownModel: 404,
        NotAllowed: 403,
        ControlFailed: 500,
        BadRequest: 400,
    }
    return statuses.get(type(error))


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


class _Calls:
    """One method per call."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._tasks: set[asyncio.Task[dict[str, Any]]] = set()

    # Seeing

    async def status(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response(self._control.status())

    async def evictions(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response(self._control.evictions())

    async def config(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response(self._control.config_json())

    async def events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": NDJSON})
        await response.prepare(request)
        async for event in self._control.subscribe():
            await response.write(_line(event))
        return response

    async def logs(self, request: web.Request) -> web.StreamResponse:
        model = request.query.get("model", "")
        lines = request.query.get("lines", str(LOG_LINES))
        if not model or not lines.isdecimal():
            raise BadRequest("needs ?model=NAME, and a whole number as lines")
        path = self._control.log_path(model)
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
        await response.prepare(request)
        async for chunk in _read_log(path, int(lines), follow=request.query.get("follow") == "1"):
            await response.write(chunk)
        return response

    # Doing

    async def mode(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "mode")
        if body["mode"] not in ("auto", "manual"):
            raise BadRequest(f"unknown mode {body['mode']!r}; use auto or manual")
        return web.json_response(self._control.set_mode(body["mode"]))

    async def unpin(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response(self._control.unpin())

    async def set_eviction(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model", optional=("eviction",))
        if body.get("eviction") is None:
            raise BadRequest('needs "eviction"')
        return web.json_response(self._control.set_eviction(body["model"], _eviction(body["eviction"])))

    async def pin(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model")
        return await self._long(request, lambda tell: self._control.pin(body["model"], tell))

    async def switch(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model")
        return await self._long(request, lambda tell: self._control.switch(body["model"], tell))

    async def wake(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model")
        return await self._long(request, lambda tell: self._control.wake(body["model"], tell))

    async def stop(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model")
        return await self._long(request, lambda tell: self._control.stop(body["model"], tell))

    async def sleep(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model", optional=("eviction",))
        eviction = None if body.get("eviction") is None else _eviction(body["eviction"])
        return await self._long(request, lambda tell: self._control.sleep(body["model"], eviction, tell))

    async def warmup(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, optional=("models",))
        models = body.get("models")
        if models is not None and not (isinstance(models, list) and all(isinstance(m, str) for m in models)):
            raise BadRequest('"models" has to be a list of names')
        return await self._long(request, lambda tell: self._control.warmup(models, tell))

    async def _long(
        self, request: web.Request, begin: Callable[[Progress], Awaitable[dict[str, Any]]]
    ) -> web.StreamResponse:
        """Run a long operation and tell of it, as one object or as NDJSON."""
        steps: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        async def run() -> dict[str, Any]:
            try:
                return await begin(steps.put_nowait)
            finally:
                steps.put_nowait(None)

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if NDJSON not in request.headers.get("Accept", ""):
            return web.json_response(await asyncio.shield(task))
        response = web.StreamResponse(headers={"Content-Type": NDJSON})
        await response.prepare(request)
        while (step := await steps.get()) is not None:
            await response.write(_line(step))
        await response.write(_line(await _result(task)))
        return response


async def _result(task: asyncio.Task[dict[str, Any]]) -> dict[str, Any]:
    """The last line of an NDJSON answer."""
    try:
        return {"result": "ok", **await asyncio.shield(task)}
    except Exception as error:
        status = _status_of(error)
        if status is None:
            log.error("a control operation broke", exc_info=error)
        return {"result": "failed", "status": status or 500, "error": str(error)}


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


async def _body(request: web.Request, *required: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON object of a call. Raises BadRequest unless it has the keys that the call takes, as strings."""
    takes = ", ".join([*required, *(f"{name} (optional)" for name in optional)])
    text = await request.text()
    try:
        body = json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise BadRequest(f"the body is not JSON ({error}); it takes an object with {takes}") from None
    if not isinstance(body, dict) or any(not isinstance(body.get(name), str) for name in required):
        raise BadRequest(f"the body has to be an object with {takes}")
    unknown = sorted(body.keys() - {*required, *optional})
    if unknown:
        raise BadRequest(f"unknown key {unknown[0]!r}; the body takes {takes}")
    return body


def _eviction(value: Any) -> EvictionPolicy:
    """`weights+process`, or llmux 0.7's object of the two."""
    if isinstance(value, dict):
        value = f"{value.get('weights')}+{value.get('process')}"
    try:
        return EvictionPolicy.parse(str(value))
    except ValueError as error:
        raise BadRequest(str(error)) from None


async def _read_log(path: Path, lines: int, follow: bool) -> AsyncIterator[bytes]:
    """The last lines of a log, then, if it is followed, what is added, until the client goes."""
    position = 0
    try:
        with path.open("rb") as file:
            position = _start_of_last(file, lines)
    except FileNotFoundError:
        if not follow:
            return
    while True:
        try:
            with path.open("rb") as file:
                if file.seek(0, 2) < position:
                    position = 0  # It was truncated or replaced.
                file.seek(position)
                while chunk := file.read(LOG_CHUNK_BYTES):
                    position += len(chunk)
                    yield chunk
        except FileNotFoundError:
            position = 0
        if not follow:
            return
        await asyncio.sleep(LOG_POLL_SECS)


def _start_of_last(file: BinaryIO, lines: int) -> int:
    """The offset at which the last `lines` lines of a file begin, read backwards in chunks."""
    at = file.seek(0, 2)
    wanted = lines
    first = True
    while at > 0 and lines > 0:
        begin = max(0, at - LOG_CHUNK_BYTES)
        file.seek(begin)
        chunk = file.read(at - begin)
        # The newline that ends the last line begins no other.
        end = len(chunk) - 1 if first and chunk.endswith(b"\n") else len(chunk)
        first = False
        while (newline := chunk.rfind(b"\n", 0, end)) >= 0:
            wanted -= 1
            if wanted == 0:
                return begin + newline + 1
            end = newline
        at = begin
    return at
