"""One client of the soak: it does this and that, one thing after the other, in every way that a client may behave."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from random import Random

from tests.soak.field import DEADLINE_SECS, Field
from tests.soak.judge import Asked, How, Outcome, fault, left, talked, unserved, wrong_head
from tests.soak.keys import KEYS, Key
from tests.soak.menu import Menu, Order, Served
from tests.soak.stand import MAX_BODY_BYTES
from tests.soak.websocket import CLOSE, event, frame, handshake, read_event
from tests.soak.wire import Answer, End, NoAnswer, Pace, Wire

LONG_STREAM = (40, 150)
"""Tokens of a stream that somebody leaves, or that an engine is likely to die in."""
STALL_BYTES = 2000
"""Each 500 bytes give a body another second."""
ONE_SHOT = ("Connection: close",)
MOST_IDLE_SECS = 5.0
"""A connection that has been idle for longer is not used again: the daemon may be closing it."""


class Client:
    """Asks, and tells the account what came of it. Keeps one connection open where its dice say so."""

    def __init__(self, field: Field, rng: Random, think_secs: float, key: Key = KEYS[0]) -> None:
        self._field = field
        self._rng = rng
        self._think_secs = think_secs
        self._menu = Menu(field.models, rng, field.ids, key)
        self._kept: Wire | None = None
        self._kept_since = 0.0
        self._acts: dict[Callable[[], Awaitable[None]], int] = {
            self.post: 32,
            self.stream: 28,
            self.read_slowly: 10,
            self.take_much_slowly: 1,
            self.leave_queued: 10,
            self.leave_stream: 10,
            self.leave_upload: 10,
            self.leave_head: 4,
            self.half_close: 6,
            self.old_http: 12,
            self.pipeline: 12,
            self.send_much: 3,
            self.send_slowly: 6,
            self.expect: 6,
            self.stall: 2,
            self.stall_head: 2,
            self.send_too_much: 2,
            self.be_impatient: 10,
            self.look_up: 4,
            self.talk: 5,
            self.ask_llmuxd: 40,
        }

    async def run(self) -> None:
        """Until cancelled, at a time when nothing is under way."""
        acts, weights = list(self._acts), list(self._acts.values())
        while True:
            await asyncio.sleep(self._rng.expovariate(1 / self._think_secs))
            if not self._field.is_open:
                self._drop()
            await self._field.begin()
            try:
                await self._rng.choices(acts, weights)[0]()
            finally:
                self._field.end()

    async def visit(self, served: Served) -> bool:
        """Ask one model until it answers; False if it does not."""
        menu = Menu((served,), self._rng, self._field.ids)
        deadline = time.monotonic() + DEADLINE_SECS
        while time.monotonic() < deadline:
            answer = await self._ask("visit", menu.generation(tokens=3))
            if answer is not None and answer.status == 200 and answer.end is End.CLEAN:
                self._drop()
                return True
            await asyncio.sleep(0.5)
        return False

    # What a client may do

    async def post(self) -> None:
        await self._ask("post", self._menu.any())

    async def stream(self) -> None:
        await self._ask("stream", self._menu.generation(stream=True, tokens=self._few()))

    async def ask_llmuxd(self) -> None:
        order = self._menu.own()
        await self._ask(order.code or "/".join(order.target.split("/")[:3]), order)

    async def look_up(self) -> None:
        """A response that is made and kept, and then asked for again."""
        made = self._menu.response()
        answer = await self._ask("kept response", made)
        if answer is not None and answer.status == 200 and answer.end is End.CLEAN:
            await self._ask("looked up", self._menu.look_up(made, answer.body))

    async def talk(self) -> None:
        """By a WebSocket, to the end or not."""
        order, name = self._menu.realtime()
        asked = self._field.enter("WebSocket", order)
        wire = await Wire.open(self._field.port)
        try:
            await wire.send(self._head(order, *handshake(self._rng)))
            answer = await asyncio.wait_for(wire.answer("GET"), DEADLINE_SECS)
            if answer.status != 101:
                self._field.answered(asked, answer)
            else:
                said = await asyncio.wait_for(self._converse(wire, name), DEADLINE_SECS)
                wrong = wrong_head(order, answer)
                self._field.close(asked, fault(wrong, 101) if wrong else self._talked(asked, said))
            wire.close()
        except (OSError, NoAnswer, asyncio.TimeoutError) as error:
            self._failed(asked, wire, error)

    def _talked(self, asked: Asked, complete: bool | None) -> Outcome:
        return talked(asked, complete, self._field.causes, time.monotonic())

    async def _converse(self, wire: Wire, name: str) -> bool | None:
        """Sounds out, words in; whether all came, None if it left in between. Raises NoAnswer for nonsense."""
        sounds = self._rng.randint(1, 4)
        await wire.send(event(self._rng, "session.update", model=name))
        for number in range(sounds):
            sound = base64.b64encode(self._rng.randbytes(300)).decode()
            await wire.send(event(self._rng, "input_audio_buffer.append", audio=sound))
            if not number:
                await wire.send(event(self._rng, "input_audio_buffer.commit"))
        if self._rng.random() < 0.3:
            wire.reset()
            return None
        await wire.send(event(self._rng, "input_audio_buffer.commit", final=True))
        while (told := await read_event(wire)) is not None:
            if told["type"] == "error":
                return False
            if told["type"] == "transcription.done":
                if told["text"].split()[::2] != [name] * sounds:
                    raise NoAnswer(f"another one's words: {told['text'][:60]!r}, not {sounds} of {name}")
                await wire.send(frame(CLOSE, b"\x03\xe8", self._rng))
                await wire.rest()
                return True
        return False

    async def read_slowly(self) -> None:
        secs = self._rng.uniform(0.002, 0.02)
        order = self._menu.generation(stream=True, tokens=self._rng.randint(*LONG_STREAM))
        await self._ask("slow reader", order, pace=_pausing(secs), small=True)

    async def take_much_slowly(self) -> None:
        """More than the buffers of the kernel hold, so that the daemon has to wait for its client."""
        order = self._menu.tokenize(self._rng.randint(200_000, 700_000))
        await self._ask("slow reader of much", order, pace=_pausing(0.005), small=True)

    async def send_much(self) -> None:
        chunked = self._rng.random() < 0.5
        await self._ask("large body", self._menu.large(), chunked=chunked)

    async def send_slowly(self) -> None:
        await self._ask(
            "slow upload", self._menu.any(), pieces=self._rng.randint(2, 6), chunked=self._rng.random() < 0.5
        )

    async def be_impatient(self) -> None:
        wait = self._rng.choice((0.0, 0.0, 0.3, 2.0))
        await self._ask(f"x-llmux-wait: {'0' if wait == 0 else 'N'}", self._menu.any(), wait=wait)

    async def old_http(self) -> None:
        """HTTP/1.0: an answer without a length ends with its connection."""
        order = self._menu.generation(stream=True, tokens=self._few()) if self._rng.random() < 0.5 else self._menu.any()
        await self._ask("HTTP/1.0", order, version="1.0")

    async def stall(self) -> None:
        """Sends half of its body, and no more."""
        order = replace(self._menu.any(), model=None, code="body_timeout")
        half = order.body[: self._rng.randrange(min(len(order.body), STALL_BYTES))]
        await self._refused_early("stalled upload", order, self._head(order) + half)

    async def stall_head(self) -> None:
        """Sends half of its head, and no more: it is told so, and let go."""
        wire = await Wire.open(self._field.port)
        self._field.account.headless()
        try:
            await wire.send(self._part_of_a_head())
            told = await asyncio.wait_for(wire.rest(), DEADLINE_SECS)
        except (OSError, asyncio.TimeoutError) as error:
            self._field.account.note("heads that never came", repr(error))
        else:
            if not told.startswith(b"HTTP/1.1 408 ") or b'"head_timeout"' not in told:
                self._field.account.note("heads that never came", f"answered {told[:200]!r}")
        wire.close()

    def _part_of_a_head(self) -> bytes:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: llmux.test\r\nContent-Length: 10\r\n\r\n"
        return head[: self._rng.randrange(1, len(head) - 2)]

    async def send_too_much(self) -> None:
        """Says that it will send more than is allowed, and begins to."""
        order = replace(self._menu.any(), model=None, code="body_too_large")
        head = self._head(replace(order, body=b""), f"Content-Length: {MAX_BODY_BYTES + 1}")
        await self._refused_early("body too large", order, head + b" " * self._rng.randint(0, 100_000))

    async def _refused_early(self, kind: str, order: Order, data: bytes) -> None:
        """Send what will be refused although there is more to come; the connection is closed after that."""
        asked = self._field.enter(kind, order)
        wire = await Wire.open(self._field.port)
        try:
            await wire.send(data)
            answer = await asyncio.wait_for(wire.answer(order.method), DEADLINE_SECS)
        except (OSError, NoAnswer, asyncio.TimeoutError) as error:
            self._failed(asked, wire, error)
            return
        if self._field.answered(asked, answer).how is How.REFUSED:
            await self._nothing_follows(asked, wire)

    async def expect(self) -> None:
        """Sends its body only when it is told to."""
        order = self._menu.any()
        asked = self._field.enter("expect", order)
        wire = await self._connect()
        try:
            await wire.send(self._head(order, "Expect: 100-continue"))
            wanted = await asyncio.wait_for(wire.told_to_go_on(), DEADLINE_SECS)
            if wanted:
                await wire.send(order.body)
            answer = await asyncio.wait_for(wire.answer("POST"), DEADLINE_SECS)
            outcome = self._field.answered(asked, answer)
            if outcome.how is How.COMPLETE and not wanted:
                self._field.account.note("answers without a body", asked.id)
            self._keep(wire, answer)
        except (OSError, NoAnswer, asyncio.TimeoutError) as error:
            self._failed(asked, wire, error)

    async def pipeline(self) -> None:
        """Two requests in one go; the answers come in their order."""
        orders = [self._menu.any() if self._rng.random() < 0.6 else self._menu.own() for _ in range(2)]
        asked = [self._field.enter("pipelined", order) for order in orders]
        wire = await self._connect()
        try:
            await wire.send(b"".join(map(self._whole, orders)))
            while asked:
                answer = await asyncio.wait_for(wire.answer(asked[0].order.method), DEADLINE_SECS)
                self._field.answered(asked.pop(0), answer)
                if asked and not answer.keeps:
                    behind = asked.pop(0)
                    wire.close()
                    self._field.close(behind, unserved(behind.order))
                    return
            self._keep(wire, answer)
        except (OSError, NoAnswer, asyncio.TimeoutError) as error:
            for one in asked:
                self._failed(one, wire, error)

    # Those who leave

    async def leave_queued(self) -> None:
        """Gone before anything has come."""
        order = self._menu.generation(stream=self._rng.random() < 0.5, tokens=self._few())
        await self._leave("left queued", order, self._whole(order, *ONE_SHOT))

    async def leave_stream(self) -> None:
        """Gone in mid-answer."""
        order = self._menu.generation(stream=True, tokens=self._rng.randint(*LONG_STREAM))
        await self._leave(
            "left in mid-stream", order, self._whole(order, *ONE_SHOT), after=self._rng.randint(400, 4000)
        )

    async def leave_upload(self) -> None:
        """Gone in the middle of its own body."""
        order = self._menu.large() if self._rng.random() < 0.3 else self._menu.any()
        part = self._head(order) + order.body[: self._rng.randrange(len(order.body))]
        await self._leave("left in mid-upload", order, part)

    async def leave_head(self) -> None:
        """Gone before it has said who it is."""
        wire = await Wire.open(self._field.port)
        self._field.account.headless()
        try:
            await wire.send(self._part_of_a_head())
            await asyncio.sleep(self._rng.uniform(0, 0.1))
        except OSError:
            pass
        self._go(wire)

    async def half_close(self) -> None:
        """Says that it has nothing more to say, which counts as leaving."""
        order = self._menu.generation(stream=True, tokens=self._rng.randint(*LONG_STREAM))
        asked = self._field.enter("half-closed", order)
        wire = await Wire.open(self._field.port)
        try:
            await wire.send(self._whole(order, *ONE_SHOT))
            await wire.some(self._rng.choice((0, 0, 300)))
            wire.half_close()
            await asyncio.wait_for(wire.rest(), DEADLINE_SECS)
            self._field.close(asked, left(asked.order, unseen=False))
        except OSError:
            self._field.close(asked, left(asked.order, unseen=True))
        except asyncio.TimeoutError:
            self._field.close(asked, fault("its connection was not closed although it had left"))
        wire.close()

    async def _leave(self, kind: str, order: Order, data: bytes, after: int = 0) -> None:
        """Send this, read so many bytes or wait a while, and go."""
        asked = self._field.enter(kind, order)
        sent = True
        wire = await Wire.open(self._field.port)
        try:
            await wire.send(data)
            if after:
                await asyncio.wait_for(wire.some(after), DEADLINE_SECS)
            else:
                await asyncio.sleep(self._rng.choice((0.0, self._rng.uniform(0, 0.2), self._rng.uniform(0, 2))))
        except OSError:
            sent = False
        except asyncio.TimeoutError:
            wire.reset()
            self._field.close(asked, fault(f"not so much as {after} bytes in {DEADLINE_SECS:g} s"))
            return
        resets = self._go(wire)
        self._field.close(asked, left(asked.order, unseen=resets or not sent))

    def _go(self, wire: Wire) -> bool:
        """Away, politely or not; whether what was sent last may never be read."""
        if self._rng.random() < 0.5:
            wire.close()
            return False
        wire.reset()
        return True

    # One request and its answer

    async def _ask(
        self,
        kind: str,
        order: Order,
        *,
        version: str = "1.1",
        pace: Pace | None = None,
        small: bool = False,
        chunked: bool = False,
        pieces: int = 1,
        wait: float | None = None,
    ) -> Answer | None:
        """Ask, read the answer, and keep or close the connection; the answer, unless it is one that may not be."""
        asked = self._field.enter(kind, order, wait)
        wire = await (Wire.open(self._field.port, small=True) if small else self._connect())
        one_shot = self._rng.random() < 0.3
        extra = [] if wait is None else [f"x-llmux-wait: {wait:g}"]
        if version == "1.0":
            extra += [] if one_shot else ["Connection: keep-alive"]
        elif one_shot:
            extra += ONE_SHOT
        try:
            await wire.send(self._head(order, *extra, chunked=chunked, version=version))
            await self._send_body(wire, order.body, chunked, pieces)
            answer = await asyncio.wait_for(wire.answer(order.method, pace), DEADLINE_SECS)
        except (OSError, NoAnswer, asyncio.TimeoutError) as error:
            self._failed(asked, wire, error)
            return None
        outcome = self._field.answered(asked, answer)
        if one_shot and outcome.how in (How.COMPLETE, How.REFUSED):
            await self._nothing_follows(asked, wire)
        elif one_shot or (version == "1.0" and answer.headers.get("connection") != "keep-alive"):
            wire.close()
        else:
            self._keep(wire, answer)
        return None if outcome.how is How.FAULT else answer

    async def _send_body(self, wire: Wire, body: bytes, chunked: bool, pieces: int) -> None:
        size = max(1, -(-len(body) // pieces))
        for at in range(0, len(body), size):
            piece = body[at : at + size]
            await wire.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            if pieces > 1:
                await asyncio.sleep(self._rng.uniform(0, 0.2))
        if chunked:
            await wire.send(b"0\r\n\r\n")

    async def _nothing_follows(self, asked: Asked, wire: Wire) -> None:
        """After the last answer of a connection there is its end."""
        try:
            more = await asyncio.wait_for(wire.rest(), 10)
        except asyncio.TimeoutError:
            self._field.account.note("connections that were not closed", asked.id)
        else:
            if more:
                self._field.account.note("bytes after an answer", f"{asked.id}: {more[:80]!r}")
        wire.close()

    def _failed(self, asked: Asked, wire: Wire, error: BaseException) -> None:
        wire.reset()
        what = f"no answer in {DEADLINE_SECS:g} s" if isinstance(error, asyncio.TimeoutError) else repr(error)
        self._field.close(asked, fault(f"{what} (answer {wire.used + 1} of its connection)"))

    def _head(self, order: Order, *extra: str, chunked: bool = False, version: str = "1.1") -> bytes:
        lines = [f"{order.method} {order.target} HTTP/{version}", f"Host: 127.0.0.1:{self._field.port}"]
        lines += [f"x-request-id: {order.id}", *order.fields, *extra]
        if order.body:
            lines.append(f"Content-Type: {order.content_type}")
            lines.append("Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(order.body)}")
        return "\r\n".join([*lines, "", ""]).encode()

    def _whole(self, order: Order, *extra: str) -> bytes:
        return self._head(order, *extra) + order.body

    def _few(self) -> int:
        """Tokens; now and then many."""
        return self._rng.randint(*LONG_STREAM) if self._rng.random() < 0.1 else self._rng.randint(1, 20)

    # The connection that is kept

    async def _connect(self) -> Wire:
        kept, self._kept = self._kept, None
        if kept is not None:
            if time.monotonic() - self._kept_since < MOST_IDLE_SECS and self._rng.random() < 0.9:
                return kept
            kept.close()
        return await Wire.open(self._field.port)

    def _keep(self, wire: Wire, answer: Answer) -> None:
        self._drop()
        if answer.keeps:
            self._kept, self._kept_since = wire, time.monotonic()
        else:
            wire.close()

    def _drop(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None


def _pausing(secs: float) -> Pace:
    async def pause(_count: int) -> None:
        await asyncio.sleep(secs)

    return pause
