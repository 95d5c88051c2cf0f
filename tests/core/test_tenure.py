"""`tenure`: turns that are worth their switch, then the most waiting, and a bound on every wait."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from llmuxd.core import events as e
from llmuxd.core.policies import DEFAULT_POLICY, POLICIES, Tenure
from llmuxd.core.policy import Decision, ModelView, PolicyParameters, Snapshot, Stay, SwitchTo
from llmuxd.core.settings import InFlight
from tests.core.playbook import Play, spec
from tests.core.test_policy import view

# Round numbers. Where nothing can be parked, a turn of 2 x C, 30 x C against what is only parked, 0.5 s for each request
# in flight; where it can, of 1 x C and 0.5 s for each at least, and nobody is given time to finish.
policy = Tenure(
    turn_costs=2.0,
    secs_per_request=0.5,
    drain_stretch=1.0,
    least_costs=1.0,
    park_secs=0.5,
    visit_costs=1.0,
    visit_answers=2.0,
    parked_share=0.5,
    stood_weight=0.5,
    stay_weight=1.0,
    arrival_weight=1.0,
    queued_costs=10.0,
    paused_costs=0.0,
    overdue_costs=15.0,
    linger_costs=0.1,
    finish_costs=0.5,
    door_weight=1000.0,
)
COST = 4.0
"""Of every switch. The bound is 15 + 15 x 4 = 75 s. A visit takes 4 + 4 + 2 x 5 = 18 s."""


def awake(in_flight: int = 1, **more: Any) -> ModelView:
    """Since 0, cannot park."""
    return view("a", awake=True, in_flight=in_flight, **more)


def pausable(in_flight: int = 1, **more: Any) -> ModelView:
    """The same, may park. An answer takes 5 s."""
    return awake(in_flight, parks=True, **more)


def waits(name: str = "b", queued: int = 1, oldest: float = 0.0, **more: Any) -> ModelView:
    return view(name, queued=queued, oldest=oldest, **{"cost": COST, **more})


def decide(now: float, *models: ModelView, policy: Tenure = policy, **more: Any) -> Decision:
    return policy.decide(Snapshot(now, models, typical_switch_secs=COST, **more))


def turn(victim: ModelView, candidate: ModelView, **more: Any) -> float:
    """How long the turn of `victim`, awake since 0, lasts."""
    decision = decide(0.01, victim, candidate, **more)
    assert isinstance(decision, Stay)
    assert decision.until is not None
    later = decide(decision.until, victim, candidate, **more)
    assert later == SwitchTo(candidate.name, drain_secs=2.0)
    return decision.until


def test_it_is_the_default_and_takes_max_wait_of_the_config():
    assert DEFAULT_POLICY == "tenure"
    built = POLICIES["tenure"](PolicyParameters(max_wait=7.0))
    assert built == Tenure(max_wait=7.0)
    assert built.bound(2.0) == 7.0 + 19.0 * 2.0


class TestTheTurn:
    def test_is_worth_the_switch(self):
        assert turn(awake(1), waits()) == 2.0 * COST + 0.5

    def test_is_longer_the_more_would_be_held_up(self):
        assert turn(awake(3), waits(queued=2)) == pytest.approx(1.5 * 2.0 * COST + 3 * 0.5)
        assert turn(awake(50), waits()) == 2.0 * 2.0 * COST + 50 * 0.5, "by twice as long at most"

    def test_counts_those_that_will_come_during_the_switch(self):
        assert turn(awake(1, arrival_rate=0.125), waits()) == pytest.approx(1.5 * 2.0 * COST + 0.5)

    def test_is_no_shorter_for_many(self):
        assert turn(awake(1), waits(queued=50)) == 2.0 * COST + 0.5

    def test_is_long_against_what_is_only_parked(self):
        parked = waits(queued=0, parked=3, in_flight=3, oldest=50.0)
        short = replace(policy, parked_costs=4.0)
        assert turn(awake(1), parked, policy=short) == 4.0 * COST + 0.5
        assert turn(awake(1), replace(parked, queued=1), policy=short) == 2.0 * COST + 0.5

    def test_is_stretched(self):
        stretched = replace(policy, drain_stretch=1.5)
        assert turn(awake(1), waits(queued=50), policy=stretched) == 1.5 * 2.0 * COST + 0.5
        assert turn(awake(50), waits(), policy=stretched) == 1.5 * 2.0 * 2.0 * COST + 50 * 0.5

    def test_doubles_with_each_one_that_answered_nothing(self):
        for barren, times in ((1, 2), (2, 4), (3, 8), (6, 64), (9, 64)):
            # Far from overdue, however long it is.
            patient = replace(policy, max_wait=10000.0)
            hasty, many = replace(patient, least_costs=0.5), waits(queued=50)
            assert turn(awake(1, barren_turns=barren), many, policy=patient) == (2.0 * COST + 0.5) * times
            assert turn(pausable(1, barren_turns=barren), many, policy=hasty) == (0.5 * COST + 0.5) * times

    def test_is_never_shorter_than_the_cooldown(self):
        assert turn(awake(1), waits(queued=50), min_active=30.0) == 30.0
        assert turn(awake(0), waits(), min_active=30.0) == 30.0

    def test_is_that_of_each_model_that_has_to_go(self):
        other = replace(awake(0, since=0.0), name="d", last_arrival=20.0)
        both = waits(victims=("a", "d"))
        assert decide(20.1, awake(1), other, both) == Stay(20.0 + 0.1 * COST)
        assert decide(20.4, awake(1), other, both) == SwitchTo("b", drain_secs=2.0)


class TestTheTurnOfAModelThatCanPark:
    """A visit to one that has one request queued brings 1 + 1 - exp(-14 / 5) in 18 s, 0.1077 per second."""

    def test_is_worth_the_caches_that_have_to_be_computed_again(self):
        assert turn(pausable(3), waits(queued=50)) == 1.0 * COST + 3 * 0.5

    def test_ends_when_going_is_worth_more(self):
        assert decide(50.0, pausable(1), waits(queued=1)) == Stay(50.5), "0.2 answers per second are"
        assert decide(50.0, pausable(1), waits(queued=2)) == SwitchTo("b", drain_secs=2.0)
        assert decide(50.0, pausable(2), waits(queued=2)) == Stay(50.5)

    def test_counts_those_who_come(self):
        assert decide(50.0, pausable(1, arrival_rate=0.1), waits(queued=2)) == Stay(50.5)

    def test_counts_how_fast_both_are(self):
        assert decide(50.0, pausable(1, answer_secs=10.0), waits(queued=1)) == SwitchTo("b", drain_secs=2.0)
        assert decide(50.0, pausable(1), waits(queued=2, answer_secs=10.0)) == Stay(50.5)

    def test_counts_what_is_parked_for_less_until_it_has_stood_still_for_long(self):
        parked = waits(queued=0, parked=3, in_flight=3, oldest=40.0, parked_since=40.0)
        assert decide(50.0, pausable(1), parked) == Stay(50.5)
        assert decide(98.0, pausable(1), parked) == SwitchTo("b", drain_secs=2.0)

    def test_counts_priority(self):
        assert decide(50.0, pausable(1), waits(queued=1, priority=2.0)) == SwitchTo("b", drain_secs=2.0)
        assert decide(50.0, pausable(1, priority=2.0), waits(queued=2)) == Stay(50.5)

    def test_counts_all_that_have_to_go(self):
        other = replace(pausable(1), name="d")
        assert decide(50.0, pausable(1), other, waits(queued=2, victims=("a", "d"))) == Stay(50.5)

    def test_is_compared_for_a_while_only_once_something_is_overdue(self):
        late = waits(queued=1, oldest=0.0)
        assert decide(80.0, pausable(1, since=61.0), late) == Stay(80.5)
        assert decide(81.0, pausable(1, since=61.0), late) == SwitchTo("b", drain_secs=2.0)


class TestAModelWithNothingToDo:
    def test_has_no_turn_left(self):
        assert decide(0.0, awake(0), waits()) == SwitchTo("b", drain_secs=2.0)

    def test_is_left_alone_for_a_moment_after_its_last_request_came(self):
        assert decide(10.0, awake(0, last_arrival=9.9), waits()) == Stay(9.9 + 0.1 * COST)
        assert decide(10.3, awake(0, last_arrival=9.9), waits()) == SwitchTo("b", drain_secs=2.0)

    def test_and_where_there_is_room_nobody_has_to_go(self):
        assert decide(0.0, awake(9), waits(victims=())) == SwitchTo("b", drain_secs=2.0)


class TestWhoIsNext:
    def test_the_most_waiting_in_all(self):
        b = waits("b", queued=1, waiting=50.0)
        c = waits("c", queued=2, waiting=40.0)
        assert decide(50.0, awake(0), b, c) == SwitchTo("c", drain_secs=2.0), "two requests that have seen nothing"
        assert decide(50.0, awake(0), replace(b, waiting_secs=81.0), c) == SwitchTo("b", drain_secs=2.0)

    def test_what_was_parked_has_seen_something(self):
        parked = waits("b", queued=0, parked=2, in_flight=2, waiting=60.0)
        assert decide(50.0, awake(0), parked, waits("c", waiting=21.0)) == SwitchTo("c", drain_secs=2.0)
        assert decide(50.0, awake(0), parked, waits("c", waiting=19.0)) == SwitchTo("b", drain_secs=2.0)

    def test_by_priority(self):
        b = waits("b", waiting=10.0)
        c = waits("c", waiting=60.0)
        assert decide(50.0, awake(0), b, c) == SwitchTo("c", drain_secs=2.0)
        assert decide(50.0, awake(0), replace(b, priority=2.1), c) == SwitchTo("b", drain_secs=2.0)

    def test_of_those_that_the_turn_is_over_for(self):
        many = waits("c", queued=9, waiting=9.0)
        lone = waits("b", queued=1, waiting=900.0)
        assert decide(5.0, pausable(1), lone, many) == SwitchTo("c", drain_secs=2.0)
        assert decide(4.0, pausable(1), lone, many) == Stay(4.5)

    def test_by_what_is_paused(self):
        counts = replace(policy, paused_costs=3.0)
        b, c = waits("b", queued=0, parked=4, in_flight=4), waits("c", queued=1)
        assert decide(0.0, awake(0), b, c) == SwitchTo("c", drain_secs=2.0)
        assert decide(0.0, awake(0), b, c, policy=counts) == SwitchTo("b", drain_secs=2.0)

    def test_nobody_where_nobody_waits(self):
        assert decide(3.0, awake(1)) == Stay()


class TestOverdue:
    """Beyond the bound of 75 s."""

    def test_comes_before_everything_else(self):
        late = waits("b", oldest=0.0, waiting=75.0)
        many = waits("c", queued=99, oldest=70.0, waiting=500.0)
        assert decide(74.9, awake(0), late, many) == SwitchTo("c", drain_secs=2.0)
        assert decide(75.0, awake(0), late, many) == SwitchTo("b", drain_secs=2.0)

    def test_the_oldest_first(self):
        b, c = waits("b", oldest=5.0), waits("c", oldest=4.0)
        assert decide(100.0, awake(0), b, c) == SwitchTo("c", drain_secs=2.0)

    def test_still_waits_for_the_turn_that_is_under_way_and_so_does_everyone_else(self):
        late, beside = waits("b", oldest=0.0), waits("c", oldest=90.0, victims=())
        assert decide(95.0, awake(1, since=90.0), late, beside) == Stay(90.0 + 2.0 * COST + 0.5)

    def test_but_for_no_longer_than_a_bound(self):
        late = waits("b", oldest=0.0)
        forever = awake(400, since=50.0)
        assert decide(100.0, forever, late) == Stay(150.0)
        assert decide(150.0, forever, late) == SwitchTo("b", drain_secs=2.0)


class TestRequestsQueuedAtAFullEngine:
    def test_keep_it_awake(self):
        full = awake(4, queued=2, oldest=10.0)
        assert decide(50.0, full, waits(queued=50, oldest=1.0)) == Stay(76.0), "until the other is overdue"

    def test_as_long_as_they_came_before_the_other_was_overdue(self):
        late = waits(oldest=1.0)
        assert decide(80.0, awake(4, queued=2, oldest=75.0), late) == Stay(), "asked again when they are through"
        assert decide(80.0, awake(4, queued=2, oldest=76.0), late) == SwitchTo("b", drain_secs=2.0)

    def test_of_which_urgent_ones_that_keep_coming_make_no_more(self):
        full = awake(4, queued=2, oldest=60.0, next_arrival=76.0)
        assert decide(80.0, full, waits(oldest=1.0)) == SwitchTo("b", drain_secs=2.0)


class TestTimeToFinish:
    def test_is_given_if_it_is_enough(self):
        assert decide(50.0, awake(1, drain=2.0), waits()) == SwitchTo("b", drain_secs=2.0)

    def test_is_not_if_it_is_not(self):
        assert decide(50.0, awake(1, drain=2.1), waits()) == SwitchTo("b", drain_secs=0.0)

    def test_is_given_for_an_answer_if_parking_would_cost_more(self):
        # One would be away for 4 s; everyone who waits would wait for an answer of 5 s.
        kind = replace(policy, door_weight=1.0, door_answers=0.6, parked_weight=0.2)
        few, more = waits(queued=1), waits(queued=2)
        assert decide(50.0, awake(2, drain=9.0), few, policy=kind) == SwitchTo("b", drain_secs=3.0)
        assert decide(50.0, awake(2, drain=9.0), more, policy=kind) == SwitchTo("b", drain_secs=0.0)
        parked = waits(queued=1, parked=2, in_flight=2)
        assert decide(50.0, awake(2, drain=9.0), parked, policy=kind) == SwitchTo("b", drain_secs=3.0)


def test_it_looks_at_nothing_but_the_snapshot():
    models = (awake(3), waits("b", queued=2), waits("c", queued=1, waiting=9.0))
    assert decide(9.0, *models) == decide(9.0, *models)
    assert math.isfinite(policy.bound(COST))


def play_with_costs(**more: Any) -> Play:
    """a is awake since 0; switches are known to take 2 s."""
    play = Play(policy=Tenure(), in_flight=InFlight.PARK, **more)
    play.awake("a")
    for name in "abc":
        costs = play.model(name).costs
        costs.start.value = costs.wake.value = costs.sleep.value = 1.0
        costs.answer.value = 5.0
    return play


def test_a_turn_from_beginning_to_end():
    play = play_with_costs()
    assert play.ask(1, 1, "a") == ["forward 1"]
    assert play.ask(1, 2, "b") == []
    play.ask(4.8, 3, "a")
    play.at(4.9, e.RequestFinished(1))
    play.model("a").costs.answer.value = 0.6
    due = play.switcher.next_deadline
    assert due is not None
    assert play.tick(due) == [], "an answer in 0.6 s is worth more than one visit to b"
    assert play.state.switch is None
    for request in range(10, 21):
        assert play.ask(5.0, request, "b") == []
    # Twelve are worth more. It will be answered within 0.32 x 2 s: it may finish.
    assert play.state.switch.drain_secs == pytest.approx(0.64)
    assert play.at(5.3, e.RequestFinished(3)) == ["sleep a offload+keep_running wait"]
    play.done(7, "a")
    assert play.done(8, "b") == ["forward 2", *(f"forward {request}" for request in range(10, 21))]


def test_what_will_take_longer_is_parked_and_has_its_turn_again():
    play = play_with_costs()
    play.ask(4, 1, "a")
    play.ask(4, 2, "b")
    assert play.ask(4, 4, "b") == ["sleep a offload+keep_running keep"]
    play.done(8, "a")
    assert play.done(9, "b") == ["forward 2", "forward 4"]
    assert play.ask(10, 3, "b") == ["forward 3"]
    assert play.at(11, e.RequestFinished(2)) == []
    assert play.at(11, e.RequestFinished(4)) == []
    # Once b is idle, what was parked goes on.
    assert play.at(12, e.RequestFinished(3)) == ["sleep b offload+keep_running wait"]
    play.done(13, "b")
    assert play.done(14, "a") == []
    assert play.at(15, e.RequestFinished(1)) == []


def test_priority_of_the_config_counts():
    play = Play(spec("a"), spec("b"), spec("c", priority=5.0), policy=Tenure())
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(1, 2, "b")
    play.ask(2, 3, "c")
    assert play.at(3, e.RequestFinished(1)) == ["sleep a offload+keep_running wait"]
    assert play.state.switch.target == "c"
