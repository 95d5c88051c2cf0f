"""Probes: what stalls is found, what only waits is not, and nothing is changed by looking."""

from __future__ import annotations

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.policies import Tenure
from llmuxd.core.policy import Decision, Snapshot, Stay
from llmuxd.core.selfcheck import find_stalls
from llmuxd.core.settings import InFlight, Placement
from tests.core.playbook import Play, spec


def probe(play: Play, now: float) -> tuple[c.Stall, ...]:
    """The answer, straight from the switcher: a defect that a test made up would not pass the auditor."""
    play.switcher.next_deadline  # noqa: B018 - read after each event by whoever runs it
    before = repr(play.state)
    (answer,) = play.switcher.handle(e.Probe(5), now)
    assert isinstance(answer, c.Probed)
    assert answer.probe == 5
    assert repr(play.state) == before, "a probe changes nothing"
    return answer.stalls


def reasons(play: Play, now: float) -> dict[str, str]:
    return {stall.model: stall.reason for stall in probe(play, now)}


def test_it_is_answered_in_the_same_call():
    assert Play().at(0, e.Probe(5)) == ["probe 5 well"]


class TestAllIsWell:
    def test_with_nothing_to_do_or_all_of_it_in_flight(self):
        play = Play()
        assert probe(play, 0) == ()
        play.awake("a")
        play.ask(1, 1, "a")
        assert probe(play, 1000) == ()

    def test_at_a_full_engine(self):
        play = Play(spec("a", max_in_flight=1), request_timeout=1000.0)
        play.awake("a")
        play.ask(1, 1, "a")
        play.ask(1, 2, "a")
        assert probe(play, 100) == ()

    def test_while_an_engine_starts_and_another_model_waits_for_its_own_turn(self):
        play = Play(request_timeout=10000.0)
        play.ask(0, 1, "a")
        play.ask(0, 2, "b")
        assert probe(play, 1000) == ()

    def test_in_cooldown_and_drain_and_while_the_victim_falls_asleep(self):
        play = Play(min_active=50.0)
        play.awake("a")
        play.ask(1, 1, "a")
        play.ask(1, 2, "b")
        assert probe(play, 49) == ()
        play.tick(50)
        play.ask(51, 3, "a")
        assert probe(play, 99) == ()
        play.at(60, e.RequestFinished(1))
        assert probe(play, 99) == ()

    def test_while_the_death_of_an_engine_is_awaited(self):
        play = Play()
        play.awake("a")
        play.ask(1, 1, "a")
        play.at(20, e.RequestBounced(1))
        assert probe(play, 21) == ()

    def test_while_an_operator_has_the_word(self):
        play = Play(in_flight=InFlight.PARK)
        play.awake("a")
        play.ask(1, 1, "a")
        play.ask(1, 2, "b")
        play.done(2, "a")
        play.done(3, "b")
        play.at(4, e.SetMode(manual=True))
        play.at(5, e.RequestFinished(2))
        assert probe(play, 50) == ()

    def test_while_a_policy_with_a_bound_waits_within_it(self):
        play = Play(policy=Tenure(), request_timeout=10000.0)
        play.awake("a")
        for request in range(1, 9):
            play.ask(1, request, "a")
        play.ask(2, 9, "b")
        assert play.state.switch is None
        assert probe(play, 10) == ()

    def test_whatever_a_policy_without_a_bound_does(self):
        play = Play(policy=Modest(), request_timeout=10000.0)
        play.ask(1, 1, "b")
        assert probe(play, 4000) == ()

    def test_while_a_failure_is_waited_out(self):
        play = Play()
        play.ask(0, 1, "a")
        model = play.model("a")
        model.state, model.failures, model.retry_at, model.deadline = S.FAILED, 3, 90.0, None
        play.state.switch = None
        assert probe(play, 50) == ()

    def test_before_it_has_lasted(self):
        play = Play()
        play.ask(0, 1, "a")
        play.state.switch = None
        play.model("a").state, play.model("a").deadline = S.AWAKE, None
        assert probe(play, 5) == ()
        assert reasons(play, 6) == {"a": "it is awake, and nothing is forwarded"}


class Lazy:
    """Promises what it does not keep."""

    name = "lazy"

    def bound(self, typical_switch_secs: float) -> float | None:
        return 10.0

    def decide(self, snapshot: Snapshot) -> Decision:
        return Stay()


class Modest(Lazy):
    """Does not even promise it."""

    def bound(self, typical_switch_secs: float) -> float | None:
        return None


class TestAStallIsFoundWhere:
    def test_a_deadline_passed_unnoticed(self):
        play = Play()
        play.ask(0, 1, "a")
        assert probe(play, 104) == ()
        assert probe(play, 110) == (c.Stall("a", 110.0, "a deadline passed 10 s ago unnoticed"),)

    def test_an_engine_is_awake_and_nothing_is_forwarded(self):
        play = Play()
        play.ask(0, 1, "a")
        play.model("a").state, play.model("a").deadline = S.AWAKE, None
        assert reasons(play, 20) == {"a": "it is awake, and nothing is forwarded"}

    def test_a_transition_does_not_end(self):
        play = Play()
        play.ask(0, 1, "a", patient=True)
        deadline = play.model("a").deadline
        assert find_stalls(play.state, play.switcher.policy, None, deadline + 5) == ()
        (stall,) = find_stalls(play.state, play.switcher.policy, None, deadline + 6)
        assert stall.reason == "it has been starting for too long"

    def test_a_switch_goes_on_although_nothing_keeps_it(self):
        play = Play()
        play.awake("a")
        play.ask(1, 1, "b")
        model = play.model("a")
        model.state, model.deadline = S.ASLEEP, None
        assert reasons(play, 5) == {}
        assert reasons(play, 20) == {"b": "switch 2 has been in its sleep phase for 19 s"}

    def test_a_policy_passes_a_model_over(self):
        play = Play(policy=Lazy(), request_timeout=10000.0)
        play.ask(0, 1, "a")
        assert reasons(play, 130) == {}
        assert reasons(play, 131) == {"a": "policy lazy passes it over"}

    def test_but_not_one_that_waits_for_another_or_that_others_have_been_in_front_of(self):
        play = Play(spec("a", max_in_flight=1), spec("b"), spec("c"), policy=Lazy(), request_timeout=10000.0)
        play.at(0, e.OperatorWake(7, "a"))
        play.done(0, "a")
        play.ask(0, 1, "a")
        play.ask(1, 2, "b")
        play.ask(2, 3, "c")
        assert reasons(play, 200) == {"b": "policy lazy passes it over"}, "c waits for b"
        play.ask(10, 4, "a")
        assert reasons(play, 200) == {}, "and b for what came to a before it was overdue"

    def test_a_policy_passes_one_over_that_only_a_sleeper_is_in_the_way_of(self):
        large = Placement({"gpu": 2}, asleep={"gpu": 1})
        play = Play(
            spec("a", placement=large),
            spec("b", placement=large),
            policy=Lazy(),
            devices={"gpu": 2},
            request_timeout=1e4,
        )
        play.at(0, e.OperatorWake(7, "a"))
        play.done(0, "a")
        play.at(0, e.OperatorSleep(8, "a"))
        play.done(0, "a")
        play.ask(0, 1, "b")
        assert reasons(play, 130) == {}
        assert reasons(play, 131) == {"b": "policy lazy passes it over"}


class Unbound(Lazy):
    """Its promise cannot be asked for."""

    def bound(self, typical_switch_secs: float) -> float | None:
        raise RuntimeError("oh")


def test_a_policy_whose_bound_breaks_has_promised_nothing():
    play = Play(policy=Unbound())
    assert play.ask(0, 1, "b") == []
    assert play.at(99, e.Probe(1)) == ["probe 1 well"]
