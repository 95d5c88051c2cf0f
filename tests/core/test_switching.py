"""Switching by requests: start, cooldown, drain, sleep, wake, and who goes when."""

from __future__ import annotations

import pytest

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.settings import Placement
from tests.core.playbook import DISCARD, OFFLOAD, RETAIN, STOP, Play, spec


def test_the_first_request_starts_its_engine_and_goes_through_when_it_is_ready():
    play = Play()
    assert play.ask(0, 1, "a") == ["start a"]
    assert play.ask(1, 2, "a") == []
    assert play.done(30, "a") == ["forward 1", "forward 2"]
    forwards = [x for x in play.commands if isinstance(x, c.Forward)]
    assert [(x.queue_secs, x.switch_secs) for x in forwards] == [(30, 30), (29, 29)]
    assert play.ask(31, 3, "a") == ["forward 3"]
    assert play.commands == [c.Forward(3, "a", 0.0, 0.0)]


def test_a_request_for_another_model_drains_sleeps_and_starts():
    play = Play()
    play.awake("a")
    assert play.ask(1, 1, "a") == ["forward 1"]
    assert play.ask(2, 2, "b") == []
    assert play.ask(3, 3, "a") == [], "nothing more goes to an engine that is being drained"
    assert play.at(4, e.RequestFinished(1)) == ["sleep a offload+keep_running wait"]
    assert play.done(5, "a") == ["start b"]
    # b's own request goes through before a, which has one waiting too, may push it out again.
    assert play.done(9, "b") == ["forward 2"]
    assert play.at(10, e.RequestFinished(2)) == ["sleep b offload+keep_running wait"]
    assert play.done(11, "b") == ["wake a offload+keep_running"]
    assert play.done(12, "a") == ["forward 3"]


def test_the_notices_tell_the_phases_of_a_switch():
    play = Play(min_active=5.0)
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(2, 2, "b")
    assert play.notices() == [c.SwitchBegan(3 - 1, "b", ("a",))]
    play.tick(5)
    assert play.notices() == [c.SwitchPhaseEnded(2, "b", c.Phase.COOLDOWN, 3)]
    play.at(7, e.RequestFinished(1))
    assert play.notices() == [
        c.SwitchPhaseEnded(2, "b", c.Phase.DRAIN, 2),
        c.EngineChanged("a", S.AWAKE, S.FALLING_ASLEEP, 7),
    ]
    play.done(8, "a")
    assert play.notices() == [
        c.EngineChanged("a", S.FALLING_ASLEEP, S.ASLEEP, 1),
        c.SwitchPhaseEnded(2, "b", c.Phase.SLEEP, 1),
        c.EngineChanged("b", S.NOT_STARTED, S.STARTING, 8),
    ]
    play.done(20, "b")
    assert play.notices() == [
        c.EngineChanged("b", S.STARTING, S.AWAKE, 12),
        c.SwitchPhaseEnded(2, "b", c.Phase.WAKE, 12),
        c.SwitchEnded(2, "b", ("a",), 18),
    ]


def test_cooldown_lets_the_active_model_serve_on():
    play = Play(min_active=5.0)
    play.awake("a")
    assert play.ask(1, 1, "b") == []
    assert play.switcher.next_deadline == 5.0
    assert play.ask(2, 2, "a") == ["forward 2"]
    assert play.tick(5) == []
    assert play.ask(6, 3, "a") == [], "it is drained from here on"
    assert play.at(7, e.RequestFinished(2)) == ["sleep a offload+keep_running wait"]


def test_the_oldest_request_decides_who_is_next():
    play = Play()
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(2, 2, "b")
    play.ask(3, 3, "c")
    play.ask(4, 4, "b")
    play.at(5, e.RequestFinished(1))
    play.done(6, "a")
    assert play.done(7, "b") == ["forward 2", "forward 4"]
    play.at(8, e.RequestFinished(2))
    assert play.at(9, e.RequestFinished(4)) == ["sleep b offload+keep_running wait"]
    assert play.done(10, "b") == ["start c"]


@pytest.mark.parametrize(
    ("eviction", "out"),
    [
        (OFFLOAD, "sleep a offload+keep_running wait"),
        (DISCARD, "sleep a discard+keep_running wait"),
        (RETAIN, "sleep a retain+keep_running wait"),
        (STOP, "stop a"),
    ],
)
def test_each_eviction_policy(eviction, out):
    play = Play(spec("a", eviction), spec("b"))
    play.awake("a")
    assert play.ask(1, 1, "b") == [out]
    assert play.done(2, "a") == ["start b"]
    play.done(3, "b")
    play.at(4, e.RequestFinished(1))
    play.ask(5, 2, "a")
    back = "start a" if eviction is STOP else f"wake a {eviction}"
    assert play.done(6, "b") == [back]
    assert play.done(7, "a") == ["forward 2"]


def test_an_engine_that_cannot_sleep_is_stopped():
    play = Play()
    assert play.ask(0, 1, "a") == ["start a"]
    play.done(1, "a", can_sleep=False)
    play.at(2, e.RequestFinished(1))
    assert play.ask(3, 2, "b") == ["stop a"]


def test_a_switch_nobody_waits_for_is_cancelled_in_cooldown_and_in_drain():
    play = Play(min_active=5.0)
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(2, 2, "b")
    assert play.at(3, e.ClientLeft(2)) == []
    assert c.SwitchEnded(2, "b", ("a",), 1, cancelled=True) in play.notices()
    play.ask(6, 3, "b")
    play.ask(7, 4, "a")
    assert play.at(8, e.ClientLeft(3)) == ["forward 4"], "what the drain held back goes on"
    assert play.state.switch is None


def test_a_start_goes_on_when_its_client_has_left():
    play = Play()
    assert play.ask(0, 1, "a") == ["start a"]
    assert play.at(1, e.ClientLeft(1)) == []
    assert play.done(30, "a") == []
    assert play.ask(31, 2, "a") == ["forward 2"]


def test_as_many_models_are_awake_as_fit():
    small = Placement({"gpu": 2}, asleep={"gpu": 1})
    play = Play(*(spec(n, placement=small) for n in "abc"), devices={"gpu": 5})
    play.awake("a", 0)
    play.awake("b", 1)
    assert play.state.used() == {"gpu": 4}
    assert play.ask(2, 1, "a") == ["forward 1"]
    # a is busy, so the idle b has to go; c takes 2, a holds 2, the sleeping b keeps 1.
    assert play.ask(3, 2, "c") == ["sleep b offload+keep_running wait"]
    assert play.done(4, "b") == ["start c"]
    assert play.done(5, "c") == ["forward 2"]
    assert play.state.used() == {"gpu": 5}


def test_sleepers_are_stopped_when_what_they_keep_is_in_the_way():
    big = Placement({"gpu": 4}, asleep={"gpu": 1})
    play = Play(*(spec(n, placement=big) for n in "ab"), devices={"gpu": 4})
    play.awake("a")
    # asleep it would keep 1 of the 4 that b needs.
    assert play.ask(1, 1, "b") == ["stop a"]
    assert play.done(2, "a") == ["start b"]


def test_a_sleeper_goes_before_an_awake_model_is_stopped_for_good():
    sizes = {"a": Placement({"gpu": 2}, asleep={"gpu": 2}), "b": Placement({"gpu": 2}), "c": Placement({"gpu": 4})}
    play = Play(*(spec(n, placement=p) for n, p in sizes.items()), devices={"gpu": 4})
    play.asleep("a")
    play.awake("b")
    assert play.ask(1, 1, "c") == ["sleep b offload+keep_running wait", "stop a"]
    play.done(2, "b")
    assert play.done(3, "a") == ["start c"]


def test_only_those_go_that_have_to():
    sizes = {"a": 1, "b": 3, "c": 3}
    play = Play(*(spec(n, placement=Placement({"gpu": s})) for n, s in sizes.items()), devices={"gpu": 4})
    play.awake("a", 0)
    play.awake("b", 1)
    assert play.ask(2, 1, "c") == ["sleep b offload+keep_running wait"], "a, idle for longer, would not be enough"


def test_what_moves_by_itself_and_is_in_the_way_is_waited_for():
    play = Play()
    play.model("b").state, play.model("b").deadline = S.STARTING, 300.0
    assert play.ask(1, 1, "a") == []
    assert play.state.switch is None
    assert play.done(2, "b") == ["sleep b offload+keep_running wait"]
    assert play.done(3, "b") == ["start a"]


def test_weights_that_are_retained_keep_their_room():
    kept = Placement({"gpu": 2}, retained={"gpu": 2})
    play = Play(spec("a", RETAIN, kept), spec("b", RETAIN, kept), spec("c", RETAIN, kept), devices={"gpu": 4})
    play.asleep("a")
    play.asleep("b")
    assert play.ask(1, 1, "c") == ["stop a"]


def test_a_model_that_cannot_ever_fit_is_refused_at_once():
    with pytest.raises(ValueError, match="big does not fit gpu: 5 > 4"):
        Play(spec("big", placement=Placement({"gpu": 5})), devices={"gpu": 4})
    with pytest.raises(ValueError, match="lost does not fit gpu7"):
        Play(spec("lost", placement=Placement({"gpu7": 1})))


def test_an_idle_model_is_put_to_sleep_after_its_time_to_live():
    play = Play(spec("a", ttl=60.0), spec("b"))
    play.awake("a", 0)
    assert play.switcher.next_deadline == 60.0
    play.ask(50, 1, "a")
    assert play.tick(60) == [], "a request in flight is no idleness"
    assert play.switcher.next_deadline is None
    play.at(65, e.RequestFinished(1))
    assert play.tick(70) == []
    assert play.switcher.next_deadline == 125.0
    assert play.tick(125) == ["sleep a offload+keep_running wait"]
    assert play.done(126, "a") == []
    assert play.model("a").state is S.ASLEEP


def test_manual_mode_does_not_put_idle_models_to_sleep():
    play = Play(spec("a", ttl=60.0))
    play.awake("a", 0)
    play.at(1, e.SetMode(manual=True))
    assert play.switcher.next_deadline is None
    assert play.tick(100) == []
