"""Answers that take as long as what they tell of: steps of an operation, events, a log that is followed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

log = logging.getLogger("llmuxd.control")

GONE_POLL_SECS = 0.5


async def stream(request: web.Request, content_type: str, chunks: AsyncGenerator[bytes, None]) -> web.StreamResponse:
    """Answer with `chunks` as they come, until they end or the client is gone; they are closed either way.

    A failure after the beginning cannot be told with a status any more: the answer breaks off, without its end.
    """
    response = web.StreamResponse(headers={"Content-Type": content_type})
    watch = asyncio.create_task(_cancel_when_gone(request, asyncio.current_task()))
    try:
        async with aclosing(chunks):
            await response.prepare(request)
            async for chunk in chunks:
                await response.write(chunk)
    except ConnectionError:
        log.debug("%s: the client went away", request.path)
    except Exception:
        log.exception("%s %s", request.method, request.path)
        if request.transport is not None:
            request.transport.close()
    finally:
        watch.cancel()
    return response


async def _cancel_when_gone(request: web.Request, handler: asyncio.Task[object] | None) -> None:
    # aiohttp says that the client went away when something is written, and there may be nothing to write for hours.
    while request.transport is not None and not request.transport.is_closing():  # noqa: ASYNC110
        await asyncio.sleep(GONE_POLL_SECS)
    if handler is not None:
        handler.cancel()
