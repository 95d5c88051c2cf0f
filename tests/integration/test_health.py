"""What is wrong reaches who asks: /health, the status, `llmuxctl status`, systemd's watchdog, the metrics."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llmuxctl.output import show_status
from llmuxd.app import App, build_app
from llmuxd.config import parse_config
from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.proxy import serve_proxy
from llmuxd.runtime import Runtime
from tests.integration.stack import DEADLINE_SECS, until


def make_app(folder: Path) -> App:
    models = {name: {"model_path": f"sim/{name}"} for name in ("qwen", "mistral")}
    data = {"models": models, "vllm_command": [sys.executable, "-m", "llmuxd.sim.vllm"]}
    environ = {"LLMUX_RUNTIME_DIR": str(folder / "r"), "LLMUX_STATE_DIR": str(folder / "s")}
    return build_app(parse_config(data, "test", environ))


def test_a_stall_and_a_broken_core_are_told_over_http_and_in_the_status(tmp_path, capsys):
    stall = c.Stall("qwen", 42.3, "it is awake, and nothing is forwarded")
    stalled = "qwen has waited 42 s: it is awake, and nothing is forwarded"
    broken = "the scheduler broke over Tick: RuntimeError('oh')"

    async def run() -> None:
        app = make_app(tmp_path)
        check = app.runtime.self_check
        # Its own probes would find that nothing stalls.
        check.start = lambda: None  # type: ignore[method-assign]
        site = await serve_proxy(app.proxy, "127.0.0.1", 0)

        async def seen() -> tuple[int, str, Any, bool]:
            url = f"http://127.0.0.1:{site.port}/health"
            async with aiohttp.ClientSession() as client, client.get(url) as answer:
                told = (answer.status, (await answer.json())["status"])
            status = app.steering.status()
            show_status(json.loads(json.dumps(status)))
            return (*told, status["health"], "NOT WELL" in capsys.readouterr().out)

        try:
            assert await seen() == (200, "ok", {"ok": True, "reason": "ok"}, False)
            check.handled(e.Tick(), [c.Probed(0, (stall,))], app.runtime.clock())
            assert await seen() == (503, stalled, {"ok": False, "reason": stalled}, True)
            check.handled(e.Tick(), [c.Probed(0)], app.runtime.clock())
            assert await seen() == (200, "ok", {"ok": True, "reason": "ok"}, False)
            check.failed("Tick()", RuntimeError("oh"))
            assert await seen() == (503, broken, {"ok": False, "reason": broken}, True)
        finally:
            await site.close()
            await app.close()

    asyncio.run(run())


def test_the_table_names_the_reason(tmp_path, capsys):
    async def run() -> dict[str, Any]:
        app = make_app(tmp_path)
        app.runtime.self_check.failed("Tick()", RuntimeError("\x1b[31moh"))
        return app.steering.status()

    show_status(asyncio.run(run()))
    out = capsys.readouterr().out
    assert "\nNOT WELL: the scheduler broke over Tick: RuntimeError(" in out
    assert "\x1b" not in out


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(DEADLINE_SECS)
        self.others: list[str] = []

    def next(self) -> str:
        """The next message but for status lines and requests for more time, which are kept."""
        while (message := self._read()) in self.others:
            continue
        return message

    def until_status(self, text: str) -> None:
        """Read on until there is a status line that begins like this."""
        while not any(message.startswith(f"STATUS={text}") for message in self.others):
            self._read()

    def _read(self) -> str:
        message = self._socket.recv(4096).decode()
        if message.startswith(("STATUS=", "EXTEND_TIMEOUT_USEC=")):
            self.others.append(message)
        return message

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = Systemd(tmp_path / "notify.sock")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify.sock"))
    yield made
    made.close()


def test_a_daemon_pings_systemd_from_its_start_to_its_end(daemon, systemd, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    stack = daemon("a").start()
    assert systemd.next() == "WATCHDOG=1", "a warm-up takes longer than the watchdog waits"
    told = [systemd.next() for _ in range(30)]
    assert told.count("READY=1") == 1
    assert told.count("WATCHDOG=1") == 29
    assert stack.stop() == 0
    until(lambda: systemd.next() == "STOPPING=1", "it says that it stops")


def test_without_a_watchdog_there_are_no_pings(daemon, systemd, monkeypatch):
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    stack = daemon("a").start()
    stack.ask("a")
    assert stack.stop() == 0
    assert [systemd.next(), systemd.next()] == ["READY=1", "STOPPING=1"]


def test_the_status_line_says_what_is_going_on(daemon, systemd):
    stack = daemon("a", "b").start()
    systemd.until_status("awake: none")
    assert "EXTEND_TIMEOUT_USEC=30000000" in systemd.others, "it may take its time to start"
    stack.ask("b")
    stack.ask("a")
    systemd.until_status("awake: a; asleep: 1")
    stack.ctl("pin", "a")
    systemd.until_status("awake: a; asleep: 1; pinned: a")


def test_a_reload_is_told(daemon, systemd):
    stack = daemon("a").start()
    assert systemd.next() == "READY=1"
    assert stack.ctl("reload").returncode == 0
    stack.process.send_signal(signal.SIGHUP)
    reloading = systemd.next()
    assert reloading.startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert systemd.next() == "READY=1"


def test_without_models_it_waits_quietly(daemon, systemd):
    stack = daemon().start()
    systemd.until_status("no models are configured: add some to the config and reload")
    assert stack.get("/v1/models").json["data"] == []
    assert stack.get("/health").status == 200
    assert stack.ask("a").status == 404


def test_a_handover_is_told_as_a_stop(daemon, systemd):
    stack = daemon("a").start()
    assert systemd.next() == "READY=1"
    stack.process.send_signal(signal.SIGUSR2)
    assert systemd.next() == "STOPPING=1"
    assert stack.process.wait(20) == 75


def test_a_watchdog_that_is_meant_for_another_process_is_left_alone(daemon, systemd, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    stack = daemon("a").start()
    stack.ask("a")
    assert stack.stop() == 0
    assert [systemd.next(), systemd.next()] == ["READY=1", "STOPPING=1"]


def test_paused_requests_are_counted_while_their_engine_sleeps(tmp_path):
    async def run() -> None:
        models = {name: {"model_path": "p"} for name in "ab"}
        policy = {"policy_type": "fifo", "min_active_secs": 0, "in_flight": "park"}
        clock = [100.0]
        runtime = Runtime(
            parse_config({"models": models, "policy": policy}, "test", {"LLMUX_RUNTIME_DIR": str(tmp_path)}),
            clock=lambda: clock[0],
        )
        runtime._operate = lambda command: None  # type: ignore[method-assign]

        def parked() -> list[float | None]:
            read = runtime.metrics.registry.get_sample_value
            return [read("llmux_parked", {"model": name}) for name in "ab"]

        def op(name: str) -> int:
            return runtime.switcher.state.models[name].op

        tickets = [runtime.gate.submit("a") for _ in range(2)]
        runtime.post(e.EngineStarted("a", op("a")))
        assert parked() == [0, 0], "in flight, and awake"
        runtime.gate.submit("b")
        while runtime.switcher.state.models["a"].state.value == "awake":
            clock[0] += 1.0
            runtime.post(e.Tick())
            assert clock[0] < 200
        runtime.post(e.EngineSlept("a", op("a")))
        assert parked() == [2, 0]
        tickets[0].left()
        assert parked() == [1, 0]
        if runtime._timer is not None:
            runtime._timer.cancel()

    asyncio.run(run())
