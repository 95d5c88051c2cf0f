"""Priorities: who is next within a model, and what they do not change."""

from __future__ import annotations

import pytest

from llmuxd.core import events as e
from llmuxd.core.outlook import outlook_of
from llmuxd.core.policies import Tenure
from llmuxd.core.views import oldest_demand
from tests.core.playbook import Play, spec


def one_at_a_time(**more: object) -> Play:
    """a is awake, takes one at a time, and has it: 1."""
    play = Play(spec("a", max_in_flight=1), spec("b"), **more)  # type: ignore[arg-type]
    play.awake("a")
    assert play.ask(1, 1, "a") == ["forward 1"]
    return play


def test_of_two_that_wait_for_a_model_the_more_urgent_one_is_forwarded_first():
    play = one_at_a_time()
    play.ask(2, 2, "a")
    play.ask(3, 3, "a", priority=1)
    assert play.at(4, e.RequestFinished(1)) == ["forward 3"]
    assert play.at(5, e.RequestFinished(3)) == ["forward 2"]


def test_of_equally_urgent_ones_the_one_that_came_first():
    play = Play()
    for request, priority in ((1, -5), (2, 0), (3, 100), (4, 0), (5, 100), (6, -5)):
        play.ask(0, request, "a", priority=priority)
    assert play.done(1, "a") == [f"forward {request}" for request in (3, 5, 2, 4, 1, 6)]


def test_a_request_whose_engine_died_goes_back_to_its_place():
    play = one_at_a_time()
    play.ask(2, 2, "a", priority=9)
    play.ask(3, 3, "a")
    play.at(4, e.RequestBounced(1))
    play.dies(4, "a")
    play.done(5, "a")
    assert play.done(6, "a") == ["forward 2"]
    assert play.at(7, e.RequestFinished(2)) == ["forward 1"]


def test_a_low_one_waits_as_long_as_higher_ones_keep_coming_but_no_longer_than_its_timeout():
    play = one_at_a_time()
    play.ask(2, 2, "a", priority=-1)
    for request in range(3, 60):
        play.ask(request - 1, request, "a")
        last = 1 if request == 3 else request - 1
        assert play.at(request, e.RequestFinished(last)) == [f"forward {request}"]
    assert play.switcher.next_deadline == 102.0
    assert play.tick(102) == ["refuse 2 queue_timeout"]


def test_its_place_counts_those_that_are_more_urgent():
    play = Play()
    for request, priority in ((1, 0), (2, 0), (3, 5), (4, 5), (5, -5)):
        play.ask(request, request, "a", priority=priority)
    outlooks = [outlook_of(play.state, request, 6) for request in (3, 4, 1, 2, 5)]
    assert [outlook and outlook.place for outlook in outlooks] == [1, 2, 3, 4, 5]


def test_the_longest_wait_is_that_of_the_oldest_whoever_is_next():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(2, 2, "b")
    play.ask(3, 3, "b", priority=9)
    model = play.model("b")
    assert (model.queue.first.id, oldest_demand(model)) == (3, 2)
    play.at(4, e.ClientLeft(2))
    assert oldest_demand(model) == 3
    play.at(5, e.ClientLeft(3))
    assert (model.queue.first, oldest_demand(model), model.queue.arrivals) == (None, None, 0.0)


def test_what_waits_longest_is_served_first_across_models_however_urgent_others_are():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(2, 2, "b", priority=-100)
    play.ask(3, 3, "c", priority=100)
    assert play.at(4, e.RequestFinished(1)) == ["sleep a offload+keep_running wait"]
    assert play.state.switch.target == "b"


def test_urgent_ones_that_keep_coming_do_not_keep_another_model_waiting():
    """An old one that is passed over again and again is no reason to leave a full engine alone."""
    play = one_at_a_time(policy=Tenure(), request_timeout=10000.0)
    play.at(0, e.OperatorWake(7, "a"))
    play.ask(2, 2, "a", priority=-1)
    play.ask(3, 3, "b")
    bound = Tenure().bound(60.0)
    request, now = 10, 3.0
    while play.state.switch is None:
        request, now = request + 1, now + 1.0
        play.ask(now, request, "a")
        play.at(now, e.RequestFinished(1 if request == 11 else request - 1))
        assert now < 3 * bound, "it waits for ever"
    assert play.state.switch.target == "b"
    assert 2 in [waiting.id for waiting in play.model("a").queue]


def test_one_that_comes_before_the_tick_that_is_due_finds_nobody_held_up():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    play.at(2, e.RequestBounced(1))
    assert play.switcher.next_deadline == 3.5
    assert play.ask(3.6, 2, "a", priority=1) == ["forward 2", "forward 1"]


@pytest.mark.parametrize("priority", [-100, 0, 100])
def test_a_model_that_is_idle_takes_any(priority):
    play = Play()
    play.awake("a")
    assert play.ask(1, 1, "a", priority=priority) == ["forward 1"]
