"""Policies are pure functions of a snapshot, and the switcher holds them to what is possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from llmuxd.core import commands as c
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.core.policies import Fifo
from llmuxd.core.policy import Candidate, Decision, ModelView, Snapshot, Stay, SwitchTo
from tests.core.playbook import Play


def view(
    name: str,
    *,
    queued: int = 0,
    in_flight: int = 0,
    oldest: float | None = None,
    waiting: float = 0.0,
    since: float = 0.0,
    cost: float | None = None,
    victims: tuple[str, ...] = ("a",),
    **more: Any,
) -> ModelView:
    """A model; with `cost` it may be switched to."""
    return ModelView(
        name=name,
        awake=more.pop("awake", False),
        queued=queued,
        in_flight=in_flight,
        parked=more.pop("parked", 0),
        oldest_arrival=oldest,
        next_arrival=more.pop("next_arrival", oldest),
        waiting_secs=waiting,
        since=since,
        last_arrival=more.pop("last_arrival", float("-inf")),
        drain_secs=more.pop("drain", 0.0),
        candidate=None if cost is None else Candidate(victims, cost),
        **more,
    )


def test_fifo_takes_the_model_whose_request_has_waited_longest():
    models = (
        view("a", awake=True),
        view("b", queued=1, oldest=5.0, cost=2.0),
        view("c", queued=1, oldest=3.0, cost=2.0),
        view("d", queued=1, oldest=1.0),
    )
    assert Fifo().decide(Snapshot(9.0, models)) == SwitchTo("c")
    assert Fifo().decide(Snapshot(9.0, models[:1])) == Stay()


@dataclass
class Scripted:
    """Says what the test wants it to say."""

    answers: list[Decision]
    name: str = "scripted"

    def bound(self, typical_switch_secs: float) -> float | None:
        return None

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
    seen = policy.snapshot
    assert (seen.now, seen.arrived, seen.due) == (7, "b", False)
    assert seen.models[1] == view(
        "b",
        queued=2,
        oldest=0,
        waiting=7.0,
        cost=60.0,
        victims=(),
        last_arrival=7,
        arrival_rate=seen.models[1].arrival_rate,
    )
    assert 1 / 60 < seen.models[1].arrival_rate < 2 / 60


class Broken(Scripted):
    def decide(self, snapshot: Snapshot) -> Decision:
        raise RuntimeError("oh")


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        (Scripted([SwitchTo("c")]), "it chose SwitchTo(model='c', drain_secs=0.0), which is no candidate"),
        (Broken([]), "RuntimeError('oh')"),
    ],
)
def test_where_a_policy_breaks_fifo_decides(policy, problem):
    play = Play(policy=policy)
    assert play.ask(0, 1, "b") == ["start b"]
    assert c.PolicyFailed("scripted", problem) in play.notices()


@pytest.mark.parametrize("text", ["offload", "offload+nap", "melt+stop", "", "+"])
def test_a_wrong_eviction_policy_says_what_is_allowed(text):
    with pytest.raises(ValueError, match=r"retain, offload, discard .* checkpoint, stop"):
        EvictionPolicy.parse(text)


def test_eviction_policies_are_written_as_they_are_read():
    assert str(EvictionPolicy.parse(" discard + stop ".replace(" ", ""))) == "discard+stop"
