"""When a heartbeat beats, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable

from llmuxd.proxy.heartbeat import Heartbeat
from tests.unit.clock import Clock, on_clock


class Beats:
    def __init__(self) -> None:
        self.count = 0
        self.does: Callable[[], None] | None = None

    def __call__(self) -> None:
        self.count += 1
        if self.does is not None:
            self.does()


def test_it_beats_whenever_nothing_was_heard_for_so_long() -> None:
    async def run(clock: Clock) -> None:
        beats = Beats()
        heartbeat = Heartbeat(clock, 10, beats)
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
        heartbeat.stop()
        await clock.move(100)
        assert beats.count == 2, "it is over"

    on_clock(run)


def test_hearing_costs_no_timers() -> None:
    async def run(clock: Clock) -> None:
        heartbeat = Heartbeat(clock, 10, Beats())
        for _ in range(100):
            heartbeat.heard()
            await clock.move(0.01)
        assert len(clock._scheduled) == 1  # type: ignore[attr-defined]
        for _ in range(100):
            heartbeat.heard()
            await clock.move(1)
        assert clock.timers == 1
        heartbeat.stop()
        assert clock.timers == 0

    on_clock(run)


def test_with_no_seconds_it_never_beats() -> None:
    async def run(clock: Clock) -> None:
        beats = Beats()
        heartbeat = Heartbeat(clock, 0, beats)
        await clock.move(1000)
        heartbeat.heard()
        heartbeat.stop()
        assert beats.count == 0
        assert not clock._scheduled  # type: ignore[attr-defined]

    on_clock(run)


def test_a_loop_that_was_held_up_beats_once_and_not_for_each_time_that_it_missed() -> None:
    async def run(clock: Clock) -> None:
        beats = Beats()
        Heartbeat(clock, 10, beats)
        await clock.move(95)
        assert beats.count == 1
        await clock.move(9)
        assert beats.count == 1
        await clock.move(1)
        assert beats.count == 2

    on_clock(run)


def test_what_is_heard_in_a_beat_counts_from_there() -> None:
    async def run(clock: Clock) -> None:
        beats = Beats()
        heartbeat = Heartbeat(clock, 10, beats)
        beats.does = heartbeat.heard
        await clock.move(10)
        await clock.move(9)
        assert beats.count == 1
        await clock.move(1)
        assert beats.count == 2

    on_clock(run)


def test_it_may_be_stopped_in_a_beat_and_more_than_once() -> None:
    async def run(clock: Clock) -> None:
        beats = Beats()
        heartbeat = Heartbeat(clock, 10, beats)
        beats.does = heartbeat.stop
        await clock.move(10)
        await clock.move(100)
        heartbeat.stop()
        assert (beats.count, clock.timers) == (1, 0)

    on_clock(run)


def test_a_beat_that_breaks_is_the_last_one() -> None:
    async def run(clock: Clock) -> None:
        beats, broken = Beats(), []
        clock.set_exception_handler(lambda _loop, context: broken.append(context["exception"]))
        Heartbeat(clock, 10, beats)

        def breaks() -> None:
            raise ConnectionResetError

        beats.does = breaks
        await clock.move(10)
        await clock.move(100)
        assert beats.count == 1
        assert [type(error) for error in broken] == [ConnectionResetError]

    on_clock(run)
