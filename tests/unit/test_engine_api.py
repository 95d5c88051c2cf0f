"""The daemon's own calls to an engine that it has nothing more to do with."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llmuxd.engine import EngineError
from llmuxd.engine.api import Health, VllmApi
from llmuxd.engine.spec import Endpoint


def test_a_call_after_the_end_fails_like_any_other():
    async def call() -> None:
        api = VllmApi(Endpoint(uds=Path("/nonexistent/a.sock")), "a")
        await api.close()
        assert await api.health(1.0) is Health.UNKNOWN
        with pytest.raises(EngineError, match="the engine was let go"):
            await api.infer()

    asyncio.run(call())
