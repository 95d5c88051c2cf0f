"""What the proxy's tests stand on: the real gate and core, a clock that the test moves, engines and clients in bytes.

The engines are Unix sockets whose every byte the test writes, so that what a proxy must cope with can be said
exactly. Engine processes are elsewhere: here starting one is told to the core as done.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.core.policies import Fifo
from llmuxd.core.settings import ModelSpec, Placement, Settings
from llmuxd.core.switcher import Switcher
from llmuxd.engine import Endpoint
from llmuxd.gate import Gate, ServedModel
from llmuxd.metrics import Metrics
from llmuxd.proxy import Limits, Site, build_proxy, serve_proxy

DEADLINE_SECS = 10.0
MAX_BODY = 4 * 1024 * 1024


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until something is so, or fail."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + DEADLINE_SECS
    while not condition():
        assert loop.time() < deadline, f"never: {what}"
        await asyncio.sleep(0.002)


async def settled(value: Callable[[], int]) -> int:
    """Wait until a number does not change any more, and return it: what could flow has flowed."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + DEADLINE_SECS
    seen, since = value(), loop.time()
    while loop.time() - since < 0.2:
        assert loop.time() < deadline, "it never settles"
        await asyncio.sleep(0.01)
        if value() != seen:
            seen, since = value(), loop.time()
    return seen


async def soon(awaitable: Awaitable[Any]) -> Any:
    """Await with the deadline."""
    return await asyncio.wait_for(awaitable, DEADLINE_SECS)


@dataclass
class Head:
    """The head of a message, with names and values as they were sent."""

    first: str
    headers: list[tuple[str, str]]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Head:
        lines = (await soon(reader.readuntil(b"\r\n\r\n"))).decode("utf-8", "surrogateescape").split("\r\n")[:-2]
        pairs = [line.partition(":") for line in lines[1:]]
        return cls(lines[0], [(name, value.strip()) for name, _, value in pairs])

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def get(self, name: str) -> str | None:
        values = self.all(name)
        assert len(values) < 2, f"{name} stands there {len(values)} times"
        return values[0] if values else None


@dataclass
class Asked:
    """One request as an engine got it, and the connection that it may answer on."""

    head: Head
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def target(self) -> str:
        return self.head.first.split(" ")[1]

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def stream(self, content_type: str = "text/event-stream") -> None:
        """The head of a chunked answer."""
        await self.send(
            f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def gone(self) -> None:
        """Wait until the other side has closed the connection."""
        with contextlib.suppress(ConnectionError):
            assert await soon(self.reader.read()) == b""

    def die(self) -> None:
        """Close the connection as a process that is killed does."""
        self.writer.transport.abort()


Script = Callable[[Asked], Awaitable[None]]


class FakeEngine:
    """Listens on a Unix socket. `script` answers; without one the requests wait in `asked` for the test."""

    def __init__(self, path: Path, script: Script | None) -> None:
        self.endpoint = Endpoint(uds=path)
        self.script = script
        self.asked: asyncio.Queue[Asked] = asyncio.Queue()
        self.connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def next(self) -> Asked:
        asked: Asked = await soon(self.asked.get())
        return asked

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[FakeEngine]:
        server = await asyncio.start_unix_server(self._serve, str(self.endpoint.uds))
        try:
            yield self
        finally:
            server.close()
            for writer in self._writers:
                writer.transport.abort()
            await asyncio.sleep(0)  # A transport closes its socket in the loop's next turn.

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        head = await Head.read(reader)
        body = await reader.readexactly(int(head.get("content-length") or 0))
        asked = Asked(head, body, reader, writer)
        if self.script is None:
            self.asked.put_nowait(asked)
            return
        await self.script(asked)
        writer.close()


def answering(raw: bytes) -> Script:
    """A script that sends these bytes and closes the connection."""

    async def script(asked: Asked) -> None:
        await asked.send(raw)

    return script


def plain(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """An answer with a length, the last on its connection."""
    lines = [f"HTTP/1.1 {status}", *headers, "Connection: close", f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


@dataclass
class Answer:
    """What a client got: `complete` if the answer ended as its framing says."""

    status: int
    reason: str
    head: Head
    body: bytes
    complete: bool

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


class Client:
    """One connection to the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def ask(self, model: str = "a", target: str = "/v1/completions", **body: object) -> None:
        await self.send(post(target, json.dumps({"model": model, **body}).encode()))

    async def head(self) -> Head:
        return await Head.read(self.reader)

    async def chunk(self) -> bytes:
        size = int((await soon(self.reader.readuntil(b"\r\n")))[:-2], 16)
        data: bytes = await soon(self.reader.readexactly(size + 2))
        return data[:-2]

    async def answer(self, method: str = "POST") -> Answer:
        """Read one whole answer, or what there is of it."""
        head = await self.head()
        status = int(head.first.split(" ")[1])
        reason = head.first.split(" ", 2)[2]
        length = head.get("content-length")
        assert length is None or head.get("transfer-encoding") is None
        body, complete = b"", True
        if method == "HEAD" or status in (204, 304):
            pass
        elif length is not None:
            body, complete = await self._exactly(int(length))
        elif head.get("transfer-encoding") == "chunked":
            body, complete = await self._chunks()
        else:
            try:
                body = await soon(self.reader.read())
            except ConnectionError:
                complete = False
        return Answer(status, reason, head, body, complete)

    async def ended(self) -> bytes:
        """What still comes until the other side closes."""
        rest: bytes = await soon(self.reader.read())
        return rest

    async def _exactly(self, length: int) -> tuple[bytes, bool]:
        try:
            return await soon(self.reader.readexactly(length)), True
        except asyncio.IncompleteReadError as error:
            return error.partial, False

    async def _chunks(self) -> tuple[bytes, bool]:
        body = b""
        try:
            while chunk := await self.chunk():
                body += chunk
        except (asyncio.IncompleteReadError, ConnectionError):
            return body, False
        return body, True


def post(target: str, body: bytes, *headers: str) -> bytes:
    """A POST; JSON if no header says otherwise."""
    lines = [f"POST {target} HTTP/1.1", "Host: llmux.test", f"Content-Length: {len(body)}", *headers]
    if not any(header.lower().startswith("content-type:") for header in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


@dataclass
class Stack:
    """A proxy over a gate over the core."""

    engines: dict[str, FakeEngine]
    switcher: Switcher
    holds: set[str] = field(default_factory=set)
    """Models whose engines are starting, waking or falling asleep until the test says `done`."""
    metrics: Metrics = field(default_factory=Metrics)
    now: float = 0.0
    refuses_all: str = ""
    ended: list[e.Event] = field(default_factory=list)
    site: Site | None = None
    _clients: list[Client] = field(default_factory=list)

    def __post_init__(self) -> None:
        served = [ServedModel(name, name, f"/models/{name}") for name in self.engines]
        served.append(ServedModel("org/alias", next(iter(self.engines)), "/models/aliased"))
        self.gate = Gate(self.post, served, lambda: (not self.refuses_all, self.refuses_all or "ok"))
        self._events: list[e.Event] = []
        self._posting = False

    def post(self, event: e.Event) -> None:
        """As the runtime does it: one event after the other, their commands begun before it returns."""
        if isinstance(event, (e.RequestFinished, e.ClientLeft, e.RequestBounced)):
            self.ended.append(event)
        self._events.append(event)
        if self._posting:
            return
        self._posting = True
        try:
            while self._events:
                for command in self.switcher.handle(self._events.pop(0), self.now):
                    self._begin(command)
        finally:
            self._posting = False

    def _begin(self, command: c.Command) -> None:
        if isinstance(command, c.Forward):
            self.gate.forward(command, self.engines[command.model].endpoint)
        elif isinstance(command, (c.Refuse, c.Abort)):
            self.gate.end(command)
        elif isinstance(command, (c.StartEngine, c.SleepEngine, c.WakeEngine, c.StopEngine)):
            self._operate(command)

    def _operate(self, command: c.EngineCommand) -> None:
        done: dict[type, type] = {
            c.StartEngine: e.EngineStarted,
            c.SleepEngine: e.EngineSlept,
            c.WakeEngine: e.EngineWoke,
            c.StopEngine: e.EngineStopped,
        }
        if command.model not in self.holds:
            self.post(done[type(command)](command.model, command.op))

    def started(self, model: str) -> None:
        """The engine that was held back is up."""
        self.holds.discard(model)
        self.post(e.EngineStarted(model, self.switcher.state.models[model].op))

    def dies(self, model: str) -> None:
        """The core hears of an engine's death."""
        self.post(e.EngineDied(model, self.switcher.state.models[model].incarnation, "killed"))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.post(e.Tick())

    def count(self, model: str, status: int) -> float:
        """Requests counted under these labels."""
        labels = {"model": model, "status": str(status)}
        return self.metrics.registry.get_sample_value("llmux_requests_total", labels) or 0.0

    def counted(self) -> float:
        """All requests counted."""
        samples = [sample for metric in self.metrics.requests.collect() for sample in metric.samples]
        return sum(sample.value for sample in samples if sample.name.endswith("_total"))

    def idle(self) -> bool:
        """Whether the core holds no request."""
        return not self.switcher.state.requests

    async def connect(self) -> Client:
        assert self.site is not None
        client = Client(*await asyncio.open_connection("127.0.0.1", self.site.port))
        self._clients.append(client)
        return client

    async def in_mid_stream(self) -> tuple[Client, Asked]:
        """A client that has read the first event of a stream of model a, and the request as the engine has it."""
        client = await self.connect()
        await client.ask(stream=True)
        asked = await self.engines["a"].next()
        await asked.stream()
        await asked.chunk(b"data: 1\n\n")
        await client.head()
        await client.chunk()
        return client, asked

    async def exchange(self, request: bytes, method: str = "POST") -> Answer:
        """Send bytes on a new connection and read the answer."""
        client = await self.connect()
        await client.send(request)
        answer = await client.answer(method)
        client.writer.close()
        return answer

    async def close(self) -> None:
        assert self.site is not None
        for client in self._clients:
            client.writer.close()
        await self.site.close()


def core_of(models: Sequence[str], **settings: Any) -> Switcher:
    """A core with one device, with room for one of these models."""
    keep = EvictionPolicy.parse("offload+keep_running")
    specs = [ModelSpec(name, keep, Placement({"gpu": 1})) for name in models]
    return Switcher(specs, {"gpu": 1}, Settings(min_active=0.0, **settings), Fifo(), 0.0)


@contextlib.asynccontextmanager
async def serving(
    folder: Path,
    script: Script | None = None,
    *,
    models: tuple[str, ...] = ("a",),
    holds: tuple[str, ...] = (),
    heartbeat_secs: float = 0.0,
    limits: Mapping[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Stack]:
    """A stack whose engines all follow `script`. Fails if at its end the core still holds a request."""
    switcher = core_of(models, **settings)
    async with contextlib.AsyncExitStack() as stack:
        engines = {
            name: await stack.enter_async_context(FakeEngine(folder / f"{name}.sock", script).listening())
            for name in models
        }
        served = Stack(engines, switcher, set(holds))
        app = build_proxy(served.gate, Limits(MAX_BODY, heartbeat_secs, **(limits or {})), served.metrics)
        served.site = await serve_proxy(app, "127.0.0.1", 0)
        try:
            yield served
            await until(served.idle, "every request has ended")
        finally:
            await served.close()
