"""A core that breaks, an audit that breaks, an engine that cannot be reached: nobody hangs, and it is told."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from llmuxd.app import build_app
from llmuxd.config import Config, parse_config
from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.operator import Operator
from llmuxd.core.requests import Requests
from llmuxd.core.switcher import Switcher
from llmuxd.core.switching import Switching
from llmuxd.gate import Refused
from llmuxd.proxy import serve_proxy
from llmuxd.runtime import JobResult, Runtime
from llmuxd.service import Service

SOON_SECS = 5.0


def config(folder: Path, **more: Any) -> Config:
    env = {"LLMUX_SIM_SCALE": "0"}
    data = {
        "models": {name: {"model_path": f"sim/{name}", "env": env} for name in "ab"},
        "vllm_command": [sys.executable, "-m", "llmuxd.sim.vllm"],
        "metrics_port": 0,
        **more,
    }
    return parse_config(data, "test", {"LLMUX_RUNTIME_DIR": str(folder / "r"), "LLMUX_STATE_DIR": str(folder / "s")})


def boom(*_: object) -> Any:
    raise ZeroDivisionError("oh")


async def soon(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, SOON_SECS)


def with_runtime(folder: Path, test: Callable[[Runtime], Awaitable[Any]]) -> Any:
    """Run a test with a runtime whose engines are never started."""

    async def run() -> Any:
        runtime = Runtime(config(folder))
        runtime._operate = lambda command: None  # type: ignore[method-assign]
        return await soon(test(runtime))

    return asyncio.run(run())


def test_the_client_whose_request_broke_the_core_is_answered_and_the_next_is_served(tmp_path, monkeypatch):
    async def test(runtime: Runtime) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(Requests, "_arrived", boom)
            ticket = runtime.gate.submit("a")
        with pytest.raises(Refused, match=r"^internal error$") as refused:
            await ticket.admitted()
        assert (refused.value.status, refused.value.code) == (500, "internal_error")
        assert not runtime.gate.holds(ticket)
        runtime.gate.submit("a")
        assert runtime.switcher.state.queued == 1

    with_runtime(tmp_path, test)


def test_a_request_that_the_core_had_taken_in_when_it_broke_is_taken_out_again(tmp_path, monkeypatch):
    async def test(runtime: Runtime) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(Switching, "advance", boom)
            ticket = runtime.gate.submit("a")
            assert len(runtime.switcher.state.requests) == 0
        with pytest.raises(Refused):
            await ticket.admitted()

    with_runtime(tmp_path, test)


def test_an_operator_whose_word_broke_the_core_is_told(tmp_path, monkeypatch):
    async def test(runtime: Runtime) -> JobResult:
        monkeypatch.setattr(Operator, "dispatch", boom)
        return await runtime.begin_job(lambda job: e.OperatorWake(job, "a"))

    result = with_runtime(tmp_path, test)
    assert result == JobResult(False, "internal error: ZeroDivisionError('oh')")


def test_an_illegal_word_is_answered_and_breaks_nothing(tmp_path):
    async def test(runtime: Runtime) -> None:
        result = await runtime.begin_job(lambda job: e.OperatorWake(job, "nobody"))
        assert result == JobResult(False, "no model 'nobody'")
        assert runtime.health() == (True, "ok")

    with_runtime(tmp_path, test)


def test_a_command_that_cannot_be_begun_does_not_keep_the_others(tmp_path, monkeypatch, caplog):
    async def test(runtime: Runtime) -> None:
        begun: list[c.Command] = []
        right = runtime._begin

        def begin(command: c.Command) -> None:
            if isinstance(command, c.SwitchBegan):
                boom()
            begun.append(command)
            right(command)

        monkeypatch.setattr(runtime, "_begin", begin)
        runtime.gate.submit("a")
        assert [command.model for command in begun if isinstance(command, c.StartEngine)] == ["a"]
        assert runtime.health() == (False, "the scheduler broke over SwitchBegan: ZeroDivisionError('oh')")

    with_runtime(tmp_path, test)
    assert "It was SwitchBegan(switch=1, target='a'" in caplog.text


def test_a_forward_that_cannot_be_begun_is_answered(tmp_path):
    async def test(runtime: Runtime) -> None:
        ticket = runtime.gate.submit("a")
        runtime.engines = {}
        runtime.post(e.EngineStarted("a", runtime.switcher.state.models["a"].op))
        with pytest.raises(Refused, match="internal error"):
            await ticket.admitted()

    with_runtime(tmp_path, test)


def test_deadlines_that_break_are_told(tmp_path, monkeypatch):
    async def test(runtime: Runtime) -> tuple[bool, str]:
        monkeypatch.setattr(Switcher, "next_deadline", property(boom))
        runtime.post(e.Tick())
        return runtime.health()

    assert with_runtime(tmp_path, test) == (
        False,
        "the scheduler broke over its deadlines: ZeroDivisionError('oh')",
    )


def test_the_first_break_is_the_reason_and_is_logged_with_its_event(tmp_path, monkeypatch, caplog):
    async def test(runtime: Runtime) -> tuple[bool, str]:
        monkeypatch.setattr(Requests, "_arrived", boom)
        for _ in range(3):
            runtime.gate.submit("a")
        monkeypatch.setattr(Operator, "dispatch", boom)
        runtime.post(e.SetMode(True))
        runtime.self_check.handled(e.Tick(), [c.Forward(9, "a", 0.0, 0.0)], runtime.clock())
        return runtime.self_check.alive()

    assert with_runtime(tmp_path, test) == (
        False,
        "the scheduler broke over RequestArrived: ZeroDivisionError('oh')",
    )
    assert caplog.text.count("broke over RequestArrived") == 1
    assert "It was RequestArrived(request=1, model='a', patient=False, most_wait=None, priority=0)" in caplog.text
    assert "broke over SetMode" in caplog.text
    assert "invariant" not in caplog.text, "a core that is known to be broken is not audited"


def test_an_audit_that_breaks_stops_nothing(tmp_path, monkeypatch, caplog):
    async def test(runtime: Runtime) -> tuple[bool, str]:
        monkeypatch.setattr(runtime.self_check._auditor, "observe", boom)
        for _ in range(3):
            runtime.gate.submit("a")
        assert runtime.switcher.state.models["a"].state.value == "starting"
        return runtime.health()

    assert with_runtime(tmp_path, test) == (True, "ok")
    assert caplog.text.count("the audit broke over RequestArrived") == 1


def test_a_policy_that_fails_with_every_event_is_counted_and_told_once_a_minute(tmp_path, caplog):
    async def test(runtime: Runtime) -> None:
        class Bad:
            name = "bad"

            def bound(self, _typical: float) -> None:
                return None

            def decide(self, _snapshot: object) -> Any:
                boom()

        runtime.switcher._switching.policy = Bad()
        began, failure = runtime.clock(), c.PolicyFailed("bad", "oh")
        for seconds in (0, 1, 59, 61):
            runtime.self_check.handled(e.Tick(), [failure], began + seconds)
            runtime._begin(failure)
        runtime.gate.submit("a")
        read = runtime.metrics.registry.get_sample_value
        assert read("llmux_policy_failures_total", {"policy": "bad"}) == 5
        assert runtime.switcher.state.models["a"].state.value == "starting", "fifo decided"

    with_runtime(tmp_path, test)
    said = [record for record in caplog.records if "fifo decided: oh" in record.message]
    assert len(said) == 2
    assert {record.levelno for record in said} == {logging.ERROR}


@pytest.mark.parametrize("timeout", [0.0, 0.2])
def test_engines_are_stopped_even_if_the_core_breaks_over_its_shutdown(tmp_path, monkeypatch, timeout):
    async def run() -> None:
        app = build_app(config(tmp_path, stop_timeout_secs=0.5))
        await app.steering.wake("a", lambda _event: None)
        assert app.runtime.engines["a"].pid
        monkeypatch.setattr(Operator, "dispatch", boom)
        await asyncio.wait_for(app.close(timeout), 15)
        assert not app.runtime.engines["a"].pid
        assert not app.runtime.health()[0]

    asyncio.run(run())


def test_the_proxy_begins_the_self_check_and_the_end_is_its_end(tmp_path):
    async def run() -> None:
        app = build_app(config(tmp_path))
        site = await serve_proxy(app.proxy, "127.0.0.1", 0)
        task = app.runtime.self_check._task
        assert task is not None
        await site.close()
        await app.close()
        await asyncio.sleep(0)
        assert task.cancelled()
        assert app.runtime.self_check._task is None

    asyncio.run(run())


def test_an_event_loop_that_stood_still_is_told_once_a_minute(tmp_path, caplog):
    async def test(runtime: Runtime) -> float:
        runtime.self_check.note_lateness(0.3)
        runtime.self_check.note_lateness(-0.1)
        assert caplog.text == ""
        for _ in range(3):
            runtime.self_check.note_lateness(7.25)
        return runtime.self_check.late_secs

    assert with_runtime(tmp_path, test) == 7.25
    assert caplog.text.count("the event loop stood still for 7.2 s") == 1


class Notifier:
    def __init__(self) -> None:
        self.told: list[str] = []

    def notify(self, text: str) -> None:
        self.told.append(text)


@pytest.mark.parametrize(
    ("usec", "pings"),
    [("30000000", 1), ("0", 0), ("", 0), ("-1", 0), ("soon", 0)],
)
def test_a_stall_that_is_over_costs_no_ping_and_no_period_none(tmp_path, usec, pings):
    async def run() -> list[str]:
        now = 0.0
        runtime = Runtime(config(tmp_path), clock=lambda: now)
        runtime.self_check.probe()
        now = 10.0
        assert not runtime.self_check.alive()[0]
        notifier = Notifier()
        app: Any = type("App", (), {"runtime": runtime})
        task = asyncio.create_task(Service({"WATCHDOG_USEC": usec}, notifier).ping_watchdog(app))
        await asyncio.sleep(0.02)
        task.cancel()
        return notifier.told

    assert asyncio.run(run()) == ["WATCHDOG=1"] * pings


def test_the_watchdog_is_told_nothing_more_once_the_core_broke_and_the_log_says_so_once(tmp_path, caplog):
    async def run() -> list[str]:
        runtime = Runtime(config(tmp_path))
        notifier = Notifier()
        app: Any = type("App", (), {"runtime": runtime})
        task = asyncio.create_task(Service({"WATCHDOG_USEC": "10000"}, notifier).ping_watchdog(app))
        await asyncio.sleep(0.05)
        assert len(notifier.told) > 2
        runtime.self_check.failed("Tick()", RuntimeError("oh"))
        told = len(notifier.told)
        await asyncio.sleep(0.05)
        task.cancel()
        return notifier.told[told:]

    assert asyncio.run(run()) == []
    assert caplog.text.count("no more word to systemd's watchdog") == 1
