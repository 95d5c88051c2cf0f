"""The live watchdog: what makes /health fail, what is logged once, and what systemd is told."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from llmuxd.app import build_app
from llmuxd.config import parse_config
from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.requests import Requests
from llmuxd.runtime import Runtime
from llmuxd.service import Service

MODELS = {"models": {"a": {"model_path": "p"}, "b": {"model_path": "p"}}}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def runtime(clock: Clock) -> Runtime:
    made = Runtime(parse_config(MODELS, environ={}), clock=clock)
    # No engine is started here: what the core commands is looked at, not carried out.
    made._operate = lambda command: None  # type: ignore[method-assign]
    made._arm = lambda: None  # type: ignore[method-assign]
    return made


def wake(runtime: Runtime, model: str) -> None:
    """Bring a model up by an operator's word."""
    runtime.post(e.OperatorWake(0, model))
    runtime.post(e.EngineStarted(model, runtime.switcher.state.models[model].op))


@pytest.fixture(autouse=True)
def jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nobody:
        def set_result(self, _result: object) -> None:
            """Nobody waits."""

    class Futures(dict[int, Any]):
        def pop(self, _key: int) -> Any:  # type: ignore[override]
            return Nobody()

    right = Runtime.__init__

    def init(self: Runtime, *args: Any, **named: Any) -> None:
        right(self, *args, **named)
        self._jobs = Futures()

    monkeypatch.setattr(Runtime, "__init__", init)


def test_all_is_well_while_probes_are_answered(runtime, clock):
    assert runtime.health() == (True, "ok")
    for _ in range(3):
        runtime.self_check.probe()
        clock.now += 1.0
        assert runtime.health() == (True, "ok")


def test_a_scheduler_that_does_not_answer_is_not_alive(runtime, clock):
    runtime.self_check.probe()
    clock.now += 6.5
    assert runtime.health() == (False, "the scheduler has not answered for 6 s")
    assert not runtime.self_check.alive()[0]
    runtime.self_check.probe()
    assert runtime.health() == (True, "ok")


def test_a_core_that_breaks_is_told_and_nobody_who_posts_is_hurt(runtime, monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(Requests, "_arrived", broken)
    runtime.post(e.RequestArrived(1, "a"))
    alive, reason = runtime.self_check.alive()
    assert (alive, reason) == (False, "the scheduler broke over RequestArrived: ZeroDivisionError('oh')")
    assert runtime.health() == (alive, reason)
    assert "restart llmuxd" in caplog.text


def test_a_queue_that_does_not_move_is_told_once_with_its_reason(runtime, clock, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    wake(runtime, "a")
    assert runtime.switcher.state.models["a"].state is S.AWAKE
    monkeypatch.setattr(Requests, "may_forward", lambda self, model, now: False)
    runtime.gate.submit("a")
    runtime.self_check.probe()
    assert runtime.health() == (True, "ok"), "it may take a moment"
    for _ in range(3):
        clock.now += 4.0
        runtime.self_check.probe()
    assert runtime.health() == (False, "a has waited 12 s: it is awake, and nothing is forwarded")
    assert runtime.self_check.alive() == (True, "ok"), "no restart mends a queue"
    assert caplog.text.count("it is awake, and nothing is forwarded") == 1
    monkeypatch.undo()
    runtime.post(e.Tick())
    runtime.self_check.probe()
    assert runtime.health() == (True, "ok")
    assert "the queue of a moves again" in caplog.text


def test_a_broken_invariant_is_counted_and_logged_once_a_minute(runtime, clock, caplog):
    doctored = [c.Forward(9, "a", 0.0, 0.0)]
    for _ in range(3):
        runtime.self_check.handled(e.Tick(), doctored, clock.now)
    clock.now += 61
    runtime.self_check.handled(e.Tick(), doctored, clock.now)
    labels = {"invariant": "forwarded_to_awake"}
    assert runtime.metrics.registry.get_sample_value("llmux_invariant_violations_total", labels) == 4
    assert caplog.text.count("invariant forwarded_to_awake does not hold: request 9 to a") == 2


class Notifier:
    def __init__(self) -> None:
        self.told: list[str] = []

    def notify(self, text: str) -> None:
        self.told.append(text)


def test_systemd_is_told_only_while_the_scheduler_is_alive(tmp_path):
    async def run() -> tuple[list[str], list[str]]:
        app = build_app(parse_config({"metrics_port": 0}, environ={"LLMUX_RUNTIME_DIR": str(tmp_path)}))
        well, ill = Notifier(), Notifier()
        environ = {"WATCHDOG_USEC": "20000000"}
        first = asyncio.create_task(Service(environ, well).ping_watchdog(app))
        await asyncio.sleep(0)
        app.runtime.self_check.failed("Tick()", RuntimeError("oh"))
        second = asyncio.create_task(Service(environ, ill).ping_watchdog(app))
        await asyncio.sleep(0)
        for task in (first, second):
            task.cancel()
        await Service({}, ill).ping_watchdog(app)
        return well.told, ill.told

    assert asyncio.run(run()) == (["WATCHDOG=1"], [])


def test_it_probes_by_itself(tmp_path):
    async def run() -> int:
        app = build_app(parse_config({"metrics_port": 0}, environ={"LLMUX_RUNTIME_DIR": str(tmp_path)}))
        app.runtime.self_check.start()
        await asyncio.sleep(0)
        probes = app.runtime.self_check._probe
        app.runtime.self_check.stop()
        return probes

    assert asyncio.run(run()) == 1
