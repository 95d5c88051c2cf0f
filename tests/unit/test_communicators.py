"""Which of vLLM's methods take the ties between ranks down and build them again, and what is said where there is none."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from llmuxd.core.events import FailureKind
from llmuxd.engine.communicators import rebuild, tear_down
from llmuxd.engine.errors import EngineError
from tests.unit.engine_server import api_of

MISSING = "Call to collective_rpc method failed: 'Worker' object has no attribute 'suspend_nccl'"


def called(folder: Path, version: str | None, refusal: str = "") -> list[str]:
    """The methods that a server is asked for, one after the other, by both; it refuses all if told so."""
    methods = []

    async def answer(request: web.Request) -> web.Response:
        methods.append((await request.json())["method"])
        if refusal:
            return web.json_response({"error": {"message": refusal}}, status=500)
        return web.json_response({"results": [None, None]})

    async def scenario() -> None:
        app = web.Application()
        app.router.add_post("/collective_rpc", answer)
        async with api_of(app, folder) as api:
            await tear_down(api, version)
            await rebuild(api, version)

    asyncio.run(scenario())
    return methods


@pytest.mark.parametrize("version", ["0.32.0", "1.0"])
def test_a_vllm_that_can_do_it_itself(tmp_path: Path, version: str) -> None:
    assert called(tmp_path, version) == ["checkpoint_prepare", "checkpoint_restore"]


@pytest.mark.parametrize("version", ["0.31.2", None])
def test_a_patched_vllm(tmp_path: Path, version: str | None) -> None:
    assert called(tmp_path, version) == ["suspend_nccl", "resume_nccl"]


def test_a_vllm_without_the_patch_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"vLLM 0\.31\.2 .*take 0\.32 or newer.*no attribute") as caught:
        called(tmp_path, "0.31.2", MISSING)
    assert caught.value.kind is FailureKind.REFUSED


def test_no_memory_is_not_taken_for_a_missing_method(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        called(tmp_path, "0.31.2", "CUDA out of memory")
    assert caught.value.kind is FailureKind.OUT_OF_MEMORY
    assert "take 0.32" not in caught.value.reason


def test_a_method_that_fails_where_it_is_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="answered 500: no such rank") as caught:
        called(tmp_path, "0.32.0", "no such rank")
    assert "take 0.32" not in caught.value.reason
