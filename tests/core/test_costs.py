"""What engines take is measured, each direction by itself, and assumed of those that have not been measured."""

from __future__ import annotations

import pytest

from llmuxd.core import events as e
from llmuxd.core.costs import CAP_SECS, Average, Costs, Rate, estimate
from llmuxd.core.settings import InFlight
from llmuxd.core.views import candidate_of, typical_switch_secs
from tests.core.playbook import STOP, Play, spec


def test_the_newest_measurement_weighs_three_tenths():
    average = Average()
    assert average.value is None
    average.add(10.0)
    assert average.value == 10.0
    average.add(20.0)
    assert average.value == pytest.approx(13.0)


def test_a_recovery_counts_as_a_minute_at_most():
    average = Average()
    average.add(600.0)
    assert average.value == 60.0


def test_the_unmeasured_takes_what_others_take_or_a_guess():
    own, other, third = Costs(), Costs(), Costs()
    assert [estimate(kind, own, [own, other]) for kind in ("start", "wake", "sleep", "stop")] == [60.0, 5.0, 5.0, 5.0]
    other.wake.add(2.0)
    third.wake.add(4.0)
    assert estimate("wake", own, [own, other, third]) == 3.0
    own.wake.add(1.0)
    assert estimate("wake", own, [own, other, third]) == 1.0


def test_a_rate_fades():
    rate = Rate()
    assert rate.at(0) == 0.0
    for second in range(600):
        rate.count(second)
    assert rate.at(600) == pytest.approx(1.0, rel=0.02)
    assert rate.at(660) == pytest.approx(0.37, rel=0.02)


def test_each_direction_of_each_engine_is_measured():
    play = Play(spec("a"), spec("b", STOP))
    play.ask(0, 1, "a")
    play.done(30, "a")
    play.at(32, e.RequestFinished(1))
    play.ask(40, 2, "b")
    play.done(43, "a")
    play.done(63, "b")
    play.at(64, e.RequestFinished(2))
    play.ask(70, 3, "a")
    play.done(74, "b")
    play.done(75, "a")
    a, b = play.model("a").costs, play.model("b").costs
    assert (a.start.value, a.answer.value, a.sleep.value, a.wake.value, a.stop.value) == (30, 2, 3, 1, None)
    assert (b.start.value, b.answer.value, b.stop.value, b.sleep.value) == (20, 1, 4, None)


def test_an_answer_that_was_paused_says_nothing_of_how_long_answers_take():
    play = Play(in_flight=InFlight.PARK)
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(2, 2, "b")
    play.done(3, "a")
    play.done(4, "b")
    play.at(5, e.RequestFinished(2))
    play.done(6, "b")
    play.done(7, "a")
    play.at(9, e.RequestFinished(1))
    assert play.model("a").costs.answer.value == 0.0, "that of the request that brought it up"


def test_a_switch_costs_the_victims_way_out_and_the_targets_way_in():
    play = Play(spec("a"), spec("b", STOP), spec("c"))
    assert candidate_of(play.state, play.model("c")).switch_secs == 60.0
    assert typical_switch_secs(play.state) == 10.0, "llmux 0.7's guess"
    play.awake("a")
    play.model("a").costs.sleep.value = 2.0
    play.model("c").costs.start.value = 20.0
    seen = candidate_of(play.state, play.model("c"))
    assert (seen.victims, seen.switch_secs) == (("a",), 22.0)
    assert typical_switch_secs(play.state) == 7.0
    play.ask(1, 1, "b")
    play.done(2, "a")
    play.done(3, "b")
    play.model("b").costs.stop.value = 4.0
    play.model("a").costs.wake.value = 1.0
    assert candidate_of(play.state, play.model("a")).switch_secs == 5.0


def test_what_is_known_is_known_again():
    costs = Costs()
    assert costs.known == {}
    costs.wake.add(2.0)
    costs.wake.add(4.0)
    costs.answer.add(7.0)
    assert costs.known == {"wake": 2.6, "answer": 7.0}
    assert Costs.of(costs.known).known == costs.known
    assert Costs.of({"wake": 500.0}).known == {"wake": CAP_SECS}


def test_a_core_may_begin_with_what_an_earlier_one_has_measured():
    play = Play(costs={"b": {"wake": 3.0, "sleep": 1.0}})
    assert play.model("b").costs.known == {"wake": 3.0, "sleep": 1.0}
    assert play.model("a").costs.known == {}
