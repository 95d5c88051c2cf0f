"""Engines that fail: at start, in service, asleep, in every transition; backoff; deadlines."""

from __future__ import annotations

import pytest

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.settings import InFlight, Placement
from tests.core.playbook import OFFLOAD, Play, spec


def test_a_start_that_fails_is_reported_at_once_and_cleaned_up():
    play = Play()
    play.ask(0, 1, "a")
    assert play.fails(2, "a", "no such file") == ["stop a", "refuse 1 model_unavailable"]
    (refused,) = [x for x in play.commands if isinstance(x, c.Refuse)]
    assert refused.message == "a cannot be loaded: no such file"
    assert refused.retry_after == 1.0
    assert play.done(3, "a") == []
    assert play.model("a").state is S.NOT_STARTED, "its backoff was over by then"


def test_backoff_doubles_and_is_capped_and_ends_with_an_answer():
    play = Play(backoff_base=2.0, backoff_cap=10.0)
    now = 0.0
    for delay in (2, 4, 8, 10, 10):
        play.ask(now, int(now) + 1, "a")
        assert play.fails(now + 1, "a")[0] == "stop a"
        assert play.model("a").retry_at == now + 1 + delay
        play.done(now + 1, "a")
        assert play.model("a").state is S.FAILED
        assert play.ask(now + 2, int(now) + 2, "a") == [f"refuse {int(now) + 2} model_unavailable"]
        now += 1 + delay
    play.ask(now, 500, "a")
    play.done(now, "a")
    assert play.model("a").last_error == "boom"
    play.at(now, e.RequestFinished(500, ok=False))
    assert play.model("a").failures == 5, "an answer that broke off proves nothing"
    play.ask(now, 501, "a")
    play.at(now, e.RequestFinished(501))
    assert (play.model("a").failures, play.model("a").last_error) == (0, "")


def test_the_delay_stays_finite_however_often_it_fails():
    play = Play()
    play.model("a").failures = 5000
    play.ask(0, 1, "a")
    play.fails(1, "a")
    assert play.model("a").retry_at == 301.0


def test_a_failed_state_shows_its_reason():
    play = Play()
    play.ask(0, 1, "a")
    play.fails(1, "a", "bad weights")
    play.done(1, "a")
    assert play.notices()[0] == c.EngineChanged("a", S.STOPPING, S.FAILED, 0, "bad weights")


def test_an_engine_that_dies_in_service_is_started_again_at_once_the_first_time():
    play = Play()
    play.awake("a")
    assert play.dies(1, "a") == ["stop a"]
    assert play.ask(1.5, 1, "a") == []
    assert play.done(2, "a") == ["start a"]
    play.done(3, "a")
    assert play.dies(4, "a", "again") == ["stop a"]
    assert play.ask(4, 2, "a") == ["refuse 2 model_unavailable"]


def test_an_engine_that_dies_asleep_costs_nobody_anything():
    play = Play()
    play.asleep("a")
    assert play.dies(1, "a") == ["stop a"]
    assert play.done(2, "a") == []
    assert play.ask(3, 1, "a") == ["start a"]


def test_a_failing_model_does_not_hold_up_the_others():
    play = Play()
    play.ask(0, 1, "a")
    play.ask(1, 2, "b")
    assert play.fails(2, "a") == ["stop a", "refuse 1 model_unavailable"]
    assert play.done(3, "a") == ["start b"]


def test_a_model_that_failed_does_not_make_those_wait_again_who_have_waited_since_before():
    play = Play(spec("a"), spec("b", placement=Placement({"gpu": 2})), spec("c"), devices={"gpu": 2})
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(2, 2, "c")
    play.ask(3, 3, "b")
    assert play.dies(4, "a") == ["stop a"]
    play.at(4, e.RequestBounced(1))
    play.done(5, "a")
    # The request for a is the oldest, and a could be started beside c; but it is a that failed.
    assert play.done(6, "c") == ["forward 2"]
    assert play.state.switch.target == "b"
    assert play.at(7, e.RequestFinished(2)) == ["sleep c offload+keep_running wait"]
    assert play.done(8, "c") == ["start b"]
    play.done(9, "b")
    assert play.at(10, e.RequestFinished(3)) == ["sleep b offload+keep_running wait"]
    assert play.done(11, "b") == ["start a"]


def test_an_engine_that_dies_while_it_is_drained_is_out_of_the_way():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(2, 2, "b")
    assert play.dies(3, "a") == ["stop a"]
    assert play.at(3, e.RequestBounced(1)) == []
    assert play.done(4, "a") == ["start b"]
    play.done(5, "b")
    play.at(6, e.RequestFinished(2))
    assert play.done(7, "b") == ["start a"]
    assert play.done(8, "a") == ["forward 1"]


def test_a_sleep_that_fails_becomes_a_stop():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "b")
    assert play.fails(2, "a", "assertion") == ["stop a"]
    assert play.model("a").last_error == "sleep failed: assertion"
    assert play.done(3, "a") == ["start b"]
    assert play.model("a").state is S.NOT_STARTED
    assert play.model("a").failures == 0


def test_an_engine_that_dies_as_it_falls_asleep_is_cleaned_up_once():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "b")
    old = play.model("a").op
    assert play.dies(2, "a") == ["stop a"]
    assert play.at(2, e.OperationFailed("a", old, e.FailureKind.DIED, "reset")) == []
    assert play.done(3, "a") == ["start b"]


def wakes_a_for_b() -> Play:
    play = Play()
    play.asleep("a")
    play.awake("b")
    play.ask(1, 1, "a")
    assert play.done(2, "b") == ["wake a offload+keep_running"]
    return play


@pytest.mark.parametrize("kind", ["died", "refused", "timeout", "lied"])
def test_an_engine_that_does_not_wake_is_started_anew_for_those_who_wait(kind):
    play = wakes_a_for_b()
    assert play.fails(3, "a", "boom", kind) == ["stop a"]
    assert play.done(4, "a") == ["start a"]
    assert play.done(5, "a") == ["forward 1"]
    assert c.SwitchEnded(4, "a", ("b",), 4, error="") in play.notices()
    assert play.model("a").failures == 0


def test_one_that_neither_wakes_nor_starts_is_stopped_and_those_who_wait_are_answered():
    play = wakes_a_for_b()
    play.fails(3, "a")
    play.done(4, "a")
    assert play.fails(5, "a", "bang") == ["stop a", "refuse 1 model_unavailable"]
    assert c.SwitchEnded(4, "a", ("b",), 4, error="bang") in play.notices()
    assert play.done(6, "a") == []
    assert play.ask(7, 2, "b") == ["wake b offload+keep_running"]


def test_the_death_of_an_engine_that_wakes_is_told_by_its_operation():
    play = wakes_a_for_b()
    assert play.dies(3, "a") == []
    assert play.fails(3, "a", "killed", "died") == ["stop a"]
    assert play.done(4, "a") == ["start a"]


def test_out_of_memory_makes_certain_room_and_tries_once_more():
    play = Play()
    play.asleep("a")
    play.awake("b")
    play.ask(1, 1, "c")
    play.done(2, "b")
    # One of the sleepers lies about the memory it gave back.
    assert play.fails(3, "c", "out of memory", "out_of_memory") == ["stop a", "stop b", "stop c"]
    play.done(4, "a")
    play.done(4, "c")
    assert play.done(5, "b") == ["start c"]
    assert play.done(6, "c") == ["forward 1"]


def test_out_of_memory_a_second_time_is_a_failure():
    play = Play()
    play.asleep("a")
    play.ask(1, 1, "b")
    assert play.fails(2, "b", "out of memory", "out_of_memory") == ["stop a", "stop b"]
    play.done(3, "b")
    assert play.done(3, "a") == ["start b"]
    assert play.fails(4, "b", "out of memory", "out_of_memory") == ["stop b", "refuse 1 model_unavailable"]


def test_out_of_memory_without_sleepers_is_a_failure():
    play = Play()
    play.ask(1, 1, "b")
    assert play.fails(2, "b", "out of memory", "out_of_memory") == ["stop b", "refuse 1 model_unavailable"]


@pytest.mark.parametrize(
    ("overdue", "out", "then"),
    [
        (S.STARTING, ["stop a", "refuse 1 model_unavailable"], []),
        (S.WAKING, ["stop a"], ["start a"]),
        (S.FALLING_ASLEEP, ["stop a"], ["start b"]),
        (S.STOPPING, ["stop a"], ["start b"]),
    ],
)
def test_no_transition_lasts_for_ever(overdue, out, then):
    play = Play(
        spec("a", start_timeout=30.0),
        spec("b"),
        request_timeout=10000.0,
        wake_timeout=30.0,
        stop_grace=30.0,
        sleep_timeout=30.0,
    )
    if overdue is S.STARTING:
        play.ask(0, 1, "a")
    elif overdue is S.WAKING:
        play.asleep("a")
        play.ask(0, 1, "a")
    else:
        play.awake("a")
        play.ask(0, 1, "b")
        if overdue is S.STOPPING:
            play.dies(0, "a")
    assert play.model("a").state is overdue
    assert play.switcher.next_deadline == 40.0
    assert play.tick(39) == []
    assert play.tick(40) == out
    brought_back = "it could not be brought back: " if overdue is S.WAKING else ""
    assert play.model("a").last_error == f"{brought_back}{overdue.value} for 40 s, which is too long"
    assert play.done(41, "a") == then
    assert play.model("a").state in ((S.STARTING,) if overdue is S.WAKING else (S.NOT_STARTED, S.FAILED))


def test_an_engine_that_survives_its_stop_is_stopped_again_later():
    play = Play(stop_grace=5.0)
    play.awake("a")
    play.ask(1, 1, "b")
    play.fails(2, "a")
    assert play.fails(3, "a", "pid 7 survives SIGKILL") == [], "not in a hot loop"
    assert play.model("a").last_error == "pid 7 survives SIGKILL"
    assert play.switcher.next_deadline == 17.0
    assert play.tick(17) == ["stop a"]
    assert play.done(18, "a") == ["start b"]


def test_the_target_dies_before_its_switch_comes_to_it():
    play = Play()
    play.asleep("b")
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(2, 2, "b")
    assert play.dies(3, "b") == ["stop b"]
    play.done(4, "b")
    assert play.at(5, e.RequestFinished(1)) == ["sleep a offload+keep_running wait"]
    assert play.done(6, "a") == ["start b"]


def test_the_target_fails_for_good_while_the_others_fall_asleep_for_it():
    play = Play()
    play.asleep("b")
    play.awake("a")
    play.model("b").failures = 3
    play.ask(2, 2, "b")
    assert play.model("a").state is S.FALLING_ASLEEP
    assert play.dies(3, "b", "killed") == ["stop b", "refuse 2 model_unavailable"]
    play.done(3, "b")
    assert play.done(4, "a") == []
    assert play.notices()[-1] == c.SwitchEnded(4, "b", ("a",), 2, error="killed")
    assert play.state.switch is None


def test_the_target_is_still_being_cleaned_up_when_its_turn_comes():
    play = Play()
    play.asleep("b")
    play.awake("a")
    play.ask(2, 2, "b")
    play.dies(3, "b")
    assert play.done(4, "a") == []
    assert play.done(5, "b") == ["start b"]


class TestPark:
    """Requests in flight at a switch that does not wait for them."""

    def test_they_are_kept_in_the_engine_and_are_demand_for_its_wake(self):
        play = Play(in_flight=InFlight.PARK, min_active=5.0)
        play.awake("a")
        play.ask(1, 1, "a")
        play.ask(2, 2, "b")
        assert play.tick(5) == ["sleep a offload+keep_running keep"]
        play.done(6, "a")
        assert play.done(7, "b") == ["forward 2"]
        assert play.at(8, e.RequestFinished(2)) == [], "b has its cooldown, too"
        assert play.tick(12) == ["sleep b offload+keep_running wait"]
        assert play.done(13, "b") == ["wake a offload+keep_running"]
        assert play.done(14, "a") == []
        assert play.model("a").in_flight.keys() == {1}
        assert play.at(15, e.RequestFinished(1)) == []

    def test_older_queued_requests_count_before_parked_ones(self):
        play = Play(in_flight=InFlight.PARK, min_active=5.0)
        play.awake("a")
        play.ask(1, 1, "a")
        play.ask(2, 2, "b")
        play.tick(5)
        play.ask(5.5, 3, "a")
        play.done(6, "a")
        play.done(7, "b")
        assert play.state.switch.target == "a"

    def test_a_parked_client_that_leaves_is_no_demand_any_more(self):
        play = Play(in_flight=InFlight.PARK)
        play.awake("a")
        play.ask(1, 1, "a")
        play.ask(2, 2, "b")
        play.done(3, "a")
        play.at(3, e.ClientLeft(1))
        assert play.done(4, "b") == ["forward 2"]
        assert play.state.switch is None

    def test_an_engine_too_old_is_drained(self):
        play = Play(in_flight=InFlight.PARK)
        play.ask(0, 1, "a")
        play.done(0, "a", can_park=False)
        assert play.ask(2, 2, "b") == []
        assert play.at(3, e.RequestFinished(1)) == ["sleep a offload+keep_running wait"]

    def test_an_engine_that_is_to_be_stopped_is_drained(self):
        play = Play(spec("a", type(OFFLOAD).parse("retain+stop")), spec("b"), in_flight=InFlight.PARK)
        play.awake("a")
        play.ask(1, 1, "a")
        assert play.ask(2, 2, "b") == []

    def test_without_drain_what_cannot_be_parked_is_cut(self):
        play = Play(spec("a", type(OFFLOAD).parse("retain+stop")), spec("b"), in_flight=InFlight.CUT)
        play.awake("a")
        play.ask(1, 1, "a")
        assert play.ask(2, 2, "b") == ["abort 1", "stop a"]
        assert play.state.requests.keys() == {2}

    def test_without_drain_what_can_be_parked_is_parked(self):
        play = Play(in_flight=InFlight.CUT)
        play.awake("a")
        play.ask(1, 1, "a")
        assert play.ask(2, 2, "b") == ["sleep a offload+keep_running keep"]
