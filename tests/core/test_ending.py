"""A handover: what there is is served until the deadline, the rest is ended, and the engines come to rest."""

from __future__ import annotations

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.settings import InFlight
from tests.core.playbook import Play, spec


def handed_over(play: Play) -> bool:
    return c.HandedOver() in play.notices()


def test_with_nothing_to_do_it_is_over_at_once():
    play = Play()
    play.awake("a")
    assert play.at(1, e.HandOver(30.0)) == []
    assert handed_over(play)
    assert play.switcher.next_deadline is None


def test_it_is_said_once():
    play = Play()
    play.at(1, e.HandOver(30.0))
    assert handed_over(play)
    play.tick(2)
    assert not handed_over(play)


def test_what_is_in_flight_ends_first():
    play = Play()
    play.awake("a")
    assert play.ask(1, 1, "a") == ["forward 1"]
    play.at(2, e.HandOver(30.0))
    assert not handed_over(play)
    play.at(3, e.RequestFinished(1))
    assert handed_over(play)


def test_switches_go_on_for_those_who_wait():
    play = Play()
    play.awake("a")
    assert play.ask(1, 1, "b") == ["sleep a offload+keep_running wait"]
    play.at(2, e.HandOver(30.0))
    assert play.done(3, "a") == ["start b"]
    assert play.done(4, "b") == ["forward 1"]
    assert play.ask(5, 2, "c") == [], "it came over a connection that was there before"
    assert play.at(6, e.RequestFinished(1)) == ["sleep b offload+keep_running wait"]
    assert play.done(7, "b") == ["start c"]
    assert play.done(8, "c") == ["forward 2"]
    assert play.at(9, e.RequestFinished(2)) == []
    assert handed_over(play)


def test_at_the_deadline_the_rest_is_ended_and_the_engines_are_left():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(1, 2, "b")
    play.at(2, e.HandOver(30.0))
    assert play.switcher.next_deadline == 30.0
    assert play.tick(30.0) == ["abort 1", "refuse 2 shutting_down"]
    assert handed_over(play)
    assert play.model("a").state.value == "awake"
    assert play.ask(31, 3, "a") == ["refuse 3 shutting_down"]


def test_the_refusal_says_that_one_may_come_back():
    play = Play()
    play.ask(1, 1, "a")
    play.at(2, e.HandOver(2.0))
    (refusal,) = [x for x in play.commands if isinstance(x, c.Refuse)]
    assert (refusal.message, refusal.retry_after) == ("llmuxd is being restarted", 1.0)


def test_an_engine_that_falls_asleep_or_wakes_is_waited_for():
    play = Play()
    play.asleep("b")
    play.awake("a")
    play.ask(1, 1, "b")
    play.at(2, e.HandOver(2.0))
    assert not handed_over(play)
    assert play.done(3, "a") == [], "and nothing follows: nobody wants b any more"
    assert handed_over(play)


def test_an_engine_that_starts_is_left_to_the_next_daemon():
    play = Play()
    play.ask(1, 1, "a")
    assert play.at(2, e.HandOver(2.0)) == ["refuse 1 shutting_down"]
    assert handed_over(play)


def test_an_engine_that_hangs_in_between_is_stopped_first():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "b")
    play.at(2, e.HandOver(2.0))
    assert play.tick(play.model("a").deadline) == ["stop a"]
    play.done(300, "a")
    assert handed_over(play)


def test_an_outdated_engine_is_the_next_daemons_business():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    play.at(
        2,
        e.Reload(
            tuple(m.spec for m in play.state.models.values()), play.state.settings, play.switcher.policy, frozenset("a")
        ),
    )
    play.at(3, e.HandOver(4.0))
    assert play.tick(4.0) == ["abort 1"]
    assert play.model("a").state.value == "awake"


def test_parked_requests_get_their_turn_and_what_is_left_is_ended():
    play = Play(spec("a"), spec("b"), in_flight=InFlight.PARK)
    play.asleep("b")
    play.awake("a")
    play.ask(1, 1, "a")
    assert play.ask(2, 2, "b") == ["sleep a offload+keep_running keep"]
    play.done(3, "a")
    assert play.done(4, "b") == ["forward 2"]
    assert play.at(5, e.HandOver(30.0)) == ["sleep b offload+keep_running keep"]
    assert play.done(6, "b") == ["wake a offload+keep_running"]
    play.done(7, "a")
    assert play.at(8, e.RequestFinished(1)) == ["sleep a offload+keep_running wait"]
    assert play.done(9, "a") == ["wake b offload+keep_running"]
    play.done(10, "b")
    assert play.tick(30.0) == ["abort 2"]
    assert handed_over(play)


def test_operators_are_told():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    play.at(2, e.OperatorWake(7, "b"))
    play.at(2, e.OperatorWake(8, "c"))
    assert play.at(3, e.HandOver(30.0)) == ["job 8 failed"]
    assert play.at(4, e.OperatorStop(9, "a")) == ["job 9 failed"]
    assert play.tick(30.0) == ["abort 1", "job 7 failed"]


def test_again_it_hurries_and_never_takes_longer():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    play.at(2, e.HandOver(30.0))
    play.at(3, e.HandOver(60.0))
    assert play.switcher.next_deadline == 30.0
    assert play.at(4, e.HandOver(4.0)) == ["abort 1"]
    assert handed_over(play)


def test_a_shutdown_takes_its_place_and_not_the_other_way_round():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    play.at(2, e.HandOver(30.0))
    assert play.at(3, e.Shutdown(60.0)) == []
    assert play.switcher.next_deadline == 60.0
    play.at(4, e.HandOver(4.0))
    assert play.at(5, e.RequestFinished(1)) == ["stop a"]
    assert play.done(6, "a") == ["all stopped"]
    assert not handed_over(play)


def test_idle_models_are_not_put_to_sleep_any_more():
    play = Play(spec("a", ttl=5.0), spec("b"))
    play.awake("a")
    play.at(1, e.HandOver(30.0))
    assert play.tick(10) == []
