"""A server that an engine's API is tried on: each test says what it answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from llmuxd.engine.api import VllmApi
from llmuxd.engine.spec import Endpoint


@asynccontextmanager
async def api_of(app: web.Application, folder: Path) -> AsyncIterator[VllmApi]:
    """The API of a model `m` whose engine is this application, on a socket in the folder."""
    runner = web.AppRunner(app)
    await runner.setup()
    socket = folder / "s"
    await web.UnixSite(runner, str(socket)).start()
    api = VllmApi(Endpoint(uds=socket), "m")
    try:
        yield api
    finally:
        await api.close()
        await runner.cleanup()
