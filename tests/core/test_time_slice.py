"""`time_slice`: what is awake is served until nothing is left; changes are made on ticks."""

from __future__ import annotations

import pytest

from llmuxd.core import events as e
from llmuxd.core.policies import TimeSlice
from llmuxd.core.policy import PolicyParameters, Snapshot, Stay, SwitchTo
from tests.core.playbook import Play
from tests.core.test_policy import view

policy = TimeSlice()
idle = view("a", awake=True)
b = view("b", queued=1, oldest=8.0, cost=4.0)
c = view("c", queued=1, parked=2, oldest=9.0, cost=4.0)


def test_its_parameters_are_the_configs():
    assert TimeSlice.build(PolicyParameters(tick_interval=0.25, max_wait=9.0)) == TimeSlice(0.25, 9.0)
    assert policy.bound(10.0) is None


def test_the_deepest_queue_is_next_on_a_tick():
    assert policy.decide(Snapshot(10.0, (idle, b, c), due=True)) == SwitchTo("c")
    assert policy.decide(Snapshot(10.0, (idle, c, b), due=True)) == SwitchTo("c")


def test_between_ticks_nothing_is_changed():
    assert policy.decide(Snapshot(10.0, (idle, b, c))) == Stay(10.5)
    assert policy.decide(Snapshot(10.3, (idle, b, c), arrived="b")) == Stay(10.5)


@pytest.mark.parametrize("busy", [view("a", awake=True, in_flight=1), view("a", awake=True, queued=1)])
def test_nothing_is_preempted(busy):
    assert policy.decide(Snapshot(1000.0, (busy, b, c), due=True)) == Stay(1000.5)


def test_the_cooldown_is_kept():
    fresh = view("a", awake=True, since=8.0)
    assert policy.decide(Snapshot(10.0, (fresh, b), min_active=5.0, due=True)) == Stay(10.5)
    assert policy.decide(Snapshot(13.0, (fresh, b), min_active=5.0, due=True)) == SwitchTo("b")


def test_an_arrival_for_a_model_that_has_waited_too_long_switches_at_once():
    busy = view("a", awake=True, in_flight=5)
    assert policy.decide(Snapshot(23.0, (busy, b, c), arrived="b")) == SwitchTo("b")
    assert policy.decide(Snapshot(22.9, (busy, b, c), arrived="b")) == Stay(23.0)
    assert policy.decide(Snapshot(23.0, (busy, b, c), arrived="c")) == Stay(23.5), "c has not"
    assert policy.decide(Snapshot(900.0, (busy, b, c))) == Stay(900.5), "and without an arrival nobody looks"


def test_where_there_is_room_nobody_waits():
    beside = view("d", queued=1, oldest=10.0, cost=4.0, victims=())
    assert policy.decide(Snapshot(10.0, (idle, b, beside))) == SwitchTo("d")


def test_end_to_end():
    play = Play(policy=TimeSlice())
    play.awake("a")
    assert play.ask(1.1, 1, "a") == ["forward 1"]
    assert play.ask(1.2, 2, "b") == []
    assert play.switcher.next_deadline == 1.5
    assert play.tick(1.5) == []
    assert play.at(1.7, e.RequestFinished(1)) == [], "not before the tick"
    assert play.tick(2.0) == ["sleep a offload+keep_running wait"]
    play.done(3, "a")
    assert play.done(4, "b") == ["forward 2"]
    # One that has waited for max_wait is switched to when the next one comes.
    play.ask(5, 3, "a")
    for tick in range(11, 43):
        assert play.tick(tick / 2) == []
    assert play.ask(21.1, 4, "a") == []
    assert play.state.switch.target == "a"
    assert play.at(22, e.RequestFinished(2)) == ["sleep b offload+keep_running wait"]
