"""What operators ask for: switch, wake, sleep, stop, pin, mode, eviction, shutdown."""

from __future__ import annotations

import pytest

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.settings import Placement
from llmuxd.core.state import IllegalEvent, SwitchMode
from tests.core.playbook import DISCARD, OFFLOAD, STOP, Play, spec


def reason(play: Play) -> str:
    (found,) = [x.reason for x in play.commands if isinstance(x, c.JobFailed)]
    return found


class TestWakeAndSwitch:
    def test_a_wake_goes_through_the_switcher(self):
        play = Play(min_active=5.0)
        play.awake("a")
        play.ask(1, 1, "a")
        assert play.at(1, e.OperatorWake(7, "b")) == []
        assert play.tick(5) == []
        assert play.at(6, e.RequestFinished(1)) == ["sleep a offload+keep_running wait"]
        assert play.done(7, "a") == ["start b"]
        assert play.done(8, "b") == ["job 7 done"]
        assert play.commands[-1] == c.JobDone(7, "b is awake")

    def test_a_switch_does_not_wait_for_the_cooldown(self):
        play = Play(min_active=5.0)
        play.awake("a")
        assert play.at(1, e.OperatorSwitch(7, "b")) == ["sleep a offload+keep_running wait"]

    def test_what_is_awake_is_left_alone(self):
        play = Play()
        play.awake("a")
        assert play.at(1, e.OperatorWake(7, "a")) == ["job 7 done"]
        assert play.notices() == []

    def test_jobs_wait_in_line_and_join_the_switch_they_want(self):
        play = Play()
        assert play.at(0, e.OperatorWake(1, "a")) == ["start a"]
        assert play.at(0, e.OperatorWake(2, "b")) == []
        assert play.at(0, e.OperatorSwitch(3, "a")) == []
        assert play.done(1, "a") == ["job 1 done", "job 3 done", "sleep a offload+keep_running wait"]
        play.done(2, "a")
        assert play.done(3, "b") == ["job 2 done"]

    def test_a_switch_takes_the_place_of_one_that_only_requests_want(self):
        play = Play(min_active=5.0)
        play.awake("a")
        play.ask(1, 1, "b")
        assert play.at(2, e.OperatorSwitch(7, "c")) == ["sleep a offload+keep_running wait"]
        assert play.done(3, "a") == ["start c"]
        play.done(4, "c")
        assert play.state.switch.target == "b"

    def test_a_switch_waits_for_one_that_has_begun_to_put_models_to_sleep(self):
        play = Play()
        play.awake("a")
        assert play.ask(1, 1, "b") == ["sleep a offload+keep_running wait"]
        assert play.at(2, e.OperatorSwitch(7, "c")) == []
        play.done(3, "a")
        assert play.done(4, "b") == ["forward 1"]
        assert play.state.switch.target == "c"

    def test_a_switch_hurries_the_one_to_its_model(self):
        play = Play(min_active=5.0)
        play.awake("a")
        play.ask(1, 1, "b")
        assert play.at(2, e.OperatorSwitch(7, "b")) == ["sleep a offload+keep_running wait"]

    def test_a_failure_is_told(self):
        play = Play()
        play.at(0, e.OperatorWake(7, "a"))
        assert play.fails(1, "a", "no such file") == ["stop a", "job 7 failed"]
        assert reason(play) == "no such file"

    def test_it_may_try_what_requests_may_not(self):
        play = Play()
        play.ask(0, 1, "a")
        play.fails(1, "a")
        play.done(1, "a")
        assert play.ask(1, 2, "a") == ["refuse 2 model_unavailable"]
        assert play.at(1.5, e.OperatorWake(7, "a")) == ["start a"]


class TestSleepAndStop:
    def test_sleep_drains_and_uses_the_policy_of_the_model(self):
        play = Play(min_active=50.0)
        play.awake("a")
        play.ask(1, 1, "a")
        assert play.at(2, e.OperatorSleep(7, "a")) == []
        assert play.at(3, e.RequestFinished(1)) == ["sleep a offload+keep_running wait"]
        assert play.done(4, "a") == ["job 7 done"]
        assert play.commands[-1] == c.JobDone(7, "a is asleep (offload+keep_running)")

    def test_sleep_by_another_policy(self):
        play = Play()
        play.awake("a")
        assert play.at(2, e.OperatorSleep(7, "a", DISCARD)) == ["sleep a discard+keep_running wait"]
        play.done(3, "a")
        assert play.ask(4, 1, "a") == ["wake a discard+keep_running"]

    def test_sleep_of_what_sleeps(self):
        play = Play()
        play.asleep("a")
        assert play.at(1, e.OperatorSleep(7, "a")) == ["job 7 done"]
        assert play.at(1, e.OperatorSleep(8, "a", OFFLOAD)) == ["job 8 done"]
        assert play.at(1, e.OperatorSleep(9, "a", DISCARD)) == ["job 9 failed"]
        assert "asleep (offload+keep_running) already" in reason(play)
        assert play.at(1, e.OperatorSleep(10, "a", STOP)) == ["stop a"]
        assert play.done(2, "a") == ["job 10 done"]

    def test_sleep_of_what_does_not_run(self):
        play = Play()
        assert play.at(1, e.OperatorSleep(7, "a")) == ["job 7 done"]
        assert play.commands == [c.JobDone(7, "a is stopped")]

    def test_sleep_of_what_is_starting_waits_for_it(self):
        play = Play()
        play.ask(0, 1, "a")
        assert play.at(1, e.OperatorSleep(7, "a")) == []
        assert play.done(2, "a") == ["forward 1"]
        assert play.at(3, e.RequestFinished(1)) == ["sleep a offload+keep_running wait"]

    def test_a_sleep_that_fails_stops_and_says_so(self):
        play = Play()
        play.awake("a")
        play.at(1, e.OperatorSleep(7, "a"))
        assert play.fails(2, "a") == ["stop a"]
        assert play.done(3, "a") == ["job 7 done"]
        assert play.commands[-1] == c.JobDone(7, "a is stopped")

    def test_stop_drains(self):
        play = Play()
        play.awake("a")
        play.ask(1, 1, "a")
        assert play.at(2, e.OperatorStop(7, "a")) == []
        assert play.at(3, e.RequestFinished(1)) == ["stop a"]
        assert play.done(4, "a") == ["job 7 done"]

    def test_a_second_stop_does_not_wait(self):
        play = Play()
        play.awake("a")
        play.ask(1, 1, "a")
        play.at(2, e.OperatorStop(7, "a"))
        assert play.at(3, e.OperatorStop(8, "a")) == ["abort 1", "stop a"]
        assert play.done(4, "a") == ["job 7 done", "job 8 done"]

    def test_stop_refuses_what_waits_and_ends_a_start(self):
        play = Play()
        play.ask(0, 1, "a")
        assert play.at(1, e.OperatorStop(7, "a")) == ["refuse 1 model_unavailable", "stop a"]
        assert play.done(2, "a") == ["job 7 done"]
        assert play.model("a").state is S.NOT_STARTED
        assert play.ask(3, 2, "a") == ["start a"]

    def test_stop_of_what_sleeps_or_does_not_run(self):
        play = Play()
        play.asleep("a")
        assert play.at(1, e.OperatorStop(7, "a")) == ["stop a"]
        assert play.at(1, e.OperatorStop(8, "a")) == []
        assert play.done(2, "a") == ["job 7 done", "job 8 done"]
        assert play.at(3, e.OperatorStop(9, "a")) == ["job 9 done"]


class TestManual:
    def test_it_never_switches_by_itself(self):
        play = Play()
        play.awake("a")
        play.at(1, e.SetMode(manual=True))
        assert play.ask(2, 1, "a") == ["forward 1"]
        assert play.ask(2, 2, "b") == ["refuse 2 model_not_pinned"]
        assert play.at(3, e.OperatorSwitch(7, "b")) == []
        assert play.ask(3, 3, "b") == [], "it is asked for"
        assert play.at(4, e.RequestFinished(1)) == ["sleep a offload+keep_running wait"]
        play.done(5, "a")
        assert play.done(6, "b") == ["job 7 done", "forward 3"]
        assert play.state.mode.pinned == "b"

    def test_requests_for_what_an_operator_waits_in_line_for_are_kept(self):
        play = Play()
        play.at(0, e.SetMode(manual=True))
        assert play.at(0, e.OperatorWake(6, "a")) == ["start a"]
        play.at(0, e.OperatorWake(7, "b"))
        assert play.ask(1, 1, "b") == []
        assert play.ask(1, 2, "c") == ["refuse 2 model_not_pinned"]

    def test_it_ends_a_switch_that_only_requests_want_and_refuses_them(self):
        play = Play(min_active=5.0)
        play.awake("a")
        play.ask(1, 1, "b")
        assert play.at(2, e.SetMode(manual=True)) == ["refuse 1 model_not_pinned"]
        assert play.tick(5) == []

    def test_it_leaves_an_operators_switch_alone(self):
        play = Play(min_active=5.0)
        play.awake("a")
        play.at(1, e.OperatorWake(7, "b"))
        play.at(2, e.SetMode(manual=True))
        assert play.tick(5) == ["sleep a offload+keep_running wait"]

    def test_back_to_auto(self):
        play = Play()
        play.awake("a")
        play.at(1, e.Pin(7, "a"))
        play.at(2, e.SetMode(manual=False))
        assert play.switcher.mode == SwitchMode()
        assert play.ask(3, 1, "b") == ["sleep a offload+keep_running wait"]

    def test_pin_switches_and_refuses_the_others(self):
        play = Play()
        play.awake("a")
        assert play.at(1, e.Pin(7, "b")) == ["sleep a offload+keep_running wait"]
        assert play.ask(2, 1, "a") == ["refuse 1 model_not_pinned"]
        assert "b is pinned" in next(x.message for x in play.commands if isinstance(x, c.Refuse))
        play.done(2, "a")
        assert play.done(3, "b") == ["job 7 done"]

    def test_a_pinned_model_that_dies_is_started_again_when_it_is_wanted(self):
        play = Play()
        play.awake("a")
        play.at(1, e.Pin(7, "a"))
        play.dies(2, "a")
        assert play.done(3, "a") == []
        assert play.ask(4, 1, "a") == ["start a"]

    def test_a_pin_that_fails_leaves_the_mode_as_it_was(self):
        play = Play()
        play.awake("a")
        play.at(1, e.Pin(7, "b"))
        play.done(2, "a")
        assert play.fails(3, "b") == ["stop b", "job 7 failed"]
        assert play.switcher.mode == SwitchMode()

    def test_a_pinned_model_is_not_put_to_sleep_nor_pushed_out(self):
        play = Play()
        play.awake("a")
        play.at(1, e.Pin(7, "a"))
        assert play.at(2, e.OperatorSleep(8, "a")) == ["job 8 not allowed"]
        assert play.at(2, e.OperatorWake(9, "b")) == ["job 9 not allowed"]
        assert reason(play) == "a is pinned; unpin it first, or pin b instead"
        assert play.at(2, e.OperatorWake(10, "a")) == ["job 10 done"]

    def test_what_was_asked_for_before_the_pin_fails_where_it_needs_the_room(self):
        play = Play()
        play.ask(0, 1, "a")
        assert play.at(0, e.OperatorSwitch(7, "b")) == []
        assert play.at(0, e.Pin(8, "a")) == []
        assert play.done(1, "a") == ["job 8 done", "forward 1", "job 7 failed"]
        assert reason(play) == "a is pinned, and there is no room beside it"

    def test_stopping_a_pinned_model_unpins_it(self):
        play = Play()
        play.awake("a")
        play.at(1, e.Pin(7, "a"))
        assert play.at(2, e.OperatorStop(8, "a")) == ["stop a"]
        assert play.switcher.mode == SwitchMode()


def test_eviction_can_be_changed():
    play = Play()
    play.awake("a")
    play.at(1, e.SetEviction("a", STOP))
    assert play.ask(2, 1, "b") == ["stop a"]


class TestShutdown:
    def test_what_is_in_flight_finishes_what_waits_is_refused_all_engines_stop(self):
        play = Play()
        play.asleep("b")
        play.awake("a")
        play.ask(1, 1, "a")
        play.ask(1, 2, "c")
        assert play.at(2, e.Shutdown(60.0)) == ["refuse 2 shutting_down", "stop b"]
        assert play.ask(3, 3, "a") == ["refuse 3 shutting_down"]
        assert play.switcher.next_deadline == 42.0, "the stop's own deadline"
        assert play.done(4, "b") == []
        assert play.switcher.next_deadline == 60.0
        assert play.at(5, e.RequestFinished(1)) == ["stop a"]
        assert play.done(6, "a") == ["all stopped"]
        assert play.tick(7) == []

    def test_it_has_a_bound(self):
        play = Play()
        play.awake("a")
        play.ask(1, 1, "a")
        play.at(2, e.Shutdown(60.0))
        assert play.tick(60) == ["abort 1", "stop a"]
        assert play.done(61, "a") == ["all stopped"]

    def test_a_second_one_hurries_and_a_later_one_does_not_slow_it(self):
        play = Play()
        play.awake("a")
        play.ask(1, 1, "a")
        play.at(2, e.Shutdown(60.0))
        assert play.at(3, e.Shutdown(90.0)) == []
        assert play.state.shutdown_deadline == 60.0
        assert play.at(4, e.Shutdown(4.0)) == ["abort 1", "stop a"]

    def test_with_nothing_running_it_is_over_at_once(self):
        play = Play()
        assert play.at(0, e.Shutdown(60.0)) == ["all stopped"]

    def test_transitions_are_cut_short_and_operators_told(self):
        play = Play()
        play.at(0, e.OperatorWake(7, "a"))
        play.at(0, e.OperatorWake(8, "b"))
        assert play.at(1, e.Shutdown(60.0)) == ["job 7 failed", "job 8 failed", "stop a"]
        assert play.at(2, e.OperatorWake(9, "b")) == ["job 9 failed"]

    def test_requests_whose_engine_dies_meanwhile_are_not_retried(self):
        play = Play()
        play.awake("a")
        play.ask(1, 1, "a")
        play.at(2, e.Shutdown(60.0))
        assert play.at(3, e.RequestBounced(1)) == ["refuse 1 engine_died", "stop a"]

    def test_an_engine_that_dies_meanwhile_is_not_started_again(self):
        play = Play()
        play.awake("a")
        play.ask(1, 1, "a")
        play.at(2, e.Shutdown(60.0))
        assert play.dies(3, "a") == ["stop a"]
        assert play.done(4, "a") == []
        assert play.at(5, e.RequestFinished(1, ok=False)) == ["all stopped"]


@pytest.mark.parametrize(
    "event",
    [
        e.OperatorSwitch(1, "x"),
        e.OperatorSleep(1, "x"),
        e.OperatorStop(1, "x"),
        e.Pin(1, "x"),
        e.SetEviction("x", STOP),
    ],
)
def test_unknown_models_are_illegal(event):
    with pytest.raises(IllegalEvent):
        Play(spec("a")).switcher.handle(event, 0)


def test_a_model_that_is_idle_for_too_long_waits_behind_an_operator_without_a_stir():
    """The job cannot begin while an adopted engine starts, and the idle one goes after it: no timer is due meanwhile."""
    wide = spec("b", placement=Placement({"gpu": 2}))
    play = Play(spec("a", ttl=3.0), wide, spec("c"), devices={"gpu": 2})
    play.awake("a")
    play.at(1, e.EngineAdopted("c", 100, starting=True))
    assert play.at(2, e.OperatorWake(1, "b")) == []
    assert play.tick(4) == []
    deadline = play.switcher.next_deadline
    assert deadline is not None
    assert deadline > 4


def test_what_is_pinned_does_not_go_for_a_request_whatever_the_mode_says():
    """The two never differ; if they did, nothing would be begun that cannot come to its end."""
    play = Play()
    play.awake("a")
    play.state.mode = SwitchMode(manual=False, pinned="a")
    assert play.switcher.handle(e.RequestArrived(1, "b"), 1) == []
    assert play.state.switch is None
