"""The handlers of the control API, in one table.

Short calls answer with a JSON object. Long ones run as tasks of the daemon, which a client that goes away does not
stop; they answer with one object at the end, or with a line of NDJSON per step if the client accepts that.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from aiohttp import web

from llmuxd.control.api import BadConfig, Control, ControlFailed, NotAllowed, Progress, UnknownModel
from llmuxd.control.logs import read_log
from llmuxd.control.peer import may_look, may_steer, peer_of
from llmuxd.control.streaming import stream
from llmuxd.core.eviction import AUTO, EvictionPolicy, ProcessStrategy
from llmuxd.protocol import CONTROL_PREFIX, NDJSON, VERSION_HEADER
from llmuxd.version import __version__

log = logging.getLogger("llmuxd.control")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Operation = Callable[[Progress], Awaitable[dict[str, Any]]]

LOG_LINES = 50
MAX_LOG_LINES = 1_000_000
STEP_BACKLOG = 1000
"""Steps kept for a client that reads too slowly; older ones are dropped."""
CLOSE_SECS = 1.0
"""How long calls may go on once the application is shut down."""
LOCAL_HOSTS = frozenset(("", "localhost", "127.0.0.1", "unix", "llmux", "llmuxd"))
"""What a Host header may say on a Unix socket; a page in a browser says where it thinks that it is."""

LOOKING = ("GET", "HEAD")


class BadRequest(Exception):
    """The body or the query is not what the call takes; the text says what it takes."""


def build_control(control: Control, readers: str = "") -> web.Application:
    """The application of the control socket. The members of the group `readers` may look, and not steer."""
    running = _Running()
    calls = _Calls(control, running)
    table: tuple[tuple[str, str, Handler], ...] = (
        ("GET", "/status", calls.status),
        ("POST", "/mode", calls.mode),
        ("POST", "/pin", calls.pin),
        ("POST", "/unpin", calls.unpin),
        ("POST", "/switch", calls.switch),
        ("GET", "/eviction", calls.evictions),
        ("POST", "/eviction", calls.set_eviction),
        ("POST", "/sleep", calls.sleep),
        ("POST", "/wake", calls.wake),
        ("POST", "/stop", calls.stop),
        ("POST", "/warmup", calls.warmup),
        ("POST", "/checkpoint", calls.checkpoint),
        ("POST", "/restore", calls.restore),
        ("POST", "/validate", calls.validate),
        ("POST", "/reload", calls.reload),
        ("GET", "/events", calls.events),
        ("GET", "/logs", calls.logs),
        ("GET", "/config", calls.config),
        ("GET", "/config/diff", calls.config_diff),
    )
    app = web.Application(middlewares=[running.count, _answer_errors, _guard(readers)])
    for method, path, handler in table:
        app.router.add_route(method, CONTROL_PREFIX + path, handler)
    app.on_response_prepare.append(_add_version)
    app.on_shutdown.append(running.end)
    return app


async def _add_version(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers[VERSION_HEADER] = __version__


class _Running:
    """The calls that are being answered. Those left when the application is shut down are cut off, not waited for."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._endless: set[asyncio.Task[Any]] = set()

    @web.middleware
    async def count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        task = _this_task()
        self._tasks.add(task)
        try:
            return await handler(request)
        finally:
            self._tasks.discard(task)
            self._endless.discard(task)

    def is_endless(self) -> None:
        """Said by a call whose answer ends only with its client: it is not worth waiting for."""
        self._endless.add(_this_task())

    async def end(self, _app: web.Application) -> None:
        ending = self._tasks - self._endless
        if ending:
            await asyncio.wait(ending, timeout=CLOSE_SECS)
        for task in self._tasks:
            task.cancel()


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what goes wrong into a status and a sentence."""
    try:
        return await handler(request)
    except web.HTTPException as refusal:
        if refusal.status == 404:
            return _error(404, f"no such call: {request.method} {request.path}")
        if refusal.status == 405:
            return _error(405, f"{request.path} takes {', '.join(sorted(refusal.headers['Allow'].split(',')))}")
        return _error(refusal.status, refusal.reason)
    except Exception as error:
        return _error(**_failure(error))


def _guard(readers: str) -> Any:
    """Let in only those who may steer or, to look, the members of the group `readers`, and no browser.

    Notes who does what.
    """

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = request.headers.get("Host", "").partition(":")[0].lower()
        if "Origin" in request.headers or host not in LOCAL_HOSTS:
            raise NotAllowed("the control socket is not for browsers: no Origin header, and localhost as Host")
        peer = peer_of(request.transport)
        if peer is not None:
            path = request.transport.get_extra_info("sockname") if request.transport else ""
            if not may_steer(peer, path):
                if not may_look(peer, readers):
                    raise NotAllowed(f"user {peer.uid} is not in the group of {path}")
                if request.method not in LOOKING:
                    raise NotAllowed(f"user {peer.uid} may look, but not steer: the group {readers} is for that")
            if request.method == "POST":
                log.info("%s by user %d (pid %d)", request.path, peer.uid, peer.pid)
        return await handler(request)

    return guard


def _failure(error: Exception) -> dict[str, Any]:
    """Status, sentence and details of a failure. What nobody foresaw is logged, too."""
    statuses: Mapping[type[Exception], int] = {NotAllowed: 403, ControlFailed: 500, BadRequest: 400, BadConfig: 400}
    if isinstance(error, UnknownModel):
        return {"status": 404, "error": str(error), "known": list(error.known)}
    if type(error) in statuses:
        details = error.details if isinstance(error, ControlFailed) else {}
        return {"status": statuses[type(error)], "error": str(error), **details}
    log.error("a control call broke", exc_info=error)
    return {"status": 500, "error": f"internal error: {error!r}"}


def _error(status: int, error: str, **details: Any) -> web.Response:
    return web.json_response({"error": error, **details}, status=status)


class _Calls:
    """One method per call."""

    def __init__(self, control: Control, running: _Running) -> None:
        self._control = control
        self._running = running
        self._tasks: set[asyncio.Task[dict[str, Any]]] = set()

    # Seeing

    async def status(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response(self._control.status())

    async def evictions(self, request: web.Request) -> web.StreamResponse:
        answer = self._control.evictions()
        if "model" in request.query:
            asked = request.query["model"]
            name = self._control.resolve(asked)
            if name is None:
                raise UnknownModel(asked, list(answer["models"]))
            answer = {"models": {name: answer["models"][name]}}
        return web.json_response(answer)

    async def config(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response(self._control.config_json())

    async def config_diff(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response(await self._control.config_diff())

    async def events(self, request: web.Request) -> web.StreamResponse:
        self._running.is_endless()
        return await stream(request, NDJSON, self._event_lines())

    async def _event_lines(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._control.subscribe()) as events:
            async for event in events:
                yield _line(event)

    async def logs(self, request: web.Request) -> web.StreamResponse:
        model = request.query.get("model", "")
        lines = _whole_number(request.query.get("lines", str(LOG_LINES)))
        follow = request.query.get("follow", "0")
        if not model or lines is None or follow not in ("0", "1"):
            raise BadRequest(f"takes ?model=NAME, lines=N (at most {MAX_LOG_LINES}) and follow=0|1")
        if follow == "1":
            self._running.is_endless()
        chunks = read_log(self._control.log_path(model), lines, follow == "1")
        return await stream(request, "text/plain; charset=utf-8", chunks)

    # Doing

    async def mode(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "mode")
        if body["mode"] not in ("auto", "manual"):
            raise BadRequest(f"unknown mode {body['mode']!r}; use auto or manual")
        return web.json_response(self._control.set_mode(body["mode"]))

    async def unpin(self, request: web.Request) -> web.StreamResponse:
        await _body(request)
        return web.json_response(self._control.unpin())

    async def set_eviction(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model", optional=("eviction",))
        if body.get("eviction") is None:
            raise BadRequest('needs "eviction"')
        eviction = AUTO if body["eviction"] == AUTO.value else _eviction(body["eviction"])
        return web.json_response(self._control.set_eviction(body["model"], eviction))

    async def pin(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model")
        return await self._run(request, lambda tell: self._control.pin(body["model"], tell))

    async def switch(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model")
        return await self._run(request, lambda tell: self._control.switch(body["model"], tell))

    async def wake(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model")
        return await self._run(request, lambda tell: self._control.wake(body["model"], tell))

    async def stop(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model")
        return await self._run(request, lambda tell: self._control.stop(body["model"], tell))

    async def sleep(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model", optional=("eviction",))
        eviction = None if body.get("eviction") is None else _eviction(body["eviction"])
        return await self._run(request, lambda tell: self._control.sleep(body["model"], eviction, tell))

    async def warmup(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, optional=("models",))
        models = body.get("models")
        if models is not None and not (isinstance(models, list) and all(isinstance(m, str) for m in models)):
            raise BadRequest('"models" has to be a list of names')
        return await self._run(request, lambda tell: self._control.warmup(models, tell))

    async def checkpoint(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model", optional=("eviction", "warmup"))
        eviction = None if body.get("eviction") is None else _eviction(body["eviction"])
        if eviction is not None and eviction.process is not ProcessStrategy.CHECKPOINT:
            raise BadRequest(f"{eviction} makes no checkpoint; use {eviction.weights.value}+checkpoint")
        warmup = _flag(body, "warmup", True)
        return await self._run(request, lambda tell: self._control.checkpoint(body["model"], eviction, warmup, tell))

    async def restore(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model", optional=("detached",))
        detached = _flag(body, "detached", False)
        return await self._run(request, lambda tell: self._control.restore(body["model"], detached, tell))

    async def validate(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request, "model", optional=("policies",))
        policies = body.get("policies")
        if policies is not None and (not isinstance(policies, list) or not policies):
            raise BadRequest('"policies" has to be a list of eviction policies; all are tried without it')
        chosen = None if policies is None else [_eviction(policy) for policy in policies]
        return await self._run(request, lambda tell: self._control.validate(body["model"], chosen, tell))

    async def reload(self, request: web.Request) -> web.StreamResponse:
        await _body(request)
        return await self._run(request, self._control.reload)

    async def _run(self, request: web.Request, operation: Operation) -> web.StreamResponse:
        """Run a long operation and tell of it, as one object or as NDJSON."""
        steps: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(STEP_BACKLOG)

        def tell(step: dict[str, Any] | None) -> None:
            if steps.full():
                steps.get_nowait()
            steps.put_nowait(step)

        async def run() -> dict[str, Any]:
            try:
                return {"result": "ok", **await operation(tell)}
            except Exception as error:
                return {"result": "failed", **_failure(error)}
            finally:
                tell(None)

        task = asyncio.create_task(run())
        # The loop itself keeps only a weak reference to a task.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if NDJSON in request.headers.get("Accept", ""):
            return await stream(request, NDJSON, _step_lines(steps, task))
        outcome = await asyncio.shield(task)
        return web.json_response(outcome) if outcome.pop("result") == "ok" else _error(**outcome)


async def _step_lines(
    steps: asyncio.Queue[dict[str, Any] | None], task: asyncio.Task[dict[str, Any]]
) -> AsyncGenerator[bytes, None]:
    while (step := await steps.get()) is not None:
        yield _line(step)
    yield _line(await asyncio.shield(task))


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _whole_number(text: str) -> int | None:
    """A number of lines; None if it is none, or too many."""
    if not text.isdecimal() or len(text) > len(str(MAX_LOG_LINES)) or int(text) > MAX_LOG_LINES:
        return None
    return int(text)


async def _body(request: web.Request, *required: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON object of a call. Raises BadRequest unless it has the keys that the call takes, as strings."""
    takes = ", ".join([*required, *(f"{name} (optional)" for name in optional)]) or "nothing"
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


def _flag(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise BadRequest(f'"{name}" has to be true or false')
    return value


def _eviction(value: Any) -> EvictionPolicy:
    """`weights+process`, or llmux 0.7's object of the two."""
    if isinstance(value, dict):
        value = f"{value.get('weights')}+{value.get('process')}"
    try:
        return EvictionPolicy.parse(str(value))
    except ValueError as error:
        raise BadRequest(str(error)) from None
