"""The sweep finds what it is there to find: each invariant is broken by a core that is broken on purpose.

A mutation takes one rule out of the production core. The sweep has to notice it within so many seeds, under the
name of the invariant that the rule is there for; and the core as it is has to pass the same seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.audit import INVARIANTS
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.engines import Engines
from llmuxd.core.policies import CostAware, Fifo, Tenure
from llmuxd.core.policy import Stay, SwitchTo
from llmuxd.core.requests import Requests
from llmuxd.core.state import State
from llmuxd.core.switcher import Switcher
from llmuxd.core.switching import Switching
from llmuxd.sim.virtual.chaos import draw
from llmuxd.sim.virtual.sweep import digest, log_of, run_seed, shortest, violation_of
from llmuxd.sim.virtual.world import World

SEEDS = range(400)

Mutate = Callable[[pytest.MonkeyPatch], None]


def everything_fits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(State, "fits", lambda self, target, going: True)


def forwards_while_waking(patch: pytest.MonkeyPatch) -> None:
    right = Requests.may_forward

    def may_forward(self: Requests, model: Any, now: float) -> bool:
        return right(self, model, now) or model.state is S.WAKING

    patch.setattr(Requests, "may_forward", may_forward)


def a_leaving_client_is_refused_as_well(patch: pytest.MonkeyPatch) -> None:
    right = Requests.left

    def left(self: Requests, event: e.ClientLeft, now: float) -> Any:
        self._state.out.append(c.Refuse(event.request, c.Refusal.CANNOT_LOAD, "gone"))
        return right(self, event, now)

    patch.setattr(Requests, "left", left)


def a_bounced_request_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Requests, "bounced", lambda self, event, now: self._take_in_flight(event.request, now))


def no_deadline_for_a_wake(patch: pytest.MonkeyPatch) -> None:
    right = Engines.wake

    def wake(self: Engines, model: Any, now: float) -> None:
        right(self, model, now)
        model.deadline = None

    patch.setattr(Engines, "wake", wake)


def youngest_first(patch: pytest.MonkeyPatch) -> None:
    def decide(_self: Any, snapshot: Any) -> Any:
        return SwitchTo(max((m.oldest_arrival, m.name) for m, _ in snapshot.candidates)[1])

    for policy in (Fifo, CostAware, Tenure):
        patch.setattr(policy, "decide", decide)


def never_switches(patch: pytest.MonkeyPatch) -> None:
    for policy in (Fifo, CostAware, Tenure):
        patch.setattr(policy, "decide", lambda self, snapshot: Stay())


def a_failed_model_goes_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Switching, "_stands_back", lambda self, model, wanted: False)

    def decide(_self: Any, snapshot: Any) -> Any:
        return SwitchTo(max((m.oldest_arrival, m.name) for m, _ in snapshot.candidates)[1])

    patch.setattr(Tenure, "decide", decide)
    patch.setattr(Tenure, "bound", lambda self, secs: None)


def manual_mode_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    right = Switching._choose

    def choose(self: Switching, now: float, due: bool) -> Any:
        mode = self._state.mode
        self._state.mode = type(mode)()
        try:
            return right(self, now, due)
        finally:
            self._state.mode = mode

    patch.setattr(Switching, "_choose", choose)


def what_comes_up_by_itself_serves_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Switcher, "_serve_without_switch", lambda self, name, now: None)


MUTATIONS: list[tuple[str, Mutate]] = [
    ("memory", everything_fits),
    ("forwarded_to_awake", forwards_while_waking),
    ("ends_once", a_leaving_client_is_refused_as_well),
    ("accounts", a_bounced_request_is_forgotten),
    ("deadlines", no_deadline_for_a_wake),
    ("staleness", youngest_first),
    ("staleness", never_switches),
    ("forwards", what_comes_up_by_itself_serves_nobody),
    ("failures", a_failed_model_goes_first),
    ("manual", manual_mode_is_not_looked_at),
]


def test_the_core_as_it_is_breaks_nothing():
    assert [str(v.violation) for v in map(run_seed, SEEDS) if v.violation is not None] == []


@pytest.mark.parametrize(("invariant", "mutate"), MUTATIONS, ids=lambda x: getattr(x, "__name__", x))
def test_a_broken_core_is_found_out(monkeypatch, invariant, mutate):
    mutate(monkeypatch)
    found = (verdict.violation.invariant for verdict in map(run_seed, SEEDS) if verdict.violation is not None)
    assert invariant in found


def test_each_invariant_has_a_mutation():
    assert {name for name, _ in MUTATIONS} == set(INVARIANTS)


def test_a_failing_seed_is_made_short(monkeypatch):
    everything_fits(monkeypatch)
    seed = next(s for s in SEEDS if (v := run_seed(s).violation) is not None and v.invariant == "memory")
    scenario = shortest(seed, "memory")
    whole = draw(seed)
    violation = violation_of(World(scenario))
    assert violation is not None
    assert violation.invariant == "memory"
    assert len(scenario.arrivals) + len(scenario.actions) + len(scenario.faults) <= 3
    assert len(scenario.arrivals) <= len(whole.arrivals)
    assert log_of(scenario)[-1].startswith("VIOLATION memory")


def test_the_same_seed_gives_the_same_log():
    logs = {seed: digest(draw(seed)) for seed in range(5)}
    assert {seed: digest(draw(seed)) for seed in range(5)} == logs
    assert len(set(logs.values())) == 5
