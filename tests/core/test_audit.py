"""The auditor finds each invariant broken where commands or state are doctored, and says what is wrong in a sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.audit import INVARIANTS, Auditor, Violation
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.policies import Fifo, Tenure, TimeSlice
from llmuxd.core.policy import Decision, Policy, Snapshot, Stay
from llmuxd.core.settings import Placement
from llmuxd.core.state import Job, SwitchMode
from tests.core.playbook import Play, spec


def observe(play: Play, now: float, *commands: c.Command, event: e.Event | None = None) -> Violation | None:
    """What the auditor says of commands that the core did not give."""
    return play.auditor.observe(event or e.Tick(), commands, now)


def began(target: str | None, asked: bool = False) -> c.SwitchBegan:
    return c.SwitchBegan(99, target, (), asked)


class Promising:
    """Promises 10 s and waits for ever."""

    name = "promising"

    def bound(self, typical_switch_secs: float) -> float | None:
        return 10.0

    def decide(self, snapshot: Snapshot) -> Decision:
        return Stay()


def idle(policy: Policy | None = None) -> Play:
    """a is awake, 1 waits for b since 1 and 2 for c since 2, and nothing is switched."""
    play = Play(request_timeout=10000.0)
    play.awake("a")
    play.at(0.5, e.Reload(tuple(m.spec for m in play.state.models.values()), play.state.settings, Promising()))
    play.ask(1, 1, "b")
    play.ask(2, 2, "c")
    play.switcher._switching.policy = policy or Fifo()
    return play


# One way at least to break each.


def too_much_memory() -> Violation | None:
    play = Play()
    play.awake("a")
    play.model("b").state = S.AWAKE
    return observe(play, 1)


def forwarded_to_a_starting_engine() -> Violation | None:
    play = Play()
    play.ask(0, 1, "a")
    return observe(play, 1, c.Forward(1, "a", 1.0, 1.0))


def forwarded_to_an_engine_that_fell_asleep() -> Violation | None:
    play = Play()
    play.awake("a")
    play.ask(1, 1, "b")
    return observe(play, 2, c.Forward(1, "a", 1.0, 1.0))


def refused_twice() -> Violation | None:
    play = Play(max_queue=0)
    play.ask(0, 1, "a")
    return observe(play, 0, c.Refuse(1, c.Refusal.QUEUE_FULL, "full"))


def aborted_after_its_answer() -> Violation | None:
    play = Play()
    play.awake("a")
    return observe(play, 1, c.Abort(1000, c.Refusal.ENGINE_DIED, "gone"))


def answered_after_its_end() -> Violation | None:
    play = Play()
    play.awake("a")
    return observe(play, 1, event=e.RequestFinished(1000))


def forwarded_after_its_end() -> Violation | None:
    play = Play()
    play.awake("a")
    return observe(play, 1, c.Forward(1000, "a", 0.0, 0.0))


def lost_from_its_queue() -> Violation | None:
    play = Play()
    play.ask(0, 1, "a")
    play.model("a").queue.remove(play.state.requests[1])
    return observe(play, 1)


def counted_in_the_queue_though_it_is_not() -> Violation | None:
    play = Play()
    play.ask(0, 1, "a")
    play.state.queued = 2
    return observe(play, 1)


def accepted_and_not_known() -> Violation | None:
    return observe(Play(), 1, event=e.RequestArrived(1, "a"))


def in_transition_without_a_deadline() -> Violation | None:
    play = Play()
    play.ask(0, 1, "a")
    play.model("a").deadline = None
    return observe(play, 1)


def in_transition_beyond_its_deadline() -> Violation | None:
    play = Play()
    play.ask(0, 1, "a")
    play.model("a").deadline = 10.0
    assert observe(play, 15) is None
    return observe(play, 15.1)


def crowd() -> Play:
    """1 is in flight at a, which takes one at a time; 2 and 3 have come after it, 4 is more urgent."""
    play = Play(spec("a", max_in_flight=1), spec("b"))
    play.awake("a")
    play.ask(1, 1, "a")
    play.ask(2, 2, "a")
    play.ask(3, 3, "a")
    play.ask(4, 4, "a", priority=1)
    return play


def forwarded_before_a_more_urgent_one() -> Violation | None:
    return observe(crowd(), 5, c.Forward(2, "a", 3.0, 0.0))


def forwarded_before_one_that_came_earlier() -> Violation | None:
    play = crowd()
    assert play.at(5, e.RequestFinished(1)) == ["forward 4"]
    return observe(play, 5, c.Forward(3, "a", 2.0, 0.0))


def forwarded_together_in_the_wrong_order() -> Violation | None:
    play = crowd()
    for request in (2, 3, 4):
        play.model("a").queue.remove(play.state.requests[request])
    return observe(play, 5, *(c.Forward(request, "a", 1.0, 0.0) for request in (4, 3, 2)))


def waiting_for_a_model_that_is_awake() -> Violation | None:
    play = Play()
    play.ask(0, 1, "a")
    play.model("a").state, play.model("a").deadline = S.AWAKE, None
    return observe(play, 1)


def another_is_chosen_before_one_that_is_overdue() -> Violation | None:
    play = idle()
    assert observe(play, 3, began("b")) is None
    return observe(play, 3, began("c"))


def nothing_is_chosen_though_one_is_overdue() -> Violation | None:
    play = idle(Promising())
    assert observe(play, 131) is None
    return observe(play, 131.1)


def a_failed_model_is_tried_before_those_that_waited() -> Violation | None:
    play = idle(Tenure())
    play.model("c").failures, play.model("c").failed_at = 1, 1.5
    return observe(play, 20, began("c"))


def switched_in_manual_mode() -> Violation | None:
    play = idle()
    play.state.mode = SwitchMode(manual=True)
    return observe(play, 3, began("b"))


def another_than_the_pinned_one_is_switched_to() -> Violation | None:
    play = idle()
    play.state.mode = SwitchMode(manual=True, pinned="b")
    assert observe(play, 3, began("b")) is None
    return observe(play, 3, began("c"))


def put_to_sleep_in_manual_mode() -> Violation | None:
    play = idle()
    play.state.mode = SwitchMode(manual=True)
    return observe(play, 3, began(None))


BROKEN: list[tuple[str, Callable[[], Violation | None], str]] = [
    ("memory", too_much_memory, "gpu has 1, in use are 2"),
    ("forwarded_to_awake", forwarded_to_a_starting_engine, "request 1 to a"),
    ("forwarded_to_awake", forwarded_to_an_engine_that_fell_asleep, "request 1 to a"),
    ("ends_once", refused_twice, "request 1 ends, and had ended before"),
    ("ends_once", aborted_after_its_answer, "request 1000 ends, and had ended before"),
    ("ends_once", answered_after_its_end, "request 1000 ends, and had ended before"),
    ("ends_once", forwarded_after_its_end, "request 1000 is forwarded, and had ended before"),
    ("accounts", lost_from_its_queue, "open 1, known 1, placed 0 + 0"),
    ("accounts", counted_in_the_queue_though_it_is_not, "open 1, known 1, placed 1 + 0"),
    ("accounts", accepted_and_not_known, "open 1, known 0, placed 0 + 0"),
    ("deadlines", in_transition_without_a_deadline, "a is starting without one"),
    ("deadlines", in_transition_beyond_its_deadline, "a is starting beyond its deadline"),
    ("order", forwarded_before_a_more_urgent_one, "request 2 is forwarded before request 4"),
    ("order", forwarded_before_one_that_came_earlier, "request 3 is forwarded before request 2"),
    ("order", forwarded_together_in_the_wrong_order, "request 3 is forwarded before request 2"),
    ("forwards", waiting_for_a_model_that_is_awake, "1 wait for a, which is awake"),
    ("staleness", another_is_chosen_before_one_that_is_overdue, "c is next, b has waited 2.000 s"),
    ("staleness", nothing_is_chosen_though_one_is_overdue, "b has waited 130.100 s, nothing is switched"),
    (
        "failures",
        a_failed_model_is_tried_before_those_that_waited,
        "c is tried again, b has waited since before it failed",
    ),
    ("manual", switched_in_manual_mode, "a switch to b begins by itself"),
    ("manual", another_than_the_pinned_one_is_switched_to, "a switch to c begins by itself"),
    ("manual", put_to_sleep_in_manual_mode, "a switch to None begins by itself"),
]


@pytest.mark.parametrize(("invariant", "act", "detail"), BROKEN, ids=[act.__name__ for _, act, _ in BROKEN])
def test_it_is_found(invariant, act, detail):
    violation = act()
    assert violation is not None
    assert (violation.invariant, violation.detail) == (invariant, detail)


def test_each_invariant_can_be_broken():
    assert {name for name, _, _ in BROKEN} == set(INVARIANTS)


def test_it_is_said_in_a_sentence():
    violation = Violation("manual", "a switch to b begins by itself", 3.0)
    assert str(violation) == (
        "manual at 3.000 s: a switch to b begins by itself "
        "(In manual mode nothing is switched but by an operator's word and to the pinned model.)"
    )
    assert str(Violation("mine", "oh", 3.0)) == "mine at 3.000 s: oh", "another checker's own"


def test_the_first_that_is_broken_is_told_and_the_next_observation_begins_anew():
    play = Play()
    play.awake("a")
    violation = observe(play, 1, c.Forward(1000, "b", 0.0, 0.0), c.Forward(1000, "a", 0.0, 0.0))
    assert violation is not None
    assert violation.invariant == "forwarded_to_awake"
    assert observe(play, 2) is None


class TestAfterARequestOfAnAwakeModel:
    """The others are as good as they were, and are not looked at."""

    def play(self) -> Play:
        """a is awake, and 1 in flight at it; b and c have no engine."""
        play = Play()
        play.awake("a")
        assert play.ask(1, 1, "a") == ["forward 1"]
        return play

    def test_what_is_wrong_with_it_is_found_at_once(self):
        play = self.play()
        del play.model("a").in_flight[1]
        violation = observe(play, 2, event=e.RequestArrived(2, "a"))
        assert violation is not None
        assert violation.detail == "open 2, known 1, placed 0 + 0"

    def test_what_is_wrong_with_others_is_found_at_the_next_probe(self):
        play = self.play()
        play.model("b").state = S.AWAKE
        assert play.at(2, e.RequestFinished(1)) == []
        violation = observe(play, 2.5, event=e.Probe(1))
        assert violation is not None
        assert violation.invariant == "memory"

    def test_unless_somebody_waits_for_one_of_them(self):
        play = idle(Promising())
        assert observe(play, 131) is None
        assert play.state.switch is None
        play.switcher.handle(e.RequestArrived(3, "a"), 131.1)
        violation = observe(play, 131.1, c.Forward(3, "a", 0.0, 0.0), event=e.RequestArrived(3, "a"))
        assert violation is not None
        assert violation.invariant == "staleness"

    def test_or_one_of_them_is_beyond_its_deadline(self):
        small = Placement({"gpu": 0})
        play = Play(spec("a", placement=small), spec("b", placement=small))
        play.awake("a")
        play.at(1, e.OperatorWake(7, "b"))
        deadline = play.model("b").deadline
        play.at(2, e.SetMode(manual=False))
        violation = observe(play, deadline + 6, c.Forward(3, "a", 0.0, 0.0), event=e.RequestArrived(3, "a"))
        assert violation is not None
        assert violation.detail == "b is starting beyond its deadline"


class TestNothingIsWrongWhere:
    def test_an_operator_asked(self):
        play = idle()
        play.state.mode = SwitchMode(manual=True)
        assert observe(play, 3, began("c", asked=True)) is None

    def test_idle_models_are_put_to_sleep(self):
        assert observe(idle(), 3, began(None)) is None

    def test_the_one_that_is_overdue_cannot_be_loaded(self):
        play = idle()
        play.model("b").failures, play.model("b").retry_at = 1, 100.0
        assert observe(play, 3, began("c")) is None

    def test_the_policy_promises_nothing(self):
        assert observe(idle(TimeSlice()), 5000, began("c")) is None

    def test_an_operators_job_waits(self):
        play = idle(Promising())
        play.state.jobs.append(Job(1, "c"))
        assert observe(play, 500) is None

    def test_a_failed_model_had_failed_before_the_others_came(self):
        play = idle(Tenure())
        play.model("c").failures, play.model("c").failed_at = 1, 0.5
        assert observe(play, 20, began("c")) is None

    def test_an_auditor_comes_later(self):
        small = Placement({"gpu": 0})
        play = Play(spec("a", placement=small), spec("b", placement=small))
        play.auditor = Auditor(play.switcher)
        assert play.ask(0, 1, "a") == ["start a"]
        assert play.done(1, "a") == ["forward 1"]
