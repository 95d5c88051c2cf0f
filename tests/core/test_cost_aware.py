"""`cost_aware`: requests are collected until a switch pays."""

from __future__ import annotations

from llmuxd.core import events as e
from llmuxd.core.policies import CostAware
from llmuxd.core.policy import Decision, ModelView, PolicyParameters, Snapshot, Stay, SwitchTo
from tests.core.playbook import Play
from tests.core.test_policy import view

# Windows of 2 s, half a request per second of a switch, 15 s at most; a has been awake since 0, switches take 4 s.
policy = CostAware()
a = view("a", awake=True)


def decide(now: float, *models: ModelView, policy: CostAware = policy) -> Decision:
    return policy.decide(Snapshot(now, (a, *models)))


def test_its_parameters_are_the_configs():
    built = CostAware.build(PolicyParameters(coalesce_window=1.0, amortization_factor=0.25, max_wait=9.0))
    assert built == CostAware(1.0, 0.25, 9.0)
    assert built.bound(99.0) == 9.0


def test_without_a_candidate_there_is_nothing_to_do():
    assert decide(100.0, view("b", queued=1, oldest=50.0)) == Stay()


def test_where_there_is_room_nobody_waits():
    assert decide(1.0, view("b", queued=1, oldest=1.0, cost=4.0, victims=())) == SwitchTo("b")


def test_a_lone_request_is_switched_to_after_the_window():
    b = view("b", queued=1, oldest=50.0, cost=4.0)
    assert decide(50.0, b) == Stay(52.0)
    assert decide(52.0, b) == SwitchTo("b")


def test_as_many_requests_as_a_switch_is_worth_are_switched_to_at_once():
    assert decide(50.5, view("b", queued=2, oldest=50.0, cost=4.0)) == SwitchTo("b")
    assert decide(50.5, view("b", queued=2, oldest=50.0, cost=4.1)) == Stay(52.0), "rounded up, it is worth three"
    assert decide(50.5, view("b", queued=1, parked=2, oldest=50.0, cost=4.1)) == SwitchTo("b")
    assert decide(50.5, view("b", queued=1, oldest=50.0, cost=0.0)) == SwitchTo("b")


def test_what_came_in_the_serving_window_waits_for_its_end():
    # Awake since 0, a switch takes 4 s: it has 4 s to serve.
    assert decide(2.0, view("b", queued=9, oldest=1.0, cost=4.0)) == Stay(4.0)
    assert decide(4.0, view("b", queued=9, oldest=1.0, cost=4.0)) == SwitchTo("b")
    assert decide(4.5, view("b", queued=9, oldest=4.0, cost=4.0)) == SwitchTo("b"), "it came behind it"


def test_nobody_waits_for_longer_than_max_wait():
    slow = view("b", queued=1, oldest=1.0, cost=60.0)
    assert decide(2.0, slow) == Stay(16.0)
    assert decide(16.0, slow) == SwitchTo("b")


def test_the_longest_wait_is_first_among_those_beyond_it():
    b = view("b", queued=1, oldest=3.0, cost=60.0)
    c = view("c", queued=50, oldest=2.0, cost=60.0)
    d = view("d", queued=1, oldest=30.0, cost=4.0, victims=())
    assert decide(30.0, b, c, d) == SwitchTo("c")


def test_the_earliest_is_next():
    b = view("b", queued=1, oldest=50.5, cost=4.0)
    c = view("c", queued=1, oldest=50.0, cost=4.0)
    assert decide(51.0, b, c) == Stay(52.0)
    assert decide(52.0, b, c) == SwitchTo("c")


def test_end_to_end():
    play = Play(policy=CostAware())
    play.awake("a")
    assert play.ask(100, 1, "b") == []
    assert play.switcher.next_deadline == 102.0
    assert play.ask(101, 2, "a") == ["forward 2"], "which goes on meanwhile"
    assert play.at(101.5, e.RequestFinished(2)) == []
    assert play.tick(102) == ["sleep a offload+keep_running wait"]
    play.done(103, "a")
    assert play.done(104, "b") == ["forward 1"]
    play.at(105, e.RequestFinished(1))
    # To a it is a second's way out and 5 s in, as long as nobody knows: worth three requests.
    for request in (10, 11):
        assert play.ask(200, request, "a") == []
    assert play.ask(200.1, 12, "a") == ["sleep b offload+keep_running wait"]
