"""Policies are pure functions of a snapshot, and the switcher holds them to what is possible."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from llmuxd.core import events as e
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.core.policy import POLICIES, Decision, Fifo, ModelView, Snapshot, Stay, SwitchTo
from tests.core.playbook import Play


def view(name: str, oldest: float | None, *, loadable: bool = True) -> ModelView:
    return ModelView(name, False, loadable, 0 if oldest is None else 1, oldest, 0, 0.0)


def test_fifo_takes_the_model_whose_request_has_waited_longest():
    models = (view("a", None), view("b", 5.0), view("c", 3.0), view("d", 1.0, loadable=False))
    assert Fifo().decide(Snapshot(9.0, models)) == SwitchTo("c")
    assert Fifo().decide(Snapshot(9.0, models[:1])) == Stay()
    assert POLICIES["fifo"]() == Fifo()


@dataclass
class Scripted:
    """Says what the test wants it to say."""

    answers: list[Decision]
    name: str = "scripted"

    def decide(self, snapshot: Snapshot) -> Decision:
        self.snapshot = snapshot
        return self.answers.pop(0)


def test_a_policy_may_wait_and_is_asked_again():
    policy = Scripted([Stay(until=5.0), Stay(until=1.0), Stay(), SwitchTo("b")])
    play = Play(policy=policy)
    assert play.ask(0, 1, "b") == []
    assert play.switcher.policy is policy
    assert play.switcher.next_deadline == 5.0
    assert play.tick(5) == []
    assert play.switcher.next_deadline == 5.01, "one that asks for the past cannot spin"
    assert play.tick(6) == []
    assert play.switcher.next_deadline == 100.0, "asked again when something changes"
    assert play.ask(7, 2, "b") == ["start b"]
    assert policy.snapshot.models[1] == ModelView("b", False, True, 2, 0, 0, 0.0)


def test_a_policy_that_chooses_what_cannot_be_is_an_error():
    play = Play(policy=Scripted([SwitchTo("c")]))
    with pytest.raises(ValueError, match="scripted chose 'c'"):
        play.switcher.handle(e.RequestArrived(1, "b"), 0)


@pytest.mark.parametrize("text", ["offload", "offload+nap", "melt+stop", "", "+"])
def test_a_wrong_eviction_policy_says_what_is_allowed(text):
    with pytest.raises(ValueError, match=r"retain, offload, discard .* checkpoint, stop"):
        EvictionPolicy.parse(text)


def test_eviction_policies_are_written_as_they_are_read():
    assert str(EvictionPolicy.parse(" discard + stop ".replace(" ", ""))) == "discard+stop"
