"""Requests: queues, bounds, timeouts, clients that leave, answers that break off."""

from __future__ import annotations

import pytest

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.state import IllegalEvent
from tests.core.playbook import Play, spec


def refusal(play: Play) -> c.Refuse:
    (found,) = [x for x in play.commands if isinstance(x, c.Refuse)]
    return found


def test_a_request_that_waits_too_long_is_refused_and_the_start_goes_on():
    play = Play()
    play.ask(0, 1, "a")
    play.ask(5, 2, "a")
    assert play.switcher.next_deadline == 100.0
    assert play.tick(100) == ["refuse 1 queue_timeout"]
    assert "waited 100 s for a (now starting)" in refusal(play).message
    assert play.switcher.next_deadline == 105.0
    assert play.tick(105) == ["refuse 2 queue_timeout"]
    assert play.done(200, "a") == []
    assert play.ask(201, 3, "a") == ["forward 3"]


def test_a_patient_request_has_no_timeout():
    play = Play()
    play.ask(0, 1, "a", patient=True)
    assert play.tick(1000) == []
    assert play.done(1001, "a") == ["forward 1"]


def test_a_forwarded_request_has_no_timeout():
    play = Play()
    play.awake("a")
    assert play.ask(1, 1, "a") == ["forward 1"]
    assert play.switcher.next_deadline is None
    assert play.tick(1000) == []
    assert play.at(1001, e.RequestFinished(1)) == []


def test_the_queue_of_a_model_is_bounded():
    play = Play(spec("a", max_queue=1), spec("b"))
    play.ask(0, 1, "a")
    assert play.ask(1, 2, "a") == ["refuse 2 queue_full"]
    assert refusal(play).message == "the queue of a is full (1 requests waiting)"
    assert play.at(2, e.ClientLeft(1)) == []
    assert play.ask(3, 3, "a") == []


def test_all_queues_together_are_bounded():
    play = Play(max_queue=2)
    play.ask(0, 1, "a")
    play.ask(0, 2, "b")
    assert play.ask(0, 3, "c") == ["refuse 3 queue_full"]
    assert refusal(play).message == "the queue is full (2 requests waiting)"


def test_a_model_takes_so_many_requests_at_once():
    play = Play(spec("a", max_in_flight=2))
    play.awake("a")
    assert play.ask(1, 1, "a") == ["forward 1"]
    assert play.ask(1, 2, "a") == ["forward 2"]
    assert play.ask(1, 3, "a") == []
    assert play.ask(1, 4, "a") == []
    assert play.at(2, e.RequestFinished(2)) == ["forward 3"]
    assert play.at(3, e.ClientLeft(1)) == ["forward 4"]


def test_clients_leave_the_queue_and_the_engine():
    play = Play()
    play.ask(0, 1, "a")
    play.ask(0, 2, "a")
    play.at(1, e.ClientLeft(1))
    assert play.done(2, "a") == ["forward 2"]
    play.at(3, e.ClientLeft(2))
    assert play.model("a").in_flight == {}
    assert play.state.requests == {}


def test_a_request_whose_engine_dies_before_it_answers_is_retried_once_in_front_of_the_others():
    play = Play(spec("a", max_in_flight=1), spec("b"))
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(2, 2, "a")
    assert play.at(3, e.RequestBounced(1)) == []
    assert play.dies(3.5, "a") == ["stop a"]
    assert play.done(4, "a") == ["start a"]
    assert play.done(9, "a") == ["forward 1"]
    assert play.at(10, e.RequestBounced(1)) == ["refuse 1 engine_died"]
    assert play.switcher.next_deadline == 11.5
    assert play.tick(11.5) == ["forward 2"], "its engine had not died after all"


def test_nothing_is_sent_to_an_engine_whose_death_is_not_known_yet():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    assert play.at(2, e.RequestBounced(1)) == []
    assert play.ask(3, 2, "a") == []
    assert play.switcher.next_deadline == 3.5
    assert play.tick(3.4) == []
    assert play.tick(3.5) == ["forward 1", "forward 2"]


def test_once_the_death_is_known_a_quick_restart_is_not_held_up():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    play.at(2, e.RequestBounced(1))
    play.dies(2.1, "a")
    assert play.done(2.2, "a") == ["start a"]
    assert play.done(2.3, "a") == ["forward 1"]


def test_a_retried_request_gets_its_waiting_time_anew():
    play = Play()
    play.awake("a")
    play.ask(0, 1, "a")
    play.at(500, e.RequestBounced(1))
    play.dies(500, "a")
    assert play.done(501, "a") == ["start a"]
    assert play.tick(599) == []
    assert play.tick(600) == ["refuse 1 queue_timeout"]


def test_a_patient_request_stays_patient_when_it_is_retried():
    play = Play()
    play.awake("a")
    play.ask(0, 1, "a", patient=True)
    play.at(1, e.RequestBounced(1))
    play.dies(1, "a")
    play.done(2, "a")
    assert play.tick(1000) == []
    assert play.done(1001, "a") == ["forward 1"]


def test_a_request_that_bounces_off_an_engine_that_keeps_dying_is_told_why():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(1, 2, "a")
    play.at(2, e.RequestBounced(1))
    play.dies(2, "a", "first")
    play.done(3, "a")
    play.done(4, "a")
    assert play.dies(5, "a", "second") == ["stop a"]
    assert play.model("a").blocked(5)
    assert play.at(5, e.RequestBounced(2)) == ["refuse 2 model_unavailable"]
    assert "second" in refusal(play).message


def test_events_that_cannot_have_happened_change_nothing():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(1, 2, "b")
    before = repr(play.state)
    for event in (
        e.RequestArrived(3, "nobody"),
        e.RequestArrived(1, "a"),
        e.RequestFinished(2),
        e.RequestFinished(99),
        e.RequestBounced(2),
        e.RequestBounced(99),
        e.ClientLeft(99),
        e.EngineStarted("a", 99),
        e.EngineStarted("a", play.model("a").op),
        e.EngineSlept("a", play.model("a").op),
        e.EngineWoke("a", play.model("a").op),
        e.EngineStopped("a", play.model("a").op),
        e.OperationFailed("a", play.model("a").op, e.FailureKind.REFUSED, "?"),
        e.EngineDied("a", 99, "?"),
        e.OperatorWake(1, "nobody"),
    ):
        with pytest.raises(IllegalEvent):
            play.switcher.handle(event, 2)
        assert repr(play.state) == before, event


def test_reports_of_operations_that_were_superseded_are_void():
    play = Play()
    play.asleep("a")
    play.ask(1, 1, "a")
    old = play.model("a").op
    play.at(2, e.OperatorStop(7, "a"))
    for event in (
        e.EngineStarted("a", old),
        e.EngineSlept("a", old),
        e.EngineWoke("a", old),
        e.EngineStopped("a", old),
        e.OperationFailed("a", old, e.FailureKind.DIED, "?"),
        e.EngineDied("a", 0, "?"),
        e.EngineDied("a", play.model("a").incarnation, "?"),
    ):
        assert play.at(3, event) == []
    assert play.done(4, "a") == ["job 7 done"]
    assert play.dies(5, "a") == []


class TestAClientThatWillNotWaitForEver:
    def test_is_refused_when_its_time_is_over(self):
        play = Play()
        assert play.ask(0, 1, "a", most_wait=5.0) == ["start a"]
        assert play.switcher.next_deadline == 5.0
        assert play.tick(5.0) == ["refuse 1 queue_timeout"]
        assert refusal(play).message == "waited 5 s for a (now starting), longer than it wanted to"
        assert refusal(play).retry_after == 55.0, "what a start is taken to need still"

    def test_waits_no_longer_than_all_for_all_that(self):
        play = Play()
        play.ask(0, 1, "a", most_wait=1e9)
        assert play.switcher.next_deadline == 100.0

    def test_that_will_not_wait_at_all_is_served_or_refused_at_once_and_loads_nothing(self):
        play = Play()
        assert play.ask(0, 1, "a", most_wait=0.0) == ["refuse 1 queue_timeout"]
        assert refusal(play).message == "a is not_started, and the request does not want to wait"
        play.awake("a", 1)
        assert play.ask(2, 2, "a", most_wait=0.0) == ["forward 2"]
        assert play.ask(3, 3, "b", most_wait=0.0) == ["refuse 3 queue_timeout"]

    def test_gets_the_same_time_again_when_its_engine_dies(self):
        play = Play()
        play.awake("a")
        play.ask(1, 1, "a", most_wait=7.0)
        play.at(2, e.RequestBounced(1))
        assert play.state.requests[1].deadline == 9.0
