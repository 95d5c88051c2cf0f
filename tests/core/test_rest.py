"""Rest: a request of an awake model makes nobody look at all the others, unless there is something to be done."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmuxd.core import events as e
from llmuxd.core.rest import Rest
from llmuxd.core.settings import Placement
from llmuxd.core.switching import Switching
from tests.core.playbook import Play, spec

SMALL = Placement({"gpu": 0})
"""Many of them are awake at once."""

right = Rest.look


@pytest.fixture(autouse=True)
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Gets an entry for each look at everything."""
    taken: list[int] = []

    def look(self: Rest) -> None:
        taken.append(1)
        right(self)

    monkeypatch.setattr(Rest, "look", look)
    return taken


def play(**bounds: object) -> Play:
    """a and b are awake, and have nothing to do; c has no engine."""
    made = Play(spec("a", placement=SMALL, **bounds), spec("b", placement=SMALL, ttl=20.0), spec("c"))
    made.awake("a")
    made.awake("b")
    return made


def test_requests_of_awake_models_come_and_go_without_a_look_at_the_others(looks):
    made = play(max_in_flight=2)
    looks.clear()
    for request in (1, 2, 3, 4):
        made.ask(1, request, "a")
    assert made.at(2, e.ClientLeft(4)) == []
    assert made.at(3, e.RequestFinished(1)) == ["forward 3"]
    assert made.at(4, e.ClientLeft(2)) == []
    assert made.ask(5, 5, "a", most_wait=0.0) == ["forward 5"]
    assert made.ask(6, 6, "a", most_wait=0.0) == ["refuse 6 queue_timeout"]
    assert made.ask(6, 7, "b") == ["forward 7"]
    assert looks == []


def test_who_waits_for_a_model_that_is_not_awake_ends_it(looks):
    made = play()
    looks.clear()
    assert made.ask(1, 1, "c") == ["start c"]
    assert looks == [1]
    made.ask(2, 2, "a")
    assert looks == [1, 1], "a switch is under way"
    made.done(3, "c")
    looks.clear()
    made.at(4, e.RequestFinished(2))
    assert looks == []


def test_so_does_an_engine_that_may_be_dead(looks):
    made = play()
    made.ask(1, 1, "a")
    looks.clear()
    made.at(2, e.RequestBounced(1))
    assert made.switcher.next_deadline == 3.5
    assert made.ask(3, 2, "a") == []
    assert looks == [1, 1]


def test_so_does_a_shutdown_that_waits_for_the_last_answer(looks):
    made = play()
    made.ask(1, 1, "a")
    made.at(2, e.Shutdown(100.0))
    assert made.at(3, e.RequestFinished(1)) == ["stop a"]


def test_so_does_a_model_that_goes_when_it_is_idle(looks):
    made = play()
    made.ask(1, 1, "a")
    specs = tuple(model.spec for model in made.state.models.values())
    made.at(2, e.Reload(specs, made.state.settings, made.switcher.policy, frozenset({"a"})))
    assert made.at(3, e.RequestFinished(1)) == ["stop a"]


def test_the_time_to_live_of_a_model_begins_anew_with_each_request(looks):
    made = play()
    assert made.switcher.next_deadline == 20.0
    looks.clear()
    made.ask(15, 1, "b")
    made.at(16, e.RequestFinished(1))
    assert looks == []
    assert made.switcher.next_deadline == 20.0, "it may be found needless"
    assert made.tick(20) == []
    assert made.switcher.next_deadline == 36.0
    made.ask(30, 2, "b")
    made.at(30, e.RequestFinished(2))
    made.tick(36)
    assert made.switcher.next_deadline == 50.0
    assert made.tick(50) == ["sleep b offload+keep_running wait"]


def test_a_time_to_live_is_noted_where_there_was_none():
    made = Play(spec("a", ttl=5.0))
    made.at(0, e.OperatorWake(7, "a"))
    made.done(0, "a")
    made.ask(1, 1, "a")
    assert made.tick(5) == []
    assert made.switcher.next_deadline is None
    made.at(6, e.RequestFinished(1))
    assert made.switcher.next_deadline == 11.0


def test_what_is_due_is_done_with_the_request_that_comes_before_its_tick():
    made = play()
    assert made.switcher.next_deadline == 20.0
    assert made.ask(20.2, 1, "a") == ["forward 1", "sleep b offload+keep_running wait"]


def test_after_a_break_everything_is_looked_at(looks, monkeypatch):
    """Who knows what was done and what was not."""
    made = play()
    with monkeypatch.context() as broken:
        broken.setattr(Switching, "advance", lambda self, now: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.at(1, e.Tick())
    looks.clear()
    made.ask(2, 1, "a")
    assert looks == [1]
