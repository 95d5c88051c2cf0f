"""Which calls are made, and in which order, to vLLMs that differ: over scripted servers as real processes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmuxd.core.events import FailureKind
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.engine import Engine, EngineError
from tests.integration.engine_bench import OFFLOAD, START_SECS, Bench, until

SERVER = """
import json, os, sys
from aiohttp import web

answers = json.loads(os.environ["ANSWERS"])

async def answer(request):
    print("CALL", request.method, request.path_qs, (await request.text())[:60], flush=True)
    found = answers.get(request.path, [404, {"detail": "Not Found"}])
    flag, sick = answers.get("SICK", ["", None])
    if request.path == "/health" and os.path.exists(flag):
        found = sick
    if len(found) > 2:
        print(found[2], flush=True)
    if isinstance(found[1], str):
        return web.Response(status=found[0], text=found[1])
    return web.json_response(found[1], status=found[0])

app = web.Application()
app.router.add_route("*", "/{path:.*}", answer)
web.run_app(app, path=sys.argv[sys.argv.index("--uds") + 1], print=None, access_log=None)
"""

NEW = {
    "/health": [200, ""],
    "/version": [200, {"version": "0.32.0"}],
    "/is_sleeping": [200, {"is_sleeping": True}],
    "/sleep": [200, {"status": "sleeping"}],
    "/wake_up": [200, {"status": "sleeping"}],
    "/collective_rpc": [200, {"results": [None]}],
}
OLD = {**NEW, "/version": [200, {"version": "0.16.1"}], "/sleep": [200, ""], "/wake_up": [200, ""]}
POLICIES = {weights: EvictionPolicy.parse(f"{weights}+keep_running") for weights in ("retain", "offload", "discard")}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def scripted(bench: Bench, answers: dict[str, Any], name: str = "m") -> Engine:
    env = {"ANSWERS": json.dumps(answers)}
    return bench.engine(name, vllm_command=(sys.executable, "-c", SERVER), env=env)


def calls(engine: Engine) -> list[str]:
    """The calls that the server saw, in their order, those that only ask left out."""
    lines = [line[5:].strip() for line in engine.log_path.read_text().splitlines() if line.startswith("CALL ")]
    return [line for line in lines if line.startswith("POST")]


@pytest.mark.parametrize(
    ("weights", "new", "old"),
    [
        ("retain", ["POST /sleep?level=0&mode=keep"], []),
        ("offload", ["POST /sleep?level=1&mode=keep"], ["POST /sleep?level=1"]),
        ("discard", ["POST /sleep?level=2&mode=keep"], ["POST /sleep?level=2"]),
    ],
)
def test_sleep_by_what_the_version_knows(bench: Bench, weights: str, new: list[str], old: list[str]) -> None:
    newer, older = scripted(bench, NEW, "new"), scripted(bench, OLD, "old")

    async def test() -> None:
        for engine in (newer, older):
            info = await engine.start(1, START_SECS)
            assert info.can_park is (engine is newer)
            await engine.sleep(POLICIES[weights], "keep", 10)

    bench.run(test)
    assert calls(newer) == new
    assert calls(older) == old


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("retain", ["POST /wake_up"]),
        ("offload", ["POST /wake_up"]),
        (
            "discard",
            [
                "POST /wake_up?tags=weights",
                'POST /collective_rpc {"method": "reload_weights"}',
                "POST /wake_up?tags=kv_cache",
            ],
        ),
    ],
)
def test_waking_reverses_what_was_done(bench: Bench, weights: str, expected: list[str]) -> None:
    engine = scripted(bench, {**NEW, "/is_sleeping": [200, {"is_sleeping": False}]})

    async def test() -> None:
        await engine.start(1, START_SECS)
        await engine.wake(POLICIES[weights], 10)

    bench.run(test)
    assert calls(engine) == expected


def test_a_failed_reload_wakes_nothing_more(bench: Bench) -> None:
    engine = scripted(bench, {**NEW, "/collective_rpc": [500, {"error": {"message": "no such file"}}]})

    async def test() -> None:
        await engine.start(1, START_SECS)
        with pytest.raises(EngineError, match="/collective_rpc answered 500: no such file"):
            await engine.wake(POLICIES["discard"], 10)

    bench.run(test)
    assert "POST /wake_up?tags=kv_cache" not in calls(engine), "requests would run on weights that are not there"


def test_a_wake_that_is_none(bench: Bench) -> None:
    engine = scripted(bench, NEW)

    async def test() -> None:
        await engine.start(1, START_SECS)
        with pytest.raises(EngineError, match="but the engine is asleep") as caught:
            await engine.wake(OFFLOAD, 10)
        assert caught.value.kind is FailureKind.LIED

    bench.run(test)


def test_without_development_endpoints_nothing_can_sleep(bench: Bench) -> None:
    engine = scripted(bench, {"/health": [200, ""], "/version": [200, {"version": "0.32.0"}]})

    async def test() -> None:
        info = await engine.start(1, START_SECS)
        assert not info.can_sleep
        with pytest.raises(EngineError) as caught:
            await engine.sleep(OFFLOAD, "keep", 10)
        assert caught.value.kind is FailureKind.REFUSED

    bench.run(test)
    assert calls(engine) == []


def test_a_reason_that_is_only_in_the_log(bench: Bench) -> None:
    failed = [500, "Internal Server Error", "ERROR CUDA Error: out of memory at csrc/cumem_allocator.cpp:62"]
    engine = scripted(bench, {**NEW, "/wake_up": failed})

    async def test() -> None:
        await engine.start(1, START_SECS)
        with pytest.raises(EngineError) as caught:
            await engine.wake(OFFLOAD, 10)
        assert caught.value.kind is FailureKind.OUT_OF_MEMORY

    bench.run(test)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (
            {"/openapi.json": [200, {"paths": {"/v1/embeddings": {}}}], "/v1/embeddings": [200, {}]},
            ["/v1/embeddings"],
        ),
        (
            {"/v1/completions": [400, {"error": {"message": "does not support"}}], "/pooling": [200, {}]},
            ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/pooling"],
        ),
    ],
)
def test_the_first_inference_is_of_the_kind_the_model_does(
    bench: Bench, answers: dict[str, Any], expected: list[str]
) -> None:
    engine = scripted(bench, {**NEW, **answers})

    async def test() -> None:
        await engine.start(1, START_SECS)
        await engine.infer(10)

    bench.run(test)
    assert [call.split()[1] for call in calls(engine)] == expected


def test_a_first_inference_that_fails(bench: Bench) -> None:
    engine = scripted(bench, {**NEW, "/v1/completions": [500, {"error": {"message": "boom"}}]})

    async def test() -> None:
        await engine.start(1, START_SECS)
        with pytest.raises(EngineError, match="/v1/completions answered 500: boom"):
            await engine.infer(10)

    bench.run(test)


@pytest.mark.parametrize(("status", "dies"), [(503, True), (500, False), (429, False)])
def test_what_health_answers(bench: Bench, status: int, dies: bool) -> None:
    """The process is whole: it is its answers alone that say so."""
    flag = bench.folder / "flag"
    engine = scripted(bench, {**NEW, "SICK": [str(flag), [status, ""]]})

    async def test() -> None:
        await engine.start(1, START_SECS)
        flag.touch()
        began = time.monotonic()
        assert await until(lambda: bool(bench.deaths), 5 if dies else 1.5) is dies
        if dies:
            assert bench.died_at[0] - began < 1.0
            assert bench.deaths == [(1, "/health answers 503: its EngineCore is dead")]

    bench.run(test)
