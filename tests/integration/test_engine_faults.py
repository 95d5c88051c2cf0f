"""Engines that answer what they should not, or nothing: over the simulated vLLM with faults set."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from llmuxd.core.events import FailureKind
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.engine import Engine, EngineError
from llmuxd.sim.ledger import GIB, Ledger
from tests.integration.engine_bench import OFFLOAD, START_SECS, Bench, complete

DISCARD = EvictionPolicy.parse("discard+keep_running")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def faulty(bench: Bench, faults: str) -> Engine:
    return bench.engine(env={"LLMUX_SIM_FAULTS": faults})


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("refuse_sleep", FailureKind.REFUSED, "/sleep?level=1&mode=keep answered 500: AssertionError: Memory usage"),
        ("lie_sleep", FailureKind.LIED, "/sleep answered success, but the engine is awake"),
        ("hang_sleep", FailureKind.TIMEOUT, "sleep was not done within 0.3 s"),
        ("die_in_sleep", FailureKind.DIED, "is gone"),
    ],
)
def test_a_sleep_that_fails(bench: Bench, fault: str, kind: FailureKind, says: str) -> None:
    engine = faulty(bench, fault)

    async def test() -> None:
        await engine.start(1, START_SECS)
        with pytest.raises(EngineError) as caught:
            await engine.sleep(OFFLOAD, "keep", 0.3 if fault == "hang_sleep" else 10)
        assert says in caught.value.reason
        assert caught.value.kind is kind
        bench.tree(engine)
        await engine.stop(5)

    bench.run(test)
    assert len(bench.deaths) == (1 if fault == "die_in_sleep" else 0)


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("fail_wake", FailureKind.REFUSED, "/wake_up answered 500: RuntimeError: wake up failed"),
        ("oom_wake", FailureKind.OUT_OF_MEMORY, "CUDA Error: out of memory"),
        ("hang_wake", FailureKind.TIMEOUT, "wake was not done within 0.3 s"),
        ("die_in_wake", FailureKind.DIED, "is gone"),
    ],
)
@pytest.mark.parametrize("eviction", [OFFLOAD, DISCARD])
def test_a_wake_that_fails(bench: Bench, eviction: EvictionPolicy, fault: str, kind: FailureKind, says: str) -> None:
    engine = faulty(bench, fault)
    if eviction == DISCARD:
        says = says.replace("/wake_up", "/wake_up?tags=weights")

    async def test() -> None:
        await engine.start(1, START_SECS)
        await engine.sleep(eviction, "wait", 10)
        with pytest.raises(EngineError) as caught:
            await engine.wake(eviction, 0.3 if fault == "hang_wake" else 10)
        assert says in caught.value.reason
        assert caught.value.kind is kind

    bench.run(test)


def test_a_device_without_room(bench: Bench) -> None:
    device = Ledger.create(bench.folder / "device", 24 * GIB)
    env = {"LLMUX_SIM_LEDGER": str(bench.folder / "device")}
    one, two = bench.engine("one", env=env), bench.engine("two", env=env)

    async def test() -> None:
        await one.start(1, START_SECS)
        with pytest.raises(EngineError) as caught:
            await two.start(1, START_SECS)
        assert caught.value.kind is FailureKind.OUT_OF_MEMORY
        assert "Free memory on device" in caught.value.reason
        await one.sleep(OFFLOAD, "wait", 10)
        await two.start(2, START_SECS)
        with pytest.raises(EngineError) as caught:
            await one.wake(OFFLOAD, 10)
        assert caught.value.kind is FailureKind.OUT_OF_MEMORY
        assert await complete(two)

    bench.run(test)
    assert device.held() == {}, "nothing that was killed holds memory"


def test_a_start_that_dies_once_succeeds_the_next_time(bench: Bench) -> None:
    faults = bench.folder / "faults"
    faults.write_text("die_at_start*1")
    engine = bench.engine(env={"LLMUX_SIM_FAULT_FILE": str(faults)})

    async def test() -> None:
        with pytest.raises(EngineError, match="Engine core initialization failed") as caught:
            await engine.start(1, START_SECS)
        assert caught.value.kind is FailureKind.DIED
        await engine.start(2, START_SECS)
        assert await complete(engine)

    bench.run(test)
    assert bench.deaths == []


@pytest.mark.parametrize("fault", ["hang_sleep", "hang_wake"])
def test_a_stop_takes_the_place_of_what_hangs(bench: Bench, fault: str) -> None:
    engine = faulty(bench, fault)

    async def test() -> None:
        await engine.start(1, START_SECS)
        bench.tree(engine)
        if fault == "hang_wake":
            await engine.sleep(OFFLOAD, "keep", 10)
            hanging = asyncio.create_task(engine.wake(OFFLOAD, 60))
        else:
            hanging = asyncio.create_task(engine.sleep(OFFLOAD, "keep", 60))
        await asyncio.sleep(0.1)
        assert not hanging.done()
        began = time.monotonic()
        await engine.stop(0.5)
        assert time.monotonic() - began < 5
        with pytest.raises(EngineError, match="it was stopped"):
            await hanging

    bench.run(test)
    assert bench.deaths == []


def test_an_engine_whose_health_hangs_is_not_taken_for_dead(bench: Bench) -> None:
    faults = bench.folder / "faults"
    engine = bench.engine(env={"LLMUX_SIM_FAULT_FILE": str(faults)})

    async def test() -> None:
        await engine.start(1, START_SECS)
        faults.write_text("hang_health")
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            assert not bench.deaths
            assert await complete(engine)
            await asyncio.sleep(0.1)

    bench.run(test)
    assert bench.deaths == []
