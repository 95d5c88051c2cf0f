"""Finish before parking: what will be answered soon is waited for, the rest is parked when the time is over."""

from __future__ import annotations

from dataclasses import dataclass

from llmuxd.core import events as e
from llmuxd.core.policy import Decision, Snapshot, Stay, SwitchTo
from llmuxd.core.settings import InFlight, Placement
from tests.core.playbook import STOP, Play, spec


@dataclass
class Patient:
    """First come, first served, with so many seconds to finish."""

    drain_secs: float
    name: str = "patient"

    def bound(self, typical_switch_secs: float) -> float | None:
        return None

    def decide(self, snapshot: Snapshot) -> Decision:
        waiting = [(model.oldest_arrival or 0.0, model.name) for model, _ in snapshot.candidates]
        return SwitchTo(min(waiting)[1], drain_secs=self.drain_secs) if waiting else Stay()


def two_in_flight(drain_secs: float = 4.0, in_flight: InFlight = InFlight.PARK, **started: bool) -> Play:
    """a is awake since 0 and has 1 and 2 in flight."""
    play = Play(policy=Patient(drain_secs), in_flight=in_flight)
    assert play.ask(0, 1, "a") == ["start a"]
    assert play.done(0, "a", **started) == ["forward 1"]
    assert play.ask(1, 2, "a") == ["forward 2"]
    return play


def test_requests_that_end_in_time_are_not_parked():
    play = two_in_flight()
    assert play.ask(10, 3, "b") == []
    assert play.switcher.next_deadline == 14.0
    assert play.ask(11, 4, "a") == [], "nothing new begins meanwhile"
    assert play.at(11, e.RequestFinished(1)) == []
    assert play.at(12, e.RequestFinished(2)) == ["sleep a offload+keep_running wait"]


def test_the_rest_is_parked_when_the_time_is_over():
    play = two_in_flight()
    play.ask(10, 3, "b")
    play.at(11, e.RequestFinished(1))
    assert play.tick(13.9) == []
    assert play.tick(14) == ["sleep a offload+keep_running keep"]
    play.done(15, "a")
    assert play.done(16, "b") == ["forward 3"]
    assert play.at(17, e.RequestFinished(3)) == ["sleep b offload+keep_running wait"], "back to what was parked"
    assert play.done(18, "b") == ["wake a offload+keep_running"]
    assert play.done(19, "a") == []
    assert play.at(20, e.RequestFinished(2)) == []


def test_without_a_word_of_the_policy_they_are_parked_at_once():
    play = two_in_flight(drain_secs=0.0)
    assert play.ask(10, 3, "b") == ["sleep a offload+keep_running keep"]


def test_an_engine_that_cannot_park_is_drained_however_long_that_takes():
    play = two_in_flight(can_park=False)
    assert play.ask(10, 3, "b") == []
    assert play.tick(14) == []
    assert play.switcher.next_deadline == 110.0, "only the request's own"
    play.at(50, e.RequestFinished(1))
    assert play.at(60, e.RequestFinished(2)) == ["sleep a offload+keep_running wait"]


def test_in_drain_mode_the_time_to_finish_is_no_limit():
    play = two_in_flight(in_flight=InFlight.DRAIN)
    assert play.ask(10, 3, "b") == []
    assert play.tick(14) == []
    assert play.switcher.next_deadline == 110.0
    play.at(50, e.RequestFinished(1))
    assert play.at(60, e.RequestFinished(2)) == ["sleep a offload+keep_running wait"]


def test_in_cut_mode_there_is_none():
    play = two_in_flight(in_flight=InFlight.CUT)
    assert play.ask(10, 3, "b") == ["sleep a offload+keep_running keep"]


def test_an_operators_switch_does_not_wait():
    play = two_in_flight()
    assert play.ask(10, 3, "b") == []
    assert play.at(11, e.OperatorSwitch(7, "b")) == ["sleep a offload+keep_running keep"]


def test_a_switch_that_nobody_waits_for_any_more_lets_them_go_on():
    play = two_in_flight()
    play.ask(10, 3, "b")
    play.ask(11, 4, "a")
    assert play.at(12, e.ClientLeft(3)) == ["forward 4"]
    assert play.switcher.next_deadline is None


def test_one_victim_that_cannot_park_is_waited_for_and_the_other_parked_then():
    play = Play(
        spec("a"),
        spec("b", STOP),
        spec("c", placement=Placement({"gpu": 2})),
        policy=Patient(4.0),
        in_flight=InFlight.PARK,
        devices={"gpu": 2},
    )
    play.awake("a")
    play.awake("b")
    play.ask(1, 1, "a")
    play.ask(1, 2, "b")
    assert play.ask(10, 3, "c") == []
    assert play.tick(14) == []
    assert play.at(20, e.RequestFinished(2)) == ["sleep a offload+keep_running keep", "stop b"]


def test_hasty_policies_cannot_park_two_models_in_turns_for_ever():
    """Each turn that answers nothing makes the next one twice as long, so that an answer of 5 s is given in the end."""
    play = Play(policy=Patient(0.0), in_flight=InFlight.PARK)
    play.awake("a")
    play.ask(1, 1, "a")
    assert play.ask(2, 2, "b") == ["sleep a offload+keep_running keep"]
    now, turns = 2.0, []
    awake, other = "b", "a"
    play.done(now, "a")
    play.done(now, "b")
    for _ in range(6):
        assert play.model(other).parked()
        due = play.switcher.next_deadline
        assert due is not None
        turns.append(due - now)
        now = due
        assert play.tick(now)[0] == f"sleep {awake} offload+keep_running keep"
        play.done(now, awake)
        play.done(now, other)
        awake, other = other, awake
    assert turns == [1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert play.at(now + 5, e.RequestFinished(1 if awake == "a" else 2)) == [f"sleep {awake} offload+keep_running wait"]
    assert play.model(awake).barren_turns == 0
