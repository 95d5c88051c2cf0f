"""A new config while engines run: who stays, who goes when, and what an operator is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.policies import CostAware, Fifo
from llmuxd.core.settings import ModelSpec, Placement
from llmuxd.core.state import IllegalEvent, SwitchMode
from tests.core.playbook import DISCARD, OFFLOAD, STOP, Play, settings, spec

A, B, C = spec("a"), spec("b"), spec("c")


def reload(play: Play, now: float, *specs: ModelSpec, changed: str = "", **more: object) -> list[str]:
    policy = more.pop("policy", Fifo())
    return play.at(now, e.Reload(specs, settings(**more), policy, frozenset(changed)))  # type: ignore[arg-type]


def test_a_model_that_comes_in_is_served():
    play = Play(A)
    with pytest.raises(IllegalEvent):
        play.switcher.handle(e.RequestArrived(1, "b"), 0)
    assert reload(play, 1, A, B) == []
    assert play.ask(2, 1, "b") == ["start b"]


class TestAModelThatIsTakenOut:
    def test_without_an_engine_it_is_gone_at_once(self):
        play = Play(A, B)
        assert reload(play, 1, A) == []
        assert play.notices() == [c.ModelGone("b")]
        with pytest.raises(IllegalEvent):
            play.switcher.handle(e.RequestArrived(1, "b"), 2)

    def test_idle_or_asleep_it_is_stopped_at_once(self):
        play = Play(A, B)
        play.asleep("a")
        play.awake("b")
        assert reload(play, 1) == ["stop a", "stop b"]
        play.done(2, "a")
        assert play.notices() == [c.EngineChanged("a", S.STOPPING, S.NOT_STARTED, 1), c.ModelGone("a")]
        play.done(3, "b")
        assert play.state.models == {}

    def test_it_finishes_what_it_accepted_and_accepts_no_more(self):
        play = Play(spec("a", max_in_flight=1), B)
        play.awake("a")
        play.ask(1, 1, "a")
        play.ask(1, 2, "a")
        assert reload(play, 2, B) == []
        assert play.ask(3, 3, "a") == ["refuse 3 model_unavailable"]
        assert play.commands == [
            c.Refuse(3, c.Refusal.CANNOT_LOAD, "a was taken out of the config", None),
        ]
        assert play.at(4, e.RequestFinished(1)) == ["forward 2"]
        assert play.at(5, e.RequestFinished(2)) == ["stop a"]
        play.done(6, "a")
        assert c.ModelGone("a") in play.notices()

    def test_what_is_queued_for_its_sleeping_engine_is_served(self):
        play = Play(A, B)
        play.asleep("a")
        play.awake("b")
        play.ask(1, 1, "b")
        play.ask(2, 2, "a")
        assert reload(play, 3, B) == []
        assert play.at(4, e.RequestFinished(1)) == ["sleep b offload+keep_running wait"]
        assert play.done(5, "b") == ["wake a offload+keep_running"]
        assert play.done(6, "a") == ["forward 2"]
        assert play.at(7, e.RequestFinished(2)) == ["stop a"]

    def test_what_is_queued_for_it_has_it_started_even(self):
        play = Play(A, B)
        play.awake("b")
        play.ask(1, 1, "b")
        play.ask(2, 2, "a")
        reload(play, 3, B)
        play.at(4, e.RequestFinished(1))
        assert play.done(5, "b") == ["start a"]
        assert play.done(6, "a") == ["forward 2"]

    def test_jobs_for_it_fail(self):
        play = Play(A, B, C)
        play.ask(0, 1, "a")
        play.at(0, e.OperatorWake(7, "b"))
        play.at(0, e.OperatorSleep(8, "b"))
        play.at(0, e.OperatorWake(9, "c"))
        assert reload(play, 1, A, C) == ["job 7 failed", "job 8 failed"]
        assert {x.reason for x in play.commands if isinstance(x, c.JobFailed)} == {"b was taken out of the config"}
        play.ask(2, 2, "a")
        assert reload(play, 3, C) == []
        assert play.at(4, e.OperatorWake(10, "a")) == ["job 10 failed"]

    def test_a_switch_to_it_that_an_operator_asked_for_fails_once_its_engine_is_there(self):
        play = Play(A, B)
        assert play.at(0, e.OperatorWake(7, "a")) == ["start a"]
        assert reload(play, 1, B) == []
        assert play.done(2, "a") == ["stop a"]
        assert play.done(3, "a") == ["job 7 failed"]
        assert play.at(4, e.Tick()) == []
        assert play.state.models.keys() == {"b"}

    def test_it_stays_until_the_switch_that_it_makes_room_for_is_over(self):
        play = Play(A, B)
        play.awake("a")
        play.ask(1, 1, "b")
        reload(play, 2, B)
        assert play.done(3, "a") == ["stop a"]
        assert play.done(4, "a") == ["start b"]
        assert "a" in play.state.models
        assert play.done(5, "b") == ["forward 1"]
        assert play.notices()[-1] == c.ModelGone("a")
        assert "a" not in play.state.models

    def test_a_pin_of_it_becomes_manual_mode(self):
        play = Play(A, B)
        play.at(0, e.Pin(7, "a"))
        play.done(1, "a")
        play.ask(2, 1, "a")
        assert reload(play, 3, B) == []
        assert play.switcher.mode == SwitchMode(manual=True)
        assert play.ask(4, 2, "b") == ["refuse 2 model_not_pinned"]

    def test_back_in_time_it_stays(self):
        play = Play(A, B)
        play.awake("a")
        play.ask(1, 1, "a")
        reload(play, 2, B)
        reload(play, 3, A, B)
        assert play.ask(4, 2, "a") == ["forward 2"]
        play.at(5, e.RequestFinished(1))
        assert play.at(5, e.RequestFinished(2)) == []

    def test_late_reports_of_what_is_gone_are_void(self):
        play = Play(A, B)
        reload(play, 1, B)
        assert play.at(2, e.EngineStopped("a", 1)) == []
        assert play.at(2, e.EngineDied("a", 1, "killed")) == []


class TestAModelThatIsChanged:
    def test_it_is_stopped_when_it_is_idle_and_started_when_it_is_wanted(self):
        play = Play(A, B)
        play.awake("a")
        play.ask(1, 1, "a")
        assert reload(play, 2, A, B, changed="a") == []
        assert play.at(3, e.RequestFinished(1)) == ["stop a"]
        assert play.done(4, "a") == []
        assert play.ask(5, 2, "a") == ["start a"]
        play.done(6, "a")
        assert play.at(7, e.RequestFinished(2)) == [], "it is new now"

    def test_asleep_it_is_stopped_at_once_and_what_waits_for_it_gets_the_new_one(self):
        play = Play(A, B)
        play.asleep("a")
        play.awake("b")
        play.ask(1, 1, "b")
        play.ask(2, 2, "a")
        assert reload(play, 3, A, B, changed="a") == ["stop a"]
        play.done(4, "a")
        play.at(5, e.RequestFinished(1))
        assert play.done(6, "b") == ["start a"]

    def test_without_an_engine_there_is_nothing_to_do(self):
        play = Play(A, B)
        reload(play, 1, A, B, changed="ab")
        assert play.ask(2, 1, "a") == ["start a"]
        play.done(3, "a")
        assert play.at(4, e.RequestFinished(1)) == []

    def test_a_failure_of_the_old_one_is_not_waited_out(self):
        play = Play(A, B)
        play.ask(0, 1, "a")
        play.fails(1, "a")
        play.done(1, "a")
        assert play.ask(1.1, 2, "a") == ["refuse 2 model_unavailable"]
        reload(play, 1.2, A, B)
        assert play.ask(1.3, 3, "a") == ["refuse 3 model_unavailable"]
        reload(play, 1.4, A, B, changed="a")
        assert play.ask(1.5, 4, "a") == ["start a"]

    def test_the_operators_eviction_stays_unless_the_configs_is_another_one(self):
        play = Play(A, B)
        play.at(0, e.SetEviction("a", STOP))
        reload(play, 1, replace(A, max_queue=5), B)
        assert play.model("a").eviction == STOP
        assert play.model("a").spec.max_queue == 5
        reload(play, 2, spec("a", DISCARD), B)
        assert play.model("a").eviction == DISCARD

    def test_its_engine_holds_what_it_was_started_with_until_it_goes(self):
        small, large = Placement({"gpu": 2}), Placement({"gpu": 3})
        play = Play(spec("a", placement=small), spec("b", placement=small), devices={"gpu": 4})
        play.awake("a")
        play.awake("b")
        play.ask(1, 1, "a")
        assert reload(play, 2, spec("a", placement=large), spec("b", placement=small), changed="a") == []
        assert play.state.used() == {"gpu": 4}
        assert play.at(3, e.RequestFinished(1)) == ["stop a"]
        play.done(4, "a")
        # The new one takes 3, so that b has to go.
        assert play.ask(5, 2, "a") == ["sleep b offload+keep_running wait"]
        assert play.done(6, "b") == ["start a"]
        assert play.state.used() == {"gpu": 3}

    @pytest.mark.parametrize("event", [e.RequestArrived(1, "a"), e.OperatorWake(1, "a")])
    def test_a_switch_to_one_that_has_grown_meanwhile_is_planned_again(self, event):
        small, large = Placement({"gpu": 2}), Placement({"gpu": 4})
        others = [spec(name, placement=small) for name in "bc"]
        play = Play(spec("a", placement=small), *others, devices={"gpu": 4})
        play.awake("b")
        play.awake("c")
        assert play.at(1, event) == ["sleep b offload+keep_running wait"]
        reload(play, 2, spec("a", placement=large), *others, changed="a")
        assert play.done(3, "b") == ["sleep c offload+keep_running wait"]
        assert play.done(4, "c") == ["start a"]
        assert play.done(5, "a") == (["job 1 done"] if isinstance(event, e.OperatorWake) else ["forward 1"])


def test_what_does_not_fit_changes_nothing():
    play = Play(A, B)
    play.awake("a")
    before = repr(play.state)
    with pytest.raises(IllegalEvent, match="big does not fit gpu: 2 > 1"):
        play.switcher.handle(e.Reload((B, spec("big", placement=Placement({"gpu": 2}))), settings(), Fifo()), 1)
    assert repr(play.state) == before
    assert play.ask(2, 1, "a") == ["forward 1"]


def test_policy_and_settings_are_the_new_ones():
    play = Play(A, B)
    play.awake("a")
    assert reload(play, 1, A, B, policy=CostAware(), request_timeout=7.0, max_queue=1) == []
    assert play.switcher.policy == CostAware()
    assert play.ask(100, 1, "b") == [], "it collects requests"
    assert play.switcher.next_deadline == 102.0
    assert play.ask(100, 2, "b") == ["refuse 2 queue_full"]
    play.model("b").eviction = OFFLOAD
    assert play.tick(102) == ["sleep a offload+keep_running wait"]
    assert play.switcher.next_deadline == 107.0
