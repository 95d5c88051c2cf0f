"""The APIs for speech: transcriptions and translations of a file that is sent, and the realtime WebSocket."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from aiohttp import WSMsgType, web

from llmuxd.sim import answers
from llmuxd.sim import asked as ask
from llmuxd.sim.answers import DONE, Invalid, Refused, event, new_id
from llmuxd.sim.engine import Aborted, DiedTelling, EngineDead
from llmuxd.sim.wire import Context, gone, headers, reply, stream

TOKENS = 4
"""Of a file's text."""

CHUNK_TOKENS = 2
"""Of a chunk of live sound."""

BYTES_PER_SEC = 32_000
"""16-bit samples at 16 kHz."""

FORMATS = ("text", "json", "verbose_json", "diarized_json")


async def transcribe(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST to /v1/audio/transcriptions or /v1/audio/translations."""
    form = await request.post()
    upload = form.get("file")
    if not isinstance(upload, web.FileField):
        raise Invalid("1 validation error:\n  {'type': 'missing', 'loc': 'body.file'}", "body.file")
    model = ask.model_of(form.get("model"), context.engine.options)
    form_of_answer, streamed = form.get("response_format", "json"), form.get("stream") in ("true", "True", "1")
    if form_of_answer not in FORMATS:
        raise Refused("Currently only support response_format: `text`, `json`, `verbose_json` or `diarized_json`")
    if form_of_answer in ("verbose_json", "diarized_json") and streamed:
        raise Refused(f"{form_of_answer} format doesn't support streaming case")
    content = upload.file.read()
    is_translation = request.path.endswith("translations")
    task = "translate" if is_translation else "transcribe"
    prompt = f"{task} {hashlib.sha256(content).hexdigest()}"
    if streamed:
        wants_usage = form.get("stream_include_usage") in ("true", "True", "1")
        chunk = {
            "id": f"{task}-{request.headers.get('X-Request-Id') or new_id()}",
            "object": "translation.chunk" if is_translation else "transcription.chunk",
            "created": int(time.time()),
            "model": model,
        }
        return await stream(context, request, _events(context, request, prompt, chunk, wants_usage))
    text = "".join([token async for token in context.engine.generate(prompt, TOKENS, gone(request))])
    # OpenAI's text format is the bare text; vLLM answers it in JSON, too.
    answer: dict[str, Any] = {"text": text, "bytes": len(content)}
    seconds = len(content) / BYTES_PER_SEC
    if form_of_answer in ("verbose_json", "diarized_json"):
        answer |= {"duration": seconds, "language": form.get("language", "en"), "segments": [], "words": None}
    elif not is_translation:
        answer["usage"] = {"type": "duration", "seconds": int(seconds) + 1}
    return reply(answer)


async def _events(
    context: Context, request: web.BaseRequest, prompt: str, chunk: dict[str, Any], wants_usage: bool
) -> AsyncGenerator[bytes, None]:
    count, finish = 0, "stop"
    generation = context.engine.generate(prompt, TOKENS, gone(request), streamed=True)
    try:
        async with contextlib.aclosing(generation) as tokens:
            async for token in tokens:
                count += 1
                yield event({**chunk, "choices": [{"delta": {"content": token}}]})
    except Aborted:
        finish = "abort"
    except DiedTelling:
        yield answers.death()
        return
    yield event({**chunk, "choices": [{"delta": {"content": ""}, "finish_reason": finish, "stop_reason": None}]})
    if wants_usage:
        yield event({**chunk, "choices": [], "usage": answers.usage(1, count)})
    yield DONE


async def realtime(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As the WebSocket /v1/realtime."""
    socket = web.WebSocketResponse()
    socket.headers.update(headers(context, request))
    await socket.prepare(request)
    session = _Session(context, request, socket)
    try:
        await session.run()
    except ConnectionError:
        pass
    finally:
        await session.close()
    return socket


class _Session:
    """One connection: chunks of sound in, text out."""

    def __init__(self, context: Context, request: web.BaseRequest, socket: web.WebSocketResponse) -> None:
        self._context = context
        self._request = request
        self._socket = socket
        self._model = ""
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._work: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until the client leaves."""
        await self._send("session.created", id=f"sess-{new_id()}", created=int(time.time()))
        async for message in self._socket:
            if message.type is not WSMsgType.TEXT:
                return
            try:
                said = json.loads(message.data)
                await self._handle(said)
            except json.JSONDecodeError:
                await self._fail("Invalid JSON", "invalid_json")
            except (AttributeError, KeyError, TypeError) as error:
                await self._fail(repr(error), "processing_error")

    async def close(self) -> None:
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait([self._work])

    async def _send(self, kind: str, **more: Any) -> None:
        await self._socket.send_str(answers.dumps({"type": kind, **more}).decode())

    async def _fail(self, message: str, code: str) -> None:
        await self._send("error", error=message, code=code)

    async def _handle(self, said: dict[str, Any]) -> None:
        kind = said.get("type")
        if kind == "session.update":
            await self._update(said.get("model"))
        elif kind == "input_audio_buffer.append":
            try:
                chunk = base64.b64decode(said["audio"])
            except binascii.Error:
                chunk = b""
            if not chunk:
                await self._fail("Invalid audio data", "invalid_audio")
                return
            self._chunks.put_nowait(chunk)
        elif kind == "input_audio_buffer.commit":
            await self._commit(bool(said.get("final")))
        else:
            await self._fail(f"Unknown event type: {kind}", "unknown_event")

    async def _update(self, name: Any) -> None:
        if name is None:
            await self._fail("Missing required field: model", "invalid_event")
            return
        try:
            self._model = ask.model_of(name, self._context.engine.options)
        except Refused as error:
            await self._fail(str(error), "model_not_found")

    async def _commit(self, final: bool) -> None:
        """The first one starts the transcription, the final one ends it."""
        if not self._model:
            message = "Model not validated. Make sure to validate the model by sending a session.update event."
            await self._fail(message, "model_not_validated")
        elif final:
            self._chunks.put_nowait(None)
        elif self._work is None or self._work.done():
            self._work = asyncio.create_task(self._transcribe())

    async def _transcribe(self) -> None:
        """One utterance, its text growing chunk by chunk."""
        text, count, before = "", 0, 0
        try:
            while (chunk := await self._chunks.get()) is not None:
                before += 1
                prompt = hashlib.sha256(chunk).hexdigest()
                async for token in self._context.engine.generate(prompt, CHUNK_TOKENS, gone(self._request)):
                    # The first token of each chunk is the model's name.
                    delta = f" {token}" if text and not token.startswith(" ") else token
                    await self._send("transcription.delta", delta=delta)
                    text, count = text + delta, count + 1
            await self._send("transcription.done", text=text, usage=answers.usage(before, count))
        except (Aborted, EngineDead) as error:
            await self._fail(answers.DEAD if isinstance(error, EngineDead) else "aborted", "processing_error")
