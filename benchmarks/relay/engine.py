"""The engine behind every proxy that is measured: vLLM's HTTP as far as that needs it, as fast as Python answers.

    LLMUX_BENCH_PORT=PORT python -m benchmarks.relay.engine serve NAME --served-model-name NAME --uds PATH

It listens on the Unix socket, where the proxies find it, and on that port of 127.0.0.1 for the clients that measure it
alone. Unlike `llmuxd.sim.vllm` it has no memory, no faults and no words of its own: every answer is made before the
first request. A stream goes on until its client leaves, at the pace that its request names.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmuxd.sim.options import VERSION, parse

CHAT = "/v1/chat/completions"
PACE = "events_per_s"
"""The field of a streaming request that says how many events a second it wants; 0 is as many as can be sent."""

PORT_ENV = "LLMUX_BENCH_PORT"

EVENT_BYTES = 200
"""One SSE event, as vLLM makes one per token."""
ANSWER_BYTES = 600
"""The body of an answer that is not streamed."""

TICK_SECS = 0.001
BACKLOG = 4096

_BASE = {"id": "chatcmpl-1f0c2d3e4b5a6978", "created": 1767225600}
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_FLOOD_EVENTS = 64
_FLOOD_WRITES = 16
"""Events per write, and writes per turn, of a stream that knows no pace."""


def chat_answer(name: str) -> bytes:
    """The body of an answer."""
    base = {**_BASE, "object": "chat.completion", "model": name}
    usage = {"prompt_tokens": 12, "total_tokens": 76, "completion_tokens": 64, "prompt_tokens_details": None}

    def with_text(text: str) -> bytes:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "reasoning": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length", "stop_reason": None}
        return _dumps({**base, "choices": [choice], "usage": usage})

    return _padded(with_text, ANSWER_BYTES)


def event(name: str) -> bytes:
    """One event of a stream."""
    base = {**_BASE, "object": "chat.completion.chunk", "model": name}

    def with_text(text: str) -> bytes:
        choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
        return b"data: " + _dumps({**base, "choices": [choice]}) + b"\n\n"

    return _padded(with_text, EVENT_BYTES)


def _dumps(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _padded(make: Callable[[str], bytes], size: int) -> bytes:
    return make("x" * (size - len(make(""))))


class Engine:
    """What the connections share: the answers, and the one timer that paces all streams."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self.streaming: set[Connection] = set()
        self.asleep = False
        one = event(name)
        self.chunk = b"%x\r\n%b\r\n" % (len(one), one)
        models = {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "vllm"}]}
        self.routes: dict[bytes, Callable[[], bytes]] = {
            b"GET /health": lambda: b"",
            b"GET /version": _always({"version": VERSION}),
            b"GET /openapi.json": _always({"openapi": "3.1.0", "paths": {CHAT: {"post": {}}}}),
            b"GET /v1/models": _always(models),
            b"GET /metrics": lambda: b"vllm:num_requests_running %d\n" % len(self.streaming),
            b"GET /is_sleeping": lambda: json.dumps({"is_sleeping": self.asleep}).encode(),
            b"POST /sleep": lambda: self._sleep(True),
            b"POST /wake_up": lambda: self._sleep(False),
        }
        whole = chat_answer(name)
        self.answer = http("200 OK", whole)
        self.last_answer = http("200 OK", whole, "connection: close\r\n")
        self._loop = loop
        self._wheels: dict[float, list[set[Connection]]] = {}
        self._placed = 0
        self._origin = loop.time()
        self._tick = 0
        self._timer: asyncio.TimerHandle | None = None

    def _sleep(self, asleep: bool) -> bytes:
        self.asleep = asleep
        return b"{}"

    def begin(self, stream: Connection, pace: float) -> set[Connection] | None:
        """Count it in, and have `pace` events a second sent on it if that is not 0; the slot to take it out of.

        The events of all streams of a pace are spread over its interval: one that comes behind 127 others waits for
        no proxy to be done with them.
        """
        self.streaming.add(stream)
        if not pace:
            return None
        wheel = self._wheels.setdefault(pace, [set() for _ in range(max(1, round(1 / pace / TICK_SECS)))])
        self._placed += 1
        slot = wheel[self._placed % len(wheel)]
        slot.add(stream)
        if self._timer is None:
            self._tick = self._now()
            self._timer = self._loop.call_later(TICK_SECS, self._turn)
        return slot

    def _now(self) -> int:
        return int((self._loop.time() - self._origin) / TICK_SECS)

    def _turn(self) -> None:
        """Send what is due since the last turn: a timer that comes late loses no events."""
        now = self._now()
        chunk = self.chunk
        for tick in range(self._tick + 1, now + 1):
            for wheel in self._wheels.values():
                for stream in wheel[tick % len(wheel)]:
                    stream.send(chunk)
        self._tick = now
        self._timer = self._loop.call_later(TICK_SECS, self._turn) if self.streaming else None


class Connection(asyncio.Protocol):
    """One connection: requests in turn, until one of them is a stream."""

    __slots__ = ("_engine", "_flood", "_rest", "_slot", "_transport", "held_up")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rest = b""
        self._flood = b""
        self.held_up = False
        """The other side takes no more for now."""
        self._slot: set[Connection] | None = None
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.streaming.discard(self)
        if self._slot is not None:
            self._slot.discard(self)
        self._flood = b""

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            head = data[:end]
            length = _LENGTH.search(head)
            begin = end + 4
            end = begin + (int(length[1]) if length else 0)
            if len(data) < end:
                break
            self._answer(head, data[begin:end])
            data = data[end:]
        self._rest = data

    def _answer(self, head: bytes, body: bytes) -> None:
        route = head[: head.find(b" ", head.find(b" ") + 1)].partition(b"?")[0]
        engine = self._engine
        close = _CLOSE.search(head) is not None
        if route == b"POST /v1/chat/completions":
            if b'"stream"' in body:
                self._stream(json.loads(body))
                return
            self._transport.write(engine.last_answer if close else engine.answer)
        elif route in engine.routes:
            self._transport.write(http("200 OK", engine.routes[route](), "connection: close\r\n" if close else ""))
        else:
            self._transport.write(http("404 Not Found", b'{"detail":"Not Found"}'))
        if close:
            self._transport.close()

    def _stream(self, request: dict[str, Any]) -> None:
        self._transport.write(_STREAM_HEAD + self._engine.chunk)
        self._slot = self._engine.begin(self, request[PACE])
        if self._slot is None:
            self._flood = self._engine.chunk * _FLOOD_EVENTS
            self.resume_writing()

    def send(self, chunk: bytes) -> None:
        """One event. As vLLM does not wait for a client, it is sent whether the last ones were taken or not."""
        self._transport.write(chunk)

    def pause_writing(self) -> None:
        self.held_up = True

    def resume_writing(self) -> None:
        self.held_up = False
        for _ in range(_FLOOD_WRITES):
            if self.held_up or not self._flood:
                return
            self._transport.write(self._flood)
        # Whoever takes it as fast as it comes is not served alone.
        asyncio.get_running_loop().call_soon(self.resume_writing)


def http(status: str, body: bytes, fields: str = "") -> bytes:
    """A whole answer, with the fields that uvicorn sets."""
    head = f"HTTP/1.1 {status}\r\nserver: uvicorn\r\n{fields}content-length: {len(body)}\r\n"
    return f"{head}content-type: application/json\r\n\r\n".encode() + body


def _always(answer: dict[str, Any]) -> Callable[[], bytes]:
    body = json.dumps(answer).encode()
    return lambda: body


async def serve(name: str, uds: Path, port: int) -> None:
    """Serve on both until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    engine = Engine(name, loop)
    # A server that nobody refers to is closed by uvloop.
    servers = (
        await loop.create_unix_server(lambda: Connection(engine), str(uds), backlog=BACKLOG),
        await loop.create_server(lambda: Connection(engine), "127.0.0.1", port, backlog=BACKLOG),
    )
    await stop.wait()
    for server in servers:
        server.close()


def main() -> None:
    """Exits with 0 after SIGTERM."""
    import uvloop

    options = parse(sys.argv[1:], os.environ)
    if options.uds is None:
        raise SystemExit("engine: --uds is missing")
    uvloop.run(serve(options.names[0], options.uds, int(os.environ[PORT_ENV])))


if __name__ == "__main__":
    main()
