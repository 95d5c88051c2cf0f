"""When a heartbeat beats, on a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from llmuxd.proxy.heartbeat import Heartbeat


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time stands still until it is moved."""

    now = 100.0

    def time(self) -> float:
        return self.now

    async def move(self, secs: float) -> None:
        self.now += secs
        for _ in range(5):
            await asyncio.sleep(0)


def on_clock(test: Callable[[Clock], Awaitable[None]]) -> None:
    clock = Clock()
    try:
        clock.run_until_complete(test(clock))
    finally:
        clock.close()


class Beats:
    def __init__(self) -> None:
        self.count = 0
        self.holds: asyncio.Event | None = None
        self.raises: Exception | None = None

    async def __call__(self) -> None:
        self.count += 1
        if self.raises is not None:
            raise self.raises
        if self.holds is not None:
            await self.holds.wait()


def test_it_beats_whenever_nothing_was_heard_for_so_long() -> None:
    async def run(clock: Clock) -> None:
        beats = Beats()
        async with Heartbeat(10, beats) as heartbeat:
            await clock.move(6)
            heartbeat.heard()
            await clock.move(9.5)
            assert beats.count == 0, "heard 9.5 s ago"
            await clock.move(0.5)
            assert beats.count == 1
            await clock.move(9.5)
            assert beats.count == 1
            await clock.move(0.5)
            assert beats.count == 2
        await clock.move(100)
        assert beats.count == 2, "it is over"

    on_clock(run)


def test_hearing_costs_no_timers() -> None:
    async def run(clock: Clock) -> None:
        async with Heartbeat(10, Beats()) as heartbeat:
            for _ in range(100):
                heartbeat.heard()
                await clock.move(0.01)
            assert len(clock._scheduled) == 1  # type: ignore[attr-defined]
        assert all(timer.cancelled() for timer in clock._scheduled)  # type: ignore[attr-defined]

    on_clock(run)


def test_with_no_seconds_it_never_beats() -> None:
    async def run(clock: Clock) -> None:
        beats = Beats()
        async with Heartbeat(0, beats):
            await clock.move(1000)
        assert beats.count == 0
        assert not clock._scheduled  # type: ignore[attr-defined]

    on_clock(run)


def test_a_beat_that_takes_long_is_not_overtaken_and_not_cut_short() -> None:
    async def run(clock: Clock) -> None:
        beats, left = Beats(), False
        beats.holds = asyncio.Event()

        async def entered() -> None:
            nonlocal left
            async with Heartbeat(10, beats):
                await clock.move(10)
                await clock.move(100)
            left = True

        task = asyncio.ensure_future(entered())
        await clock.move(0)
        await clock.move(0)
        await clock.move(0)
        assert (beats.count, left) == (1, False)
        beats.holds.set()
        await task
        await clock.move(100)
        assert beats.count == 1

    on_clock(run)


def test_it_stops_when_the_client_is_gone() -> None:
    async def run(clock: Clock) -> None:
        beats = Beats()
        beats.raises = ConnectionResetError()
        async with Heartbeat(10, beats):
            await clock.move(10)
            await clock.move(100)
        assert beats.count == 1

    on_clock(run)
