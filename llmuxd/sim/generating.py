"""The APIs that generate: completions, chat completions, messages, responses, tokens. Whole or as a stream."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from aiohttp import web

from llmuxd.sim import asked as ask
from llmuxd.sim.answers import Refused, length_of
from llmuxd.sim.asked import Asked
from llmuxd.sim.engine import Aborted, DiedTelling, EngineDead
from llmuxd.sim.forms import Form, form_of
from llmuxd.sim.responses import Kept, Responses
from llmuxd.sim.wire import Context, gone, json_body, reply, stream

Left = Callable[[], bool]


async def generate(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST to any of them but responses."""
    body = await json_body(request)
    asked = ask.read(request.path, body, request.headers.get("X-Request-Id"), context.engine.options)
    return await _answer(context, request, form_of(asked))


async def invoke(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /invocations: the API is told by what the body has."""
    body = await json_body(request)
    path = ask.CHAT if "messages" in body else ask.COMPLETIONS
    asked = ask.read(path, body, request.headers.get("X-Request-Id"), context.engine.options)
    return await _answer(context, request, form_of(asked))


async def count_tokens(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /v1/messages/count_tokens."""
    body = await json_body(request)
    ask.check(request.path, body)
    ask.model_of(body["model"], context.engine.options)
    count = length_of(ask.prompt_of(request.path, body))
    return reply({"input_tokens": count, "context_management": {"original_input_tokens": count}})


async def generate_tokens(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /inference/v1/generate."""
    refuse_scale_out(context)
    return await generate(context, request)


async def disabled(context: Context, _request: web.BaseRequest) -> web.StreamResponse:
    """The other endpoints of scale-out, which are not there even where that is enabled."""
    refuse_scale_out(context)
    raise Refused("not simulated", 501, "NotImplementedError")


def refuse_scale_out(context: Context) -> None:
    """Raises Refused where scale-out is not enabled."""
    if not context.engine.options.scale_out:
        message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
        raise Refused(message, 403, "PermissionDeniedError")


# Responses


async def create_response(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /v1/responses."""
    body = await json_body(request)
    options, store = context.engine.options, context.store
    form = Responses(ask.read(ask.RESPONSES, body, None, options))
    background, keep = bool(body.get("background")), body.get("store", True) and options.responses_store
    if background and not keep:
        message = "background needs a kept response: `store`, and VLLM_ENABLE_RESPONSES_API_STORE=1 of the server."
        raise Refused(message, 400, "invalid_request_error", "background")
    if body.get("previous_response_id") is not None:
        store.get(body["previous_response_id"])
    if not background:
        return await _answer(context, request, form, store.keep if keep else None)
    kept = store.keep(form.response("queued"))
    kept.streamed = form.asked.streams
    store.run(kept, _in_background(context, form, kept))
    if kept.streamed:
        return await stream(context, request, store.follow(kept, 0))
    return reply(kept.response)


async def _in_background(context: Context, form: Responses, kept: Kept) -> None:
    def stays() -> bool:
        return False

    # With its engine dead a response stays as it is.
    with contextlib.suppress(EngineDead):
        if not kept.streamed:
            context.store.keep(await _whole(context, form, stays))
            return
        async with contextlib.aclosing(_events(context, form, stays, context.store.keep)) as events:
            async for event in events:
                kept.events += (part + b"\n\n" for part in event.split(b"\n\n")[:-1])
                kept.changed.set()


async def show_response(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As GET /v1/responses/{response_id}."""
    kept = context.store.get(request.path.split("/")[3])
    if request.query.get("stream", "false").lower() not in ("true", "1"):
        return reply(kept.response)
    after = int(request.query.get("starting_after", "-1"))
    return await stream(context, request, context.store.follow(kept, after + 1) if kept.streamed else _broken())


async def _broken() -> AsyncGenerator[bytes, None]:
    """vLLM finds that there are no events when it has sent the head."""
    events: list[bytes] = []
    for event in events:
        yield event
    raise EngineDead


async def cancel_response(context: Context, request: web.BaseRequest) -> web.StreamResponse:
    """As POST /v1/responses/{response_id}/cancel."""
    return reply(await context.store.cancel(request.path.split("/")[3]))


# All

Keep = Callable[[dict[str, Any]], Any]


async def _answer(
    context: Context, request: web.BaseRequest, form: Form, keep: Keep | None = None
) -> web.StreamResponse:
    if form.asked.streams and form.asked.path != ask.BATCH:
        return await stream(context, request, _events(context, form, gone(request), keep))
    answer = await _whole(context, form, gone(request))
    if keep is not None:
        keep(answer)
    return reply(answer)


async def _whole(context: Context, form: Form, left: Left) -> dict[str, Any]:
    texts, finish = [], form.asked.finish
    for index in range(len(form.asked.prompts)):
        tokens: list[str] = []
        texts.append(tokens)
        try:
            async with contextlib.aclosing(_texts(context, form.asked, index, left, False)) as made:
                async for text in made:
                    tokens.append(text)
        except Aborted:
            finish = "abort"
    return form.whole(texts, finish)


async def _events(context: Context, form: Form, left: Left, keep: Keep | None) -> AsyncGenerator[bytes, None]:
    if opening := form.opening():
        yield opening
    try:
        for index in range(len(form.asked.prompts)):
            finish = form.asked.finish
            try:
                async with contextlib.aclosing(_texts(context, form.asked, index, left, True)) as made:
                    async for text in made:
                        yield form.token(index, text)
            except Aborted:
                finish = "abort"
            if left():
                return
            yield form.close_choice(index, finish)
    except DiedTelling:
        death = form.death()
        if death is None:
            raise
        yield death
        return
    last = form.closing()
    if keep is not None and isinstance(form, Responses):
        keep(form.ended)
    yield last


async def _texts(context: Context, asked: Asked, index: int, left: Left, streamed: bool) -> AsyncGenerator[str, None]:
    """The tokens of one choice, or the pieces of what its tool is called with."""
    pieces = asked.pieces() if asked.tool else None
    count = asked.count if pieces is None else len(pieces)
    speaker = asked.model if asked.model in context.engine.options.loras else ""
    generation = context.engine.generate(asked.prompts[index], count, left, speaker=speaker, streamed=streamed)
    async with contextlib.aclosing(generation) as tokens:
        if pieces is None:
            async for token in tokens:
                yield token
        else:
            following = iter(pieces)
            async for _ in tokens:
                yield next(following)
