"""Engines that an earlier daemon started, and this one finds."""

from __future__ import annotations

import pytest

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.settings import Placement
from llmuxd.core.state import IllegalEvent, SwitchMode
from tests.core.playbook import DISCARD, OFFLOAD, RETAIN, Play, spec


def test_one_that_is_awake_serves():
    play = Play()
    assert play.at(0, e.EngineAdopted("a", 41)) == []
    assert play.notices() == [c.EngineChanged("a", S.NOT_STARTED, S.AWAKE, 0.0)]
    assert play.ask(1, 1, "a") == ["forward 1"]


def test_one_that_sleeps_is_woken_as_it_was_put_to_sleep():
    play = Play()
    assert play.at(0, e.EngineAdopted("a", 41, DISCARD)) == []
    assert play.ask(1, 1, "a") == ["wake a discard+keep_running"]
    assert play.done(2, "a") == ["forward 1"]


def test_it_can_what_it_could():
    play = Play()
    play.at(0, e.EngineAdopted("a", 41, can_sleep=False))
    assert play.ask(1, 1, "b") == ["stop a"]


def test_operation_numbers_go_on_behind_its_own():
    play = Play()
    play.at(0, e.EngineAdopted("a", 41))
    play.at(0, e.EngineAdopted("b", 7, OFFLOAD))
    play.ask(1, 1, "b")
    assert [x.op for x in play.commands if isinstance(x, c.SleepEngine)] == [42]


def test_its_death_is_noticed_and_that_of_an_older_one_is_void():
    play = Play()
    play.at(0, e.EngineAdopted("a", 41))
    assert play.at(1, e.EngineDied("a", 40, "long ago")) == []
    assert play.at(2, e.EngineDied("a", 41, "killed")) == ["stop a"]
    assert play.done(3, "a") == []
    assert play.ask(4, 1, "a") == ["start a"]
    with pytest.raises(IllegalEvent, match="incarnation 99 was never started"):
        play.switcher.handle(e.EngineDied("a", 99, "?"), 4)


def test_a_request_that_came_before_is_forwarded():
    play = Play()
    play.awake("b")
    play.ask(1, 1, "b")
    play.ask(1, 2, "c")
    play.at(2, e.RequestFinished(1))
    assert play.at(3, e.EngineAdopted("a", 1, OFFLOAD)) == []
    assert play.done(4, "b") == ["start c"]


KEPT = Placement({"gpu": 2}, asleep={"gpu": 1}, retained={"gpu": 2})


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (e.EngineAdopted("c", 43), "c: there is no room for the adopted engine"),
        (e.EngineAdopted("c", 43, RETAIN), "c: there is no room for the adopted engine"),
        (e.EngineAdopted("a", 43), "a: EngineAdopted while awake"),
        (e.EngineAdopted("b", 43, OFFLOAD), "b: EngineAdopted while asleep"),
        (e.EngineAdopted("nobody", 43), "no model 'nobody'"),
    ],
)
def test_without_room_or_beside_another_one_it_is_not_adopted_and_nothing_has_changed(event, why):
    play = Play(*(spec(name, placement=KEPT) for name in "abc"), devices={"gpu": 4})
    play.at(0, e.EngineAdopted("a", 41))
    play.at(0, e.EngineAdopted("b", 42, OFFLOAD))
    before = repr(play.state)
    with pytest.raises(IllegalEvent, match=why):
        play.switcher.handle(event, 1)
    assert repr(play.state) == before
    assert play.at(1, e.EngineAdopted("c", 43, OFFLOAD)) == [], "asleep it takes less"


class TestOneThatStarts:
    def test_serves_when_it_is_up(self):
        play = Play()
        assert play.at(0, e.EngineAdopted("a", 41, starting=True)) == []
        assert play.notices() == [c.EngineChanged("a", S.NOT_STARTED, S.STARTING, 0.0)]
        assert play.ask(1, 1, "a") == []
        assert play.at(2, e.EngineStarted("a", 41)) == ["forward 1"]

    def test_is_given_up_after_its_time(self):
        play = Play(spec("a", start_timeout=60.0))
        play.at(0, e.EngineAdopted("a", 41, starting=True))
        assert play.switcher.next_deadline == 70.0
        assert play.tick(70.0) == ["stop a"]

    def test_may_fail(self):
        play = Play()
        play.at(0, e.EngineAdopted("a", 41, starting=True))
        play.ask(1, 1, "a")
        assert play.at(2, e.OperationFailed("a", 41, e.FailureKind.DIED, "boom")) == [
            "stop a",
            "refuse 1 model_unavailable",
        ]

    def test_is_waited_for_by_those_who_need_its_room(self):
        play = Play()
        play.at(0, e.EngineAdopted("a", 41, starting=True))
        assert play.ask(1, 1, "b") == []
        assert play.at(2, e.OperatorSwitch(7, "c")) == [], "not refused: it may be had soon"
        assert play.at(3, e.EngineStarted("a", 41)) == ["sleep a offload+keep_running wait"]
        assert play.done(4, "a") == ["start c"]

    def test_a_switch_to_it_waits_for_it(self):
        play = Play()
        play.at(0, e.EngineAdopted("a", 41, starting=True))
        play.at(1, e.OperatorSwitch(7, "a"))
        assert play.at(2, e.EngineStarted("a", 41)) == ["job 7 done"]


def test_one_from_another_config_is_stopped_when_it_is_idle():
    play = Play()
    assert play.at(0, e.EngineAdopted("a", 41, OFFLOAD, outdated=True)) == ["stop a"]
    assert play.done(1, "a") == []
    assert play.ask(2, 1, "a") == ["start a"]


def test_the_daemon_may_begin_in_the_mode_that_it_was_left_in():
    play = Play(mode=SwitchMode(manual=True, pinned="a"))
    assert play.ask(0, 1, "b") == ["refuse 1 model_not_pinned"]
    assert play.ask(0, 2, "a") == ["start a"]
