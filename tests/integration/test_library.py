"""The stack inside another program, as docs/library.md shows it."""

from __future__ import annotations

import asyncio
import sys

import aiohttp

import llmuxd
from llmuxd import build_app, parse_config, run_warmup
from llmuxd.proxy import serve_proxy


def test_a_program_builds_warms_serves_and_closes_the_stack(tmp_path):
    environ = {"LLMUX_RUNTIME_DIR": str(tmp_path / "r"), "LLMUX_STATE_DIR": str(tmp_path / "s")}
    env = {"LLMUX_SIM_SCALE": "0"}
    models = {name: {"model_path": f"sim/{name}", "env": env} for name in ("a", "b")}
    command = [sys.executable, "-m", "llmuxd.sim.vllm"]
    config = parse_config(
        {"models": models, "vllm_command": command, "policy": {"min_active_secs": 0}}, "test", environ
    )

    async def run() -> tuple[list[str], list[int]]:
        app = build_app(config)
        assert app.metrics is not None
        try:
            await run_warmup(app)
            assert {m["engine"] for m in app.steering.status()["models"].values()} == {"asleep"}
            site = await serve_proxy(app.proxy, "127.0.0.1", 0)
            answers = []
            async with aiohttp.ClientSession() as client:
                for model in "abba":
                    url = f"http://127.0.0.1:{site.port}/v1/completions"
                    async with client.post(url, json={"model": model, "prompt": "x"}) as answer:
                        answers.append((await answer.json())["model"])
            await site.close()
            return answers, [engine.pid for engine in app.runtime.engines.values()]
        finally:
            await app.close()
            assert not any(engine.pid for engine in app.runtime.engines.values())

    answers, pids = asyncio.run(run())
    assert answers == ["a", "b", "b", "a"]
    assert all(pids)


def test_every_name_of_the_library_is_there():
    for name in llmuxd.__all__:
        assert getattr(llmuxd, name) is not None
