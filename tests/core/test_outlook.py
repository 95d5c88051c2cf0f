"""How long a request can expect to wait, and when a refused client may come back."""

from __future__ import annotations

import pytest

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.outlook import Outlook, expected_wait, outlook_of
from tests.core.playbook import STOP, Play, spec

COSTS = {"start": 30.0, "wake": 3.0, "sleep": 2.0, "stop": 1.0, "answer": 4.0}


def play() -> Play:
    """Models that have been measured."""
    return Play(costs=dict.fromkeys("abc", COSTS))


def wait(play: Play, name: str, now: float = 0.0) -> float:
    return expected_wait(play.state, play.model(name), now)


def test_a_model_that_is_awake_takes_it_at_once():
    made = play()
    made.awake("a")
    assert wait(made, "a") == 0.0


def test_one_without_an_engine_has_to_start():
    assert wait(play(), "a") == 30.0


def test_one_that_sleeps_has_to_wake_and_another_to_go():
    made = play()
    made.asleep("a")
    made.awake("b")
    assert wait(made, "a") == pytest.approx(2.0 + 3.0, abs=2.0)
    assert wait(made, "c") > wait(made, "a"), "a start takes longer"


def test_what_is_in_flight_at_the_one_that_has_to_go_is_waited_for():
    made = play()
    made.asleep("a")
    made.awake("b")
    before = wait(made, "a", 10.0)
    made.ask(10, 1, "b")
    assert wait(made, "a", 10.0) > before


def test_a_start_under_way_has_a_rest():
    made = play()
    made.ask(0, 1, "a")
    assert wait(made, "a", 0.0) == 30.0
    assert wait(made, "a", 25.0) == 5.0
    assert wait(made, "a", 99.0) == 0.0, "it may come at any time"


def test_a_switch_to_another_one_comes_first():
    made = play()
    made.ask(0, 1, "a")
    assert wait(made, "b", 10.0) > 20.0 + 30.0


def test_a_switch_to_it_has_a_rest():
    made = play()
    made.asleep("a")
    made.awake("b")
    made.ask(1, 1, "a")
    assert wait(made, "a", 1.0) > 2.0
    assert wait(made, "c", 1.0) > wait(made, "a", 1.0)


def test_those_who_have_waited_longer_are_before_it():
    made = play()
    made.awake("a")
    made.ask(1, 1, "a")
    made.ask(2, 2, "b")
    alone = wait(made, "c", 3.0)
    made.ask(3, 3, "c")
    assert wait(made, "c", 3.0) == alone
    made.at(4, e.ClientLeft(2))
    assert wait(made, "c", 4.0) < alone


def test_a_failure_is_waited_out():
    made = play()
    made.ask(0, 1, "a")
    made.fails(1, "a")
    made.done(1, "a")
    assert wait(made, "a", 1.0) >= made.model("a").retry_at - 1.0


def test_a_full_engine_answers_first():
    made = Play(spec("a", max_in_flight=2), costs={"a": COSTS})
    made.awake("a")
    answer = made.model("a").costs.answer.value
    for number in (1, 2, 3, 4):
        made.ask(1, number, "a")
    assert outlook_of(made.state, 1, 1) is None, "it does not wait"
    assert outlook_of(made.state, 3, 1) == Outlook(1, answer)
    assert outlook_of(made.state, 4, 1) == Outlook(2, answer)
    assert outlook_of(made.state, 99, 1) is None
    assert wait(made, "a", 1) == 2 * answer


def test_an_engine_that_may_be_dead_is_given_a_moment():
    made = play()
    made.awake("a")
    made.ask(1, 1, "a")
    made.at(1, e.RequestBounced(1))
    assert 0 < wait(made, "a", 1) <= 1.5


def test_an_eviction_by_itself_is_only_over_when_it_is():
    made = Play(spec("a", STOP), spec("b"), costs=dict.fromkeys("ab", COSTS))
    made.awake("a")
    made.at(1, e.OperatorSleep(7, "a"))
    assert wait(made, "b", 1) > wait(made, "b", 2)


def test_retry_after_is_what_is_expected():
    made = Play(spec("a", max_queue=1), costs={"a": COSTS})
    made.ask(0, 1, "a")
    made.ask(0, 2, "a")
    (refusal,) = [x for x in made.commands if isinstance(x, c.Refuse)]
    assert refusal.retry_after == 30.0
    made.done(1, "a")
    made.at(2, e.RequestFinished(1))
    assert made.ask(3, 3, "a") == ["forward 3"]
